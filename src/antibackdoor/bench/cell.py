"""One cell of a benchmark: poison a real set, train under a defense, judge, and give one small JSON."""

from __future__ import annotations

import hashlib
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.detection import judge_detectors
from antibackdoor.bench.judge import (
    accuracy,
    attack_measures,
    detection_measures,
    partition_measures,
    selection_measures,
    stage_measures,
    trace_of,
    verdict_measures,
)
from antibackdoor.bench.ledger import digest
from antibackdoor.bench.machine import peak_memory, reset_peak_memory
from antibackdoor.bench.poisoned import poison
from antibackdoor.data.copies import stamp
from antibackdoor.data.core import Data, Splits, Truth
from antibackdoor.data.folders import safe_name
from antibackdoor.data.load import load
from antibackdoor.defenses import check_given, make_defense
from antibackdoor.detectors import make_detector
from antibackdoor.environment import environment
from antibackdoor.errors import InputError
from antibackdoor.options import build, options, values
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Progress
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import decide

GATES = {"composite": 0.85, "timetrojan_fgsm": 0.70}
CLEAN_SHARE = 0.05
"""What a defense that needs clean samples gets of the training set; the share of all papers that compare such."""
GATE = 0.95
"""Undefended attack success rate under which an attack "did not take"; it depends on the attack only."""


CHECKPOINT_SECONDS = 2.0
"""A killed cell loses its current epoch, or, where epochs are shorter than this, so much of them."""


@options
class Cell:
    """What one cell runs; its content hash names its result.

    attack "none" leaves the data clean. defense may carry a profile, as in "e2abl:paper".
    """

    data: str = "digits"
    train_size: Annotated[int | None, Field(ge=2, description="a fixed random subset of the training set")] = None
    attack: str = "none"
    attack_options: dict[str, Any] = Field(default_factory=dict)
    defense: str = "none"
    defense_options: dict[str, Any] = Field(default_factory=dict)
    model: str = "auto"
    epochs: Annotated[int | None, Field(ge=1, description="of the main training, whatever the defense")] = None
    batch_size: Annotated[int | None, Field(ge=2, description="of the main training, whatever the defense")] = None
    detectors: Annotated[
        list[str] | None, Field(min_length=1, description="judge the samples with these too, on the model that results")
    ] = None
    clean_share: Annotated[
        float | None,
        Field(gt=0, lt=1, description=f"of training set, for defenses that need clean samples; {CLEAN_SHARE}"),
    ] = None
    trace: Annotated[Literal[True] | None, Field(description="also measure the model after every epoch")] = None
    seed: int = 0

    def resolved(self) -> dict[str, Any]:
        """Every setting that matters, the methods' defaults filled in: what the hash is taken of.

        What a cell leaves open is left out, so that a new field renames no result that was made without it. Of data
        that lie at a path, which may hold something else tomorrow, the content counts too.
        """
        attack = (
            {} if self.attack == "none" else values(build(ATTACKS[self.attack].make, self.attack_options, "attack"))
        )
        method = make_defense(self.defense, self.defense_options)
        defense = values(method)
        changes = dict(self.defense_options)
        own = {name: value for name, value in values(self).items() if value is not None and name != "clean_share"}
        if method.version > 1:
            own["defense_version"] = method.version
        if "clean" in method.needs:
            own["clean_share"] = self.clean_share or CLEAN_SHARE
        if (changed := _changed(self.data)) is not None:
            own["content"] = _content(self.data, changed)
        if self.detectors is not None:
            own["detectors"] = {name: values(make_detector(name)) for name in self.detectors}
        return {**own, "attack_options": attack, "defense_options": defense, "defense_changes": changes}

    def name(self) -> str:
        """A readable name that ends in 8 digits of the content hash."""
        settings = {k: v for k, v in self.resolved().items() if k != "defense_changes"}
        method, chosen = make_defense(self.defense), settings["defense_options"]
        unsaid = {name for name in method.later if chosen[name] == values(method)[name]}
        settings["defense_options"] = {name: value for name, value in chosen.items() if name not in unsaid}
        text = json.dumps(settings, sort_keys=True)
        parts = (safe_name(self.data), self.attack, self.defense.replace(":", "-"), self.model, f"s{self.seed}")
        return "-".join(parts) + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def subset(data: Data, size: int | None) -> Data:
    """A fixed random subset, the same in every cell and for every seed."""
    if size is None or size >= len(data):
        return data
    return data.take(torch.randperm(len(data), generator=generator(0, "subset"))[:size].sort().values)


