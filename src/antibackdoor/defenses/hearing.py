"""The objective of `jury`: train on the trusted samples, then hear what the model says of all others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.augment import strong
from antibackdoor.data.batches import Batch, gather
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.files import Tree
from antibackdoor.intervals import lower
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Augment, Objective, Step, forward
from antibackdoor.training.ranking import within
from antibackdoor.training.scores import logits_of
from antibackdoor.training.semi_supervised import Average

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury

OUT = -1
"""The label of a sample that nothing learns from at present."""


class Hearing(Objective):
    """Cross entropy with labels that the model's own average hands out, epoch by epoch, to samples not trusted.

    suspicion: `(n,)` in [0, 1], percentile within the samples of the same given label. ease: `(n,)`, how early the
    shallow witness learned each label. divided: for each class, whether the outsiders see two groups in it.
    """

    def __init__(
        self, options: Jury, job: Job, model: nn.Module, suspicion: Tensor, ease: Tensor, divided: Sequence[bool]
    ):
        self.divided = divided
        self.options, self.job, self.suspicion = options, job, suspicion
        self.given = job.data.y.cpu()
        self.early = within(ease, torch.zeros_like(self.given))
        self.trusted = suspicion <= options.trusted
        for label in self.given.unique().tolist():  # of a class of one or two samples, the least suspicious one
            rows = (self.given == label).nonzero().flatten()
            self.trusted[rows[suspicion[rows].argmin()]] = True
        self.classes = range(len(job.data.spec.classes))
        self.excluded = suspicion > 1 - options.excluded
        self.first = options.hearing * job.recipe(options.main).epochs_for(len(self.given))
        self.average, self.witness = Average(model, 0.995), copy.deepcopy(model)
        self.findings: list[dict[str, Any]] = [
            {"count": 0, "n": 0, "early": 0.0, "divided": apart, "attacked": False} for apart in divided
        ]
        self.partitions: list[Partition] = []
        self._assign(0, torch.where(self.trusted, self.given, OUT))

    def _assign(self, epoch: int, labels: Tensor) -> None:
        self.labels = labels.to(self.job.fabric.device)
        learns = labels != OUT
        self.learns = learns.nonzero().flatten().to(self.labels.device)
        self.partitions.append(Partition(epoch, ~self.trusted, learns & ~self.trusted, labels.clamp(min=0)))

    def prepare(self, plain: Batch, augment: Augment, rng: torch.Generator) -> Batch:
        """Samples without a label at present give their places to random ones that have one: as many steps as ever."""
        rows = plain.rows
        learns = self.learns
        others = learns[torch.randint(len(learns), (len(rows),), generator=rng, device=learns.device)]
        batch = gather(self.job.data, torch.where(self.labels[rows] == OUT, others, rows), self.job.fabric.device)
        batch = replace(batch, y=self.labels[batch.rows])
        if self.acquitted:
            return augment(batch, rng)
        return replace(batch, x=strong(batch.x, self.job.data.spec, rng, batch.lengths))

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Plain cross entropy."""
        values = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"main": values.detach()})

    def after_step(self, model: nn.Module) -> None:
        """Average the weights."""
        self.average.update(model)

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """From `hearing` on, hear all samples that are not trusted and hand out their labels anew."""
        if epoch >= self.first:
            self._hear(epoch)
        used = float((self.labels != OUT).double().mean())
        return {"main_loss": float(torch.nanmean(records["main"])), "used": used}

    def _hear(self, epoch: int) -> None:
        self.witness.load_state_dict(self.average.values)
        rows = (~self.trusted).nonzero().flatten()
        confidence, answers = self._answers(rows)
        given = self.given[rows]
        against = (answers != given) & (confidence >= self.options.confidence)
        of_class = [given == label for label in self.classes]
        findings = [
            self._finding(rows[mask], rows[mask & against], apart)
            for mask, apart in zip(of_class, self.divided, strict=True)
        ]
        # What was found once stays: later the model would only repeat what it was taught since.
        self.findings = [old if old["attacked"] else new for old, new in zip(self.findings, findings, strict=True)]
        attacked = self._attacked()[given]
        restored = (answers == given) & ~self.excluded[rows]
        judged = torch.where(against, answers, torch.where(restored, given, OUT))
        labels = self.given.clone()
        labels[rows] = torch.where(attacked, judged, given)
        self._assign(epoch, labels)

    def _finding(self, heard: Tensor, against: Tensor, apart: bool) -> dict[str, Any]:
        """About one class; clean samples that look like another class are learned late, poison is not."""
        early = float(self.early[against].median()) if len(against) else 0.0
        many = lower(len(against), len(heard)) > self.options.acquittal
        attacked = many and (early > 0.5 or apart)
        return {"count": len(against), "n": len(heard), "early": early, "divided": apart, "attacked": attacked}

    @property
    def acquitted(self) -> bool:
        """Whether there was a hearing and no class was found to be attacked."""
        return any(finding["n"] for finding in self.findings) and not any(f["attacked"] for f in self.findings)

    def _attacked(self) -> Tensor:
        return torch.tensor([bool(finding["attacked"]) for finding in self.findings])

    def _answers(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probabilities = logits_of(self.witness, self.job.data, self.job.fabric, rows).double().softmax(1)
        best = probabilities.max(1)
        return best.values, best.indices

    def state(self) -> Tree:
        """The labels of each epoch, the averaged weights, and the findings that the verdict rests on."""
        kept = [[p.epoch, p.isolated, p.recovered, p.labels] for p in self.partitions]
        average = {"steps": self.average.steps, "values": self.average.values}
        return {"partitions": kept, "labels": self.labels.cpu(), "average": average, "findings": self.findings}

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.partitions = [Partition(*values) for values in state["partitions"]]
        self.labels = state["labels"].to(self.job.fabric.device)
        self.learns = (self.labels != OUT).nonzero().flatten()
        self.average.steps, self.findings = state["average"]["steps"], state["findings"]
        for name, value in self.average.values.items():
            value.copy_(state["average"]["values"][name])

    def outcome(self, model: nn.Module) -> Outcome:
        """The averaged model; suspects are samples of attacked classes that it takes for another class.

        scores: its doubt of the given label, ties (clean-label poison, say) broken by suspicion.
        """
        model.load_state_dict(self.average.values)
        logits = logits_of(model, self.job.data, self.job.fabric).double()
        probabilities, names = logits.softmax(1), self.job.data.spec.classes
        doubt = 1 - probabilities.gather(1, self.given[:, None]).squeeze(1)
        answers = probabilities.argmax(1)
        attacked = self._attacked()
        flagged = attacked[self.given] & ~self.trusted & (answers != self.given)
        reasons = {
            row: f"labeled {names[self.given[row]]!r}, but a model that learned from trusted samples sees another class"
            for row in flagged.nonzero().flatten().tolist()
        }
        evidence = {"by_class": self.findings, "acquittal": self.options.acquittal, "flagged": int(flagged.sum())}
        return Outcome(
            model,
            doubt + 0.01 * self.suspicion,
            doubt.clamp(0, 1),
            flagged,
            torch.where(flagged, answers, -1),
            reasons,
            evidence,
            self.partitions,
        )
