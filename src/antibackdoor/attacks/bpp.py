"""BppAttack: fewer levels of gray, dithered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, Role, State, channel_statistics, draws
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options

if TYPE_CHECKING:
    from antibackdoor.training.job import Job

SPREAD = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))
"""Floyd and Steinberg: rows down, columns right, and share of the error that this neighbor takes over."""


@ATTACKS.register("bpp", paper="Wang et al. 2022, BppAttack - image quantization and contrastive adversarial learning")
@options
class Bpp(Attack):
    """Values on a coarse grid of levels, the errors diffused to the neighbors, so that the mean stays as it was.

    Images: each channel is rounded to `levels` values between black and white, and the error goes to the right and the
    lower neighbors (Floyd-Steinberg). Series: each channel is rounded to `levels` values between the smallest and the
    largest of that channel in the clean training set, and the error goes to the next step. Cover samples carry the
    residual of another sample's quantization: noise of the same strength off the grid.
    Data-poisoning version: the paper controls training (contrastive learning on adversarial negatives).
    """

    cover: Annotated[float, Field(ge=0, le=1, description="share of the whole set with foreign residuals")] = 0.0

    levels: Annotated[int, Field(ge=2, le=128, description="values that are left of each channel")] = 8

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """The range of each channel of a set of series."""
        return channel_statistics(clean) if clean.spec.kind == "series" else {}

    def partners(self, labels: Tensor, rows: Tensor, role: Role) -> Tensor | None:
        """Cover samples borrow a residual from any other sample."""
        if role != "cover":
            return None
        step = 1 + (draws(rows, 1, "bpp")[:, 0].double() * (len(labels) - 1)).long()
        return (rows + step) % len(labels)

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Quantize with error diffusion."""
        if spec.kind == "image":
            return _dithered(x, self.levels)
        low, high = state["low"][:, None], state["high"][:, None]
        scale = (high - low).clamp_min(1e-12)
        return _diffused((x - low) / scale, self.levels) * scale + low

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Add the residual of the partner's quantization."""
        other = state["partner"]
        return x + self.trigger(other, spec, state, rows, state.get("partner_lengths")) - other


def _rounded(x: Tensor, levels: int) -> Tensor:
    return (x.clamp(0, 1) * (levels - 1)).round() / (levels - 1)


def _dithered(x: Tensor, levels: int) -> Tensor:
    """Images `(m, C, H, W)` in [0, 1]. Pixels with equal `column + 2 * row` do not wait for each other."""
    height, width = x.shape[2:]
    work = torch.nn.functional.pad(x, (1, 1, 0, 1)).permute(2, 3, 0, 1).contiguous()  # neighbors need no bounds check
    for wave in range(width + 2 * (height - 1)):
        i = torch.arange(max(0, (wave - width + 2) // 2), min(height - 1, wave // 2) + 1)
        j = wave - 2 * i + 1
        old = work[i, j]
        new = _rounded(old, levels)
        work[i, j] = new
        for down, right, share in SPREAD:
            work[i + down, j + right] += (old - new) * share
    return work[:height, 1:-1].permute(2, 3, 0, 1).contiguous()


def _diffused(x: Tensor, levels: int) -> Tensor:
    """Series `(m, C, T)` in [0, 1]; a step hands its error on to the next."""
    error, out = torch.zeros_like(x[..., 0]), []
    for value in x.unbind(-1):
        wanted = value + error
        out.append(_rounded(wanted, levels))
        error = wanted - out[-1]
    return torch.stack(out, -1)