def carve(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """(the rest, a clean part): `share` of every class, at least one sample of those that have two.

    Drawn before anything is poisoned and gone from what is; the test set stays out of it.
    """
    y, rng = data.y.cpu(), generator(seed, "clean")
    chosen = torch.zeros(len(data), dtype=torch.bool)
    for k in y.unique().tolist():
        rows = (y == k).nonzero().flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        chosen[rows[torch.randperm(len(rows), generator=rng)[:count]]] = True
    if not chosen.any():
        raise InputError(f"no class of the {len(data)} training samples has two, so none can be set aside as clean.")
    return data.take((~chosen).nonzero().flatten()), data.take(chosen.nonzero().flatten())


def run_cell(
    cell: Cell,
    *,
    folder: Path | None = None,
    attacks: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a cell and return its record: config, environment, measures with counts, cost, history.

    folder: where its stages are kept, so that a killed cell goes on. attacks: where attacks that train something are
    kept, so that all cells of a grid share them.
    """
    started = time.perf_counter()
    reset_peak_memory()
    full = _load(cell.data, _changed(cell.data))
    defense, train, extras = make_defense(cell.defense, cell.defense_options), subset(full.train, cell.train_size), {}
    if "clean" in defense.needs:
        train, extras["clean"] = carve(train, cell.clean_share or CLEAN_SHARE, cell.seed)
    check_given(cell.defense, defense, extras)
    splits = Splits(train, full.test)
    if splits.test is None:
        raise InputError(f"{cell.data!r} has no test set, so nothing can be measured on it.")
    fabric, experiment, stealth, data = make_fabric(device), None, None, splits.train
    if cell.attack != "none":
        poisoned = poison(
            splits,
            cell.attack,
            cell.attack_options,
            seed=cell.seed,
            victim=cell.model,
            fabric=fabric,
            kept=attacks,
            progress=progress,
        )
        data, experiment, stealth = poisoned.splits.train, poisoned.experiment, poisoned.attack["stealth"]
    job = Job(
        data,
        model=cell.model,
        seed=cell.seed,
        fabric=fabric,
        folder=folder,
        progress=progress,
        extras=extras,
        epochs=cell.epochs,
        batch_size=cell.batch_size,
        watch=trace_of(data, splits.test, experiment, fabric) if cell.trace else None,
    )
    job.checkpoint_seconds = CHECKPOINT_SECONDS
    outcome = defense.run(job)
    cost = {
        "seconds": round(sum(row["seconds"] for row in job.history), 1),  # of all stages, also when it was resumed
        "steps": {stage: max(r["steps"] for r in job.history if r["stage"] == stage) for stage in _stages(job.history)},
        "parameters": sum(p.numel() for p in outcome.model.parameters()),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": peak_memory(),
    }
    measures: dict[str, Any]
    if experiment is None:
        none = torch.zeros(len(data), dtype=torch.bool)
        truth = Truth(none, none, data.y.cpu(), torch.full_like(data.y.cpu(), -1))
        measures = accuracy(logits_of(outcome.model, splits.test, fabric).argmax(1), splits.test)
    else:
        truth = experiment.truth
        measures = attack_measures(outcome.model, splits.test, experiment.triggered, experiment.targets, fabric)
        measures["stealth"] = stealth
    measures["poisoned_samples"] = {"count": int(truth.poisoned.sum()), "n": len(data)}
    if outcome.flagged.any() or outcome.scores.any():
        measures["detection"] = detection_measures(outcome, truth)
        measures["verdict"] = verdict_measures(decide(data, outcome), truth, data.spec.classes)
        measures["partitions"] = [partition_measures(p, outcome.scores, truth) for p in outcome.partitions]
    if cell.detectors:

        def job_of(name: str) -> Job:
            """Detectors that watch a training have a schedule of their own."""
            place = None if folder is None else folder / "detectors" / name
            return Job(
                data,
                model=cell.model,
                seed=cell.seed,
                fabric=fabric,
                folder=place,
                progress=progress,
                batch_size=cell.batch_size,
            )

        measures["detectors"] = judge_detectors(cell.detectors, outcome.model, job_of, truth)
    if outcome.selections:
        y = data.y.cpu()
        measures["selections"] = {name: selection_measures(s, y, truth) for name, s in outcome.selections.items()}
    if outcome.stages:
        measures["stages"] = stage_measures(outcome, splits.test, experiment, fabric)
    return {
        "cell": cell.resolved(),
        "environment": environment(fabric),
        "scale": {"train": len(data), "train_full": len(full.train), "test": len(splits.test)},
        "measures": measures,
        "verdict_evidence": outcome.evidence,
        "cost": {**cost, "wall_seconds": round(time.perf_counter() - started, 3)},
        "history_digest": digest(job.history),
        "history": job.history,
    }


def _changed(data: str) -> tuple[int, int, int] | None:
    """What tells that the file or folder was changed; None for a name of the catalog, which a path goes before."""
    path = Path(data)
    return stamp(path) if path.exists() else None


@lru_cache(maxsize=1)
def _load(data: str, changed: tuple[int, int, int] | None) -> Splits:
    """Cells of one process that come after each other often use the same set."""
    return load(data)


@lru_cache
def _content(data: str, changed: tuple[int, int, int] | None) -> list[str | None]:
    """Fingerprints of the training and the test set, which many cells ask for."""
    splits = _load(data, changed)
    return [None if part is None else part.fingerprint() for part in (splits.train, splits.test)]


def _stages(history: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in history))
