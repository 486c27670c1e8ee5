"""What is said of an untrusted set: `Findings`, of a trained one the `Result`, and the tables behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from antibackdoor.attention import Attention
from antibackdoor.data.core import Data, Spec, as_stored
from antibackdoor.defenses import Outcome
from antibackdoor.files import check_free, write_csv, write_json, write_lines
from antibackdoor.report import build_report
from antibackdoor.runs import Beginning, issues_table, save_attention, save_gallery, save_model
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.objectives import forward
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is said of an untrusted set.

    suspects: every sample, most suspicious first. attention: where the backdoor shows, for the report. beginning: what
    was run, for its folder.
    """

    suspects: pd.DataFrame
    verdict: Verdict
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    data: Data
    beginning: Beginning
    environment: dict[str, Any]
    attention: Attention | None = None

    def issues(self) -> pd.DataFrame:
        """One row a sample in the order of the data, with the columns of cleanlab's issue tables."""
        return issues_table(self.suspects, self.data.ids)

    def save(self, folder: str | Path) -> Path:
        """Make the run folder that `out` makes, report included, but for the known truth and what resumes a run.

        Raises InputError for a folder that is in use.
        """
        folder = Path(folder)
        check_free(folder)
        with self.beginning.folder(folder, self.data):
            self.write(folder)
        return folder

    def write(self, folder: Path) -> None:
        """Add what was found to the folder of the run, and the report; `result.json` comes last and means done."""
        write_csv(folder / "suspects.csv", self.suspects)
        write_lines(folder / "history.jsonl", self.history)
        write_csv(folder / "history.csv", pd.DataFrame(self.history))
        reference = None if self.attention is None else self.attention.reference
        save_gallery(folder, self.data, self.suspects, reference)
        if self.attention is not None:
            save_attention(folder, self.attention)
        write_json(folder / "verdict.json", self.verdict.as_json())
        write_json(folder / "metrics.json", self.metrics)
        write_json(folder / "env.json", self.environment)
        build_report(folder)
        summary = {
            "poisoned": self.verdict.poisoned,
            "flagged": int(self.suspects["flagged"].sum()),
            "n": len(self.data),
        }
        write_json(folder / "result.json", summary)


@dataclass(frozen=True, kw_only=True)
class Result(Findings):
    """Findings, and the clean classifier that was trained: a plain module."""

    model: nn.Module
    spec: Spec
    architecture: str | None

    @torch.no_grad()
    def predict(self, x: Data | Tensor | np.ndarray, lengths: Tensor | None = None) -> np.ndarray:
        """Class numbers `(n,)` for a `Data`, or for samples: `(n, C, H, W)` as uint8 or in [0, 1], or `(n, C, T)`.

        Raises InputError for images in another range and for values that are not finite.
        """
        if not isinstance(x, Data):
            stored = as_stored(torch.as_tensor(x), self.spec.kind)
            none = torch.zeros(len(stored), dtype=torch.int64)
            given = tuple(stored.shape[1:])  # series may be shorter or longer than those of the training set
            series = self.spec.kind == "series" and given[:1] == self.spec.shape[:1]
            spec = replace(self.spec, shape=given) if series else self.spec
            x = Data(stored, none, spec, [str(i) for i in range(len(stored))], lengths)
        device = next(self.model.parameters()).device
        fabric = make_fabric(str(device), "32-true")
        return logits_of(self.model, x, fabric).argmax(1).numpy()

    def write(self, folder: Path) -> None:
        """The model too, before all else."""
        save_model(folder, self.model, self.architecture, self.spec)
        super().write(folder)


def suspects_table(data: Data, outcome: Outcome) -> pd.DataFrame:
    """Every sample, most suspicious first: id, label, score, probability, flagged, suggested_label, reason."""
    names = np.array(data.spec.classes, dtype=object)
    suggested = outcome.suggested.numpy()
    table = pd.DataFrame(
        {
            "id": list(data.ids),
            "label": names[data.y.cpu().numpy()],
            "score": outcome.scores.numpy(),
            "probability": outcome.probability.numpy(),
            "flagged": outcome.flagged.numpy(),
            "suggested_label": np.where(suggested >= 0, names[suggested.clip(0)], ""),
            "reason": [outcome.reasons.get(row, "") for row in range(len(data))],
        }
    )
    return table.sort_values(["flagged", "score"], ascending=False, kind="stable", ignore_index=True)


ASKED = 2048
"""Training samples, at most, that a finished model is asked about to see whether it tells classes apart at all."""


def with_collapse(verdict: Verdict, outcome: Outcome, job: Job) -> Verdict:
    """The verdict, which says so first where the model gives one answer whatever it is shown, and then clears nothing.

    What such a model found may stand, since its witnesses found it, too; that it found nothing means nothing.
    """
    rows = torch.linspace(0, len(job.data) - 1, min(len(job.data), ASKED)).long()
    witness, call = outcome.witness or (None, forward)
    call = call if witness is outcome.model else forward
    answers = logits_of(outcome.model, job.data, job.fabric, rows, call=call).argmax(1).unique()
    if len(answers) > 1:
        return verdict
    told = (
        f"The model collapsed: it takes all {len(rows):,} training samples that it was asked about for "
        f"{job.data.spec.classes[int(answers)]!r}. Do not use it, nor take its word that data are clean; train for "
        "more epochs, or at a lower learning rate."
    )
    confidence = verdict.confidence if verdict.poisoned else 0.0
    return replace(verdict, confidence=confidence, evidence=[told, *verdict.evidence])


def cost(job: Job) -> dict[str, Any]:
    """Wall time and optimizer steps of all stages, also when the run was resumed."""
    steps = {row["stage"]: row["steps"] for row in job.history}
    return {"seconds": round(sum(row["seconds"] for row in job.history), 1), "steps": sum(steps.values())}
