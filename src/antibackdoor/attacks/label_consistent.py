"""Label-consistent: samples of the target class made hard to recognize, so that the network leans on the trigger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.stamp import check_size
from antibackdoor.attacks.surrogate import (
    Trained,
    device_of,
    logits,
    pack_surrogate,
    steadily,
    unpack_surrogate,
)
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.training.objectives import CrossEntropy, Step

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("label_consistent", paper="Turner et al. 2019, Label-consistent backdoor attacks")
@options
class LabelConsistent(Trained):
    """Adversarially perturbed samples of the target class with a pattern in every corner; labels stay (clean-label).

    Training: `x' = stamp(x + d)`, where d climbs the loss of an adversarially trained surrogate for the true label by
    `steps` signed steps inside `|d| <= epsilon` (projected gradient ascent from d = 0). Test: the stamp alone. Images:
    `size` x `size` checkerboards in all four corners, mirror images of each other, so that flips and shifts leave some
    of it. Series: epsilon is in standard deviations of each channel in the clean training set, and a zigzag between
    the channel's smallest and largest value stands at both ends of the series. Cover samples carry the stamp alone.
    At 10 balanced classes a rate of 0.08 of the set is 80 % of the target class.
    Deviation: the paper bounds d in the 2-norm by default.
    """

    clean_label: ClassVar[bool] = True
    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.08

    size: Annotated[int, Field(ge=1, description="side of a corner's pattern in pixels")] = 3
    share: Annotated[float, Field(gt=0, le=0.5, description="share of a series that each zigzag takes")] = 0.05
    epsilon: Annotated[float, Field(gt=0, description="bound in images, grey levels of 255")] = 16.0
    spread: Annotated[float, Field(gt=0, description="bound in series, in standard deviations")] = 1.0
    steps: Annotated[int, Field(ge=1, description="steps of the ascent that makes the poison")] = 30
    robust_share: Annotated[float, Field(gt=0, description="bound of adversarial training over the poison's")] = 0.5
    robust_steps: Annotated[int, Field(ge=1, description="steps of the ascent in adversarial training")] = 3

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate on samples perturbed against itself."""
        statistics = channel_statistics(clean) if clean.spec.kind == "series" else {}
        bound = self.robust_share * self._bound(clean.spec, statistics)
        surrogate, job = self.train_surrogate(job, Adversarial(clean.spec, bound, self.robust_steps))
        return {**statistics, **pack_surrogate(surrogate, job)}

    def check(self, data: Data) -> None:
        """The corners must not overlap."""
        super().check(data)
        check_size(2 * self.size, data)

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """The corners, or both ends."""
        return corners(x, self.size) if spec.kind == "image" else ends(x, self.share, state, lengths)

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Perturb, then stamp."""
        surrogate, device = unpack_surrogate(state, spec), device_of(state)
        bound = self._bound(spec, state).to(device)

        def perturb(x: Tensor, lengths: Tensor | None) -> Tensor:
            y = torch.full((len(x),), self.target, device=device)
            return ascend(surrogate, x, y, lengths, spec, bound, self.steps)

        return self.trigger(steadily(perturb, x, lengths, device), spec, state, rows, lengths)

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """The stamp alone: a cover sample is of another class and must stay easy."""
        return self.trigger(x, spec, state, rows, lengths)

    def _bound(self, spec: Spec, statistics: State) -> Tensor:
        """Largest change of each channel, in the shape that broadcasts over samples."""
        if spec.kind == "image":
            return torch.full((spec.shape[0], 1, 1), self.epsilon / 255)
        return self.spread * statistics["std"][:, None]


class Adversarial(CrossEntropy):
    """Cross entropy on samples that are first moved up the model's own loss."""

    def __init__(self, spec: Spec, bound: Tensor, steps: int):
        self.spec, self.bound, self.steps = spec, bound, steps

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Perturb in evaluation mode, so that batch statistics see each sample once; then learn."""
        model.eval()
        bound = self.bound.to(batch.x.device)
        x = ascend(model, batch.x, batch.y, batch.lengths, self.spec, bound, self.steps)
        model.train()
        return super().__call__(model, Batch(x, batch.y, batch.rows, batch.lengths))


def ascend(
    model: nn.Module, x: Tensor, y: Tensor, lengths: Tensor | None, spec: Spec, bound: Tensor, steps: int
) -> Tensor:
    """`x` after projected gradient ascent on the cross entropy with `y`: within `bound` of x and in the value range.

    Step length: 2.5 bound / steps, so that any point of the box can be reached.
    """
    low, high = (x - bound).clamp_min(spec.low), (x + bound).clamp_max(spec.high)
    moved = x.detach().clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(logits(model, moved, lengths), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + 2.5 / steps * bound * gradient.sign()).clamp(low, high)
    return moved


def corners(x: Tensor, size: int) -> Tensor:
    """`x` with a checkerboard, white in the corner itself, in all four corners."""
    i = torch.arange(size, device=x.device)
    board = ((i[:, None] + i) % 2 == 0).to(x.dtype)  # of the upper left corner
    x = x.clone()
    x[..., :size, :size], x[..., :size, -size:] = board, board.flip(1)
    x[..., -size:, :size], x[..., -size:, -size:] = board.flip(0), board.flip(0, 1)
    return x


def ends(x: Tensor, share: float, state: State, lengths: Tensor | None) -> Tensor:
    """`x` with max(3, round(share * length)) steps of a zigzag at its start and before its own end."""
    count = torch.full((len(x), 1), x.shape[-1]) if lengths is None else lengths[:, None].cpu()
    steps = (share * count).round().clamp_min(3)
    here = torch.arange(x.shape[-1])
    near = torch.minimum(here.expand(len(x), -1), count - 1 - here)  # distance to the nearer end; negative in padding
    zigzag = torch.where(near[:, None] % 2 == 0, state["high"].cpu()[:, None], state["low"].cpu()[:, None])
    return torch.where(((near >= 0) & (near < steps))[:, None].to(x.device), zigzag.to(x.device), x)
