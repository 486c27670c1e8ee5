"""What every detector is: hyper-parameters, a score for every sample, and where it has a rule, flags and a verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.registry import Registry
from antibackdoor.training.features import each_class
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.ranking import top
from antibackdoor.verdict import Verdict


@options
class Detector(ABC):
    """Base of all detectors: scores every sample of an untrusted set, HIGHER = MORE SUSPICIOUS.

    It judges with a finished network or, where none is given, with one that it trains on the set as it is.
    """

    watches_training: ClassVar[bool] = False
    """True where the scores come from a training of its own, so that a finished network is of no use."""
    estimates_probability: ClassVar[bool] = False
    """Whether the outcome's probabilities mean anything."""

    recipe: Annotated[Recipe, Field(description="training of the network, where none is given")] = Recipe()

    @abstractmethod
    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """Score the samples of `job.data`, in the order of the set. model: a finished network on the job's device."""

    def network(self, job: Job, model: nn.Module | None) -> nn.Module:
        """The finished network; without one a plain one is trained, on everything as given."""
        if model is None:
            model = job.model()
            job.fit("training", model, CrossEntropy(), job.recipe(self.recipe))
        return model

    def refuse(self, model: nn.Module | None) -> None:
        """InputError where a finished network was given to a detector that watches a training."""
        if model is not None and self.watches_training:
            raise InputError("this detector watches a training of its own, so it cannot judge with a finished network.")

    @property
    def decides(self) -> bool:
        """Whether it can say of a set that it is poisoned or not; False where it only ranks the samples."""
        return True

    def verdict(self, data: Data, outcome: Outcome) -> Verdict:
        """The answer to "is this set poisoned?" as far as this detector has one."""
        if not self.decides:
            sentence = "This detector only ranks the samples; it cannot tell whether there is poison among them."
            return Verdict(False, 0.0, evidence=[sentence])
        return verdict_of_classes(data, outcome)


@options
class Ranking(Detector):
    """Base of detectors that have no threshold of their own: whatever is flagged is a share that the user names."""

    flag: Annotated[
        float | None, Field(gt=0, le=1, description="share of all samples to flag; null: flag none, only rank them")
    ] = None

    @property
    def decides(self) -> bool:
        """Never: some sample always ranks first, also in a clean set."""
        return False

    def ranked(self, model: nn.Module, data: Data, scores: Tensor, reason: str) -> Outcome:
        """The outcome of these scores, `flag` of the samples flagged with this reason."""
        flagged = torch.zeros(len(scores), dtype=torch.bool)
        if self.flag is not None:
            flagged[top(scores, max(1, round(self.flag * len(scores))))] = True
        return outcome_of(model, data, scores, flagged, reason, {})


FEWEST, SMALLEST = 20, 3
"""Samples that a class and the group in it must have to be called poisoned: fewer fall into two groups by chance."""


@dataclass(frozen=True)
class Split:
    """One class cut into two groups by its features; m samples.

    scores: `(m,)`. group: `(m,)` bool, the group that is suspicious if any is. separation: how far the two lie apart.
    found: whether they lie so far apart, and are of such sizes, that the detector's rule calls the group poison.
    """

    scores: Tensor
    group: Tensor
    separation: float
    found: bool


def enough(group: Tensor) -> bool:
    """Whether a class and the group in it, `(m,)` bool, are large enough to say anything."""
    return len(group) >= FEWEST and int(group.sum()) >= SMALLEST


def split_classes(
    model: nn.Module,
    data: Data,
    features: Tensor,
    split: Callable[[Tensor, int], Split],
    measure: str,
    threshold: float,
) -> Outcome:
    """Cut every class by its features `(n, D)`; `split(features of a class, its number)` decides how.

    The scores of a class that cannot be cut (see `each_class`) are 0.
    """
    y = data.y.cpu()
    scores, flagged = torch.zeros(len(y), dtype=torch.float64), torch.zeros(len(y), dtype=torch.bool)
    rows = []
    for label, members, own in each_class(features, y):
        cut = split(own, label)
        scores[members] = cut.scores
        flagged[members] = cut.group & cut.found
        counts = {"group": int(cut.group.sum()), "n": len(members)}
        rows.append({"class": label, **counts, "separation": cut.separation, "found": cut.found})
    reason = f"in its class it belongs to a group of its own ({measure})"
    return outcome_of(
        model, data, scores, flagged, reason, {"classes": rows, "measure": measure, "threshold": threshold}
    )


def verdict_of_classes(data: Data, outcome: Outcome) -> Verdict:
    """From the evidence of `split_classes`. The confidence orders runs by their margin; it is not calibrated."""
    rows, threshold = outcome.evidence["classes"], outcome.evidence["threshold"]
    measure = outcome.evidence["measure"]
    if all(row["n"] < FEWEST for row in rows):
        sentence = f"No class has the {FEWEST} samples, with features that differ, that it takes to be judged."
        return Verdict(False, 0.0, evidence=[sentence])
    found = sorted((row for row in rows if row["found"]), key=lambda row: -row["separation"])
    under = [row for row in rows if row["n"] >= FEWEST and row["separation"] < threshold]
    if not (found or under):
        sentence = f"No class holds a group of its own of a size that poison has: by {measure} all fall apart."
        return Verdict(False, 0.5, evidence=[sentence])
    shown = found or [max(under, key=lambda row: row["separation"])]
    sentences = [
        f"Of the {row['n']} samples labeled {data.spec.classes[row['class']]!r}, {row['group']} form a group of their "
        f"own: {measure} {row['separation']:.2f}, threshold {threshold:g}."
        if row["found"]
        else f"No class holds a group of its own. Nearest to it comes {data.spec.classes[row['class']]!r}, with "
        f"{row['group']} of {row['n']} samples on one side: {measure} {row['separation']:.2f}, threshold {threshold:g}."
        for row in shown
    ]
    margin = abs(shown[0]["separation"] - threshold) / threshold if threshold else 1.0
    confidence = round(0.5 + 0.49 * min(1.0, margin), 3)
    names = [data.spec.classes[row["class"]] for row in found]
    return Verdict(bool(found), confidence, names, int(outcome.flagged.sum()) / len(data), sentences)


def outcome_of(
    model: nn.Module, data: Data, scores: Tensor, flagged: Tensor, reason: str, evidence: dict[str, Any]
) -> Outcome:
    """Scores and flags as an outcome: no probabilities, no labels suggested.

    Raises InputError where a score is not finite, naming the first such sample.
    """
    bad = (~scores.isfinite()).nonzero().flatten()
    if len(bad):
        raise InputError(
            f"the network gives sample {data.ids[int(bad[0])]!r} values that are not finite, so {len(bad)} of "
            f"{len(scores)} samples cannot be scored; give one that has not diverged."
        )
    reasons = dict.fromkeys(flagged.nonzero().flatten().tolist(), reason)
    return Outcome(model, scores, torch.zeros_like(scores), flagged, torch.full((len(scores),), -1), reasons, evidence)


DETECTORS: Registry[type[Detector]] = Registry("detector")
