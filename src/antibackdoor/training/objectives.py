"""What a training pass minimizes: (model, batch) -> loss, and what it remembers of every sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.files import Tree

Augment = Callable[[Batch, torch.Generator], Batch]
"""The recipe's augmentation of a batch."""


@dataclass(frozen=True)
class Step:
    """loss: scalar to minimize. records: per-sample values aligned with `batch.rows`, kept for the end of the epoch."""

    loss: Tensor
    records: Mapping[str, Tensor] = field(default_factory=dict)


class Objective:
    """Base of all objectives: `__call__` always, the others where they are needed.

    `state` and `load` where something is remembered; `finished` set True in `after_epoch` ends the stage early, and
    is saved with it.
    """

    finished: bool = False
    compiles: ClassVar[bool] = False
    """Whether a compiled model serves as well: it is only called on whole batches, and nobody looks into it."""

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """The loss of one batch."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def prepare(self, plain: Batch, augment: Augment, rng: torch.Generator) -> Batch:
        """The batch to train on, made of the samples as stored, outside of mixed precision; `augment(batch, rng)`.

        `rows` must stay those of `plain`.
        """
        return augment(plain, rng)

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Prepare the model, which has just been put in training mode, for epoch 0, 1, ..."""

    def before_step(self, model: nn.Module) -> None:
        """See or change the gradients."""

    def after_step(self, model: nn.Module) -> None:
        """See or change the new weights."""

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """See the epoch's records, `(n,)` each with NaN where a sample was not seen; return numbers for the history."""
        return {}

    def state(self) -> Tree:
        """What a resumed run must know, as a state tree."""
        return {}

    def load(self, state: Tree) -> None:
        """Take back what `state` gave."""


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits; lengths are passed on only where there are any, so that any image module can be used."""
    logits: Tensor = model(batch.x) if batch.lengths is None else model(batch.x, batch.lengths)
    return logits


class CrossEntropy(Objective):
    """Mean cross entropy with the given labels; records each sample's loss as "main"."""

    compiles: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Plain supervised training."""
        losses = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step(losses.mean(), {"main": losses.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean training loss."""
        return {"main_loss": float(torch.nanmean(records["main"]))}
