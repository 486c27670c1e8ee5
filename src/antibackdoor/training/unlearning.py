"""Unlearning: gradient ascent on samples that look poisoned, with guards against its running away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.models.blocks import undisturbed
from antibackdoor.options import options
from antibackdoor.training.loop import Steps
from antibackdoor.training.objectives import Objective, Step, forward


@options
class Ascent(Steps):
    """How long and how fast to unlearn; a few samples are one batch, whatever the rules for small sets."""

    epochs: Annotated[int, Field(ge=1, description="passes over the samples to unlearn, at most")] = 20
    min_steps: Annotated[int, Field(ge=0, description="few samples get more epochs until this many steps")] = 400
    batch_size: Annotated[int, Field(ge=2, description="samples a step")] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Annotated[
        Literal["cosine", "constant", "fixmatch"], Field(description="of the learning rate, by steps")
    ] = "constant"
    augment: Annotated[Literal["none", "weak", "strong"], Field(description="augmentation of the batches")] = "none"

    def batch_for(self, n: int) -> int:
        """The batch size, also for few samples."""
        return self.batch_size


class Unlearn(Objective):
    """Minus the mean cross entropy with the given labels; weights that are not finite are taken back.

    The loss has no lower end, so that after enough steps nothing is left of the network. guarded: the norm of the
    gradient is clipped to `clip`; batch norms keep their running statistics, which batches of nothing but poison would
    shift; and the stage ends after the first epoch in which the share of samples answered as labeled, seen while
    training, is at most `enough`. In any case an epoch after which a weight, or an answer to its last batch, is not
    finite is undone, and ends the stage.
    Records: "unlearned", the loss, and "hit", 1 where the answer was the given label.
    """

    def __init__(self, *, guarded: bool = True, clip: float = 1.0, enough: float = 0.0):
        self.guarded, self.clip, self.enough = guarded, clip, enough
        self._before: dict[str, Tensor] = {}
        self._batch: Batch | None = None

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Remember the weights; freeze the statistics of batch norms."""
        self._before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if self.guarded:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Climb."""
        return self.step(model, batch, -torch.ones_like(batch.y, dtype=torch.float32))

    def step(self, model: nn.Module, batch: Batch, signs: Tensor) -> Step:
        """The mean cross entropy, each sample's times its sign `(b,)`: -1 unlearns it."""
        self._batch = batch
        logits = forward(model, batch).float()
        losses = F.cross_entropy(logits, batch.y, reduction="none")
        hits = (logits.argmax(1) == batch.y).float()
        return Step((signs * losses).mean(), {"unlearned": losses.detach(), "hit": hits})

    def before_step(self, model: nn.Module) -> None:
        """Clip the gradient."""
        if self.guarded:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Take back what is not finite; stop when enough is unlearned."""
        if not self._finite(model):
            model.load_state_dict(self._before)
            self.finished = True
            return {"rolled_back": 1.0}
        loss, hits = torch.nanmean(records["unlearned"]), float(torch.nanmean(records["hit"]))
        self.finished = self.guarded and hits <= self.enough
        return {"unlearned": float(loss), "still_as_labeled": hits}

    def _finite(self, model: nn.Module) -> bool:
        """Whether weights, batch statistics and answers are numbers."""
        values = [value for value in model.state_dict().values() if value.is_floating_point()]
        if self._batch is not None:
            with undisturbed(model), torch.no_grad():
                values.append(forward(model, self._batch))
        return all(bool(value.isfinite().all()) for value in values)
