"""What every defense is: hyper-parameters, `run(job)`, and one shape of outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.registry import Registry
from antibackdoor.training.job import Job


@dataclass(frozen=True)
class Partition:
    """How a defense split the samples at the start of an epoch; the judge compares it with the truth.

    isolated: `(n,)` bool, kept from the main head. recovered: `(n,)` bool, given back to it with `labels` `(n,)`.
    scores: `(n,)` float64, the ranking that it was made from; None where that is the outcome's.
    """

    epoch: int
    isolated: Tensor
    recovered: Tensor
    labels: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What a defense hands back; n samples of the untrusted set, in its order.

    model: the trained classifier alone. scores: `(n,)` float64, HIGHER = MORE SUSPICIOUS.
    probability: `(n,)` in [0, 1] that a sample is poisoned. flagged: `(n,)` bool.
    suggested: `(n,)` int64, the class a flagged sample seems to belong to, -1 where there is none to suggest.
    reasons: a sentence for flagged samples, by row number. evidence: numbers for the verdict, by name.
    partitions: one an epoch, where the method splits the samples.
    selections: sets of samples that the method relied on, by name, `(n,)` bool; the judge says how poisoned each is.
    stages: weights of the model after each stage, in order, where they are worth judging one by one (`snapshot`).
    witness: the network that a backdoor shows in, and how to get its logits, where that is not the model itself; it is
    looked at for the report and not kept.
    """

    model: nn.Module
    scores: Tensor
    probability: Tensor
    flagged: Tensor
    suggested: Tensor
    reasons: dict[int, str] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    partitions: list[Partition] = field(default_factory=list)
    selections: dict[str, Tensor] = field(default_factory=dict)
    stages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    witness: tuple[nn.Module, Callable[[nn.Module, Batch], Tensor]] | None = None

    def __post_init__(self) -> None:
        n = len(self.scores)
        if not (len(self.probability) == len(self.flagged) == len(self.suggested) == n):
            raise RuntimeError("scores, probability, flagged and suggested must have one value for each sample")
        if not (torch.isfinite(self.scores).all() and torch.isfinite(self.probability).all()):
            raise RuntimeError("a defense gave a score or probability that is not finite")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights in main memory."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@options
class Defense(ABC):
    """Base of all defenses: an immutable set of hyper-parameters with one verb."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it must be given beyond the untrusted set; empty for all that deserve the name."""
    version: ClassVar[int] = 1
    """Raised when the same settings come to other results: the ledger then has the cells of this method run again."""
    later: ClassVar[frozenset[str]] = frozenset()
    """Options younger than results that stand: left at its default, one of these gives no cell another name."""
    profiles: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named settings, chosen as "name:profile", for example "e2abl:paper"."""

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Train on `job.data` and judge its samples."""


def check_given(name: str, method: Defense, given: Collection[str]) -> None:
    """Refuse a run without what the method needs beyond the untrusted set, and one given what it would not use."""
    if lacking := sorted(method.needs - set(given)):
        raise InputError(
            f"the defense {name!r} needs {' and '.join(lacking)} samples beside the untrusted ones; give a few "
            f"with --{lacking[0]} PATH ({lacking[0]}= in Python), or choose a defense that needs nothing."
        )
    if unused := sorted(set(given) - method.needs):
        raise InputError(f"the defense {name!r} uses no {unused[0]} samples; leave out --{unused[0]}.")


DEFENSES: Registry[type[Defense]] = Registry("defense")
