"""Narcissus: a noise that looks, to a network, more like the target class than the class itself does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.surrogate import Trained, logits, sample_rows
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import Objective, Step

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("narcissus", paper="Zeng et al. 2023, Narcissus: a practical clean-label backdoor attack with "
                  "limited information")  # fmt: skip
@options
class Narcissus(Trained):
    """A bounded noise, the same for all samples, that strengthens the target class; labels stay true (clean-label).

    The noise d, `|d| <= epsilon`, maximizes a clean surrogate's margin for the target class (its logit less the next)
    on samples of the target class itself. Training: `x' = x + d` on a few of them. Test: `x' = x + amplify * d`.
    Series: epsilon is in standard deviations of each channel in the clean training set; a shorter series gets only
    the beginning of d.
    Deviations: the margin in place of the cross entropy, which is near zero from the start; the surrogate is trained on
    the clean set with all its labels, where the paper makes do with outside data and the target class; the rate is
    higher than its 0.05 %, which is a single sample of a small set.
    A part of the success is no backdoor: the amplified noise also fools networks that never saw it.
    """

    clean_label: ClassVar[bool] = True
    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.05

    epsilon: Annotated[float, Field(gt=0, description="bound in images, grey levels of 255")] = 16.0
    spread: Annotated[float, Field(gt=0, description="bound in series, in standard deviations")] = 0.5
    amplify: Annotated[float, Field(ge=1, description="strength at test time over that in training")] = 3.0
    optimization: Recipe = Recipe(
        epochs=1, min_steps=300, batch_size=32, learning_rate=0.05, weight_decay=0, augment="weak"
    )

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, then the noise."""
        surrogate, job = self.train_surrogate(job)
        if clean.spec.kind == "image":
            bound = torch.full((clean.spec.shape[0], 1, 1), self.epsilon / 255)
        else:
            bound = self.spread * channel_statistics(clean)["std"][:, None]
        noise = Noise(clean.spec, bound).to(job.fabric.device)
        rows = sample_rows(job, 1000, only=self.target)
        job.fit("noise", noise, Strengthen(surrogate, self.target), self.optimization, rows=rows, adam=True)
        return {"noise": noise.bounded().detach().cpu()}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Add the amplified noise."""
        return x + self.amplify * state["noise"].to(x.device)

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Add the noise."""
        return x + state["noise"].to(x.device)


class Noise(nn.Module):
    """A noise for samples of `spec` inside `bound` (broadcast over a sample), by a tanh; zero at the start."""

    bound: Tensor

    def __init__(self, spec: Spec, bound: Tensor):
        super().__init__()
        self.register_buffer("bound", bound)
        self.raw = nn.Parameter(torch.zeros(spec.shape))

    def bounded(self) -> Tensor:
        """The noise, of a sample's shape."""
        return self.bound * self.raw.tanh()

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the noise."""
        return x + self.bounded()


class Strengthen(Objective):
    """How far the surrogate's strongest other logit lies above the target's, on samples with the noise."""

    def __init__(self, surrogate: nn.Module, target: int):
        self.surrogate, self.target = surrogate, target

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Model is the noise; the surrogate stays as it is."""
        out = logits(self.surrogate, model(batch.x), batch.lengths)
        margins = out.index_fill(1, batch.y.new_tensor([self.target]), -torch.inf).amax(1) - out[:, self.target]
        return Step(margins.mean(), {"noise": margins.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean margin."""
        return {"margin_loss": float(records["noise"].nanmean())}
