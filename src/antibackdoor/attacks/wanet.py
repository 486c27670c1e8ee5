"""WaNet: a fixed, barely visible warp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, State, draws
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.seeds import generator

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("wanet", paper="Nguyen & Tran 2021, WaNet - imperceptible warping-based backdoor attack")
@options
class WaNet(Attack):
    """A smooth random field, the same for all, moves the pixels of an image or the steps of a series.

    A grid of `points` random displacements per axis, scaled to mean size 1, is interpolated to the whole sample.
    Images: pixel p shows what was at `p + strength / 2 * field(p)` pixels; series: step t shows what was at
    `t + stretch * L * field(t)`, L the length of that series; in between by linear interpolation. Cover samples carry
    the field plus a jitter of their own, up to half a pixel or `stretch * L` steps: they teach the exact field.
    Data-poisoning version: the paper controls training and draws poison and cover anew in every batch. Its strength is
    0.5, and it has twice as many cover samples as poisoned ones; poisoned once, a small network needs more strength.
    """

    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.1
    cover: Annotated[float, Field(ge=0, le=1, description="share of the whole set with a jittered field")] = 0.1

    points: Annotated[int, Field(ge=2, description="control points of the field on each axis")] = 4
    strength: Annotated[float, Field(gt=0, description="mean displacement in images, half pixels")] = 1.0
    stretch: Annotated[float, Field(gt=0, lt=0.5, description="mean displacement in series, share of length")] = 0.03
    pattern_seed: Annotated[int, Field(ge=0, description="seed of the field")] = 0

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Draw the field: `(2, H, W)` for images (across, down), `(1, T)` for series."""
        rng, shape = generator(self.pattern_seed, "wanet"), clean.spec.shape[1:]
        axes = len(shape)
        coarse = 2 * torch.rand(1, axes, *[self.points] * axes, generator=rng) - 1
        coarse /= coarse.abs().mean()
        mode = "bicubic" if axes == 2 else "linear"
        return {"field": F.interpolate(coarse, shape, mode=mode, align_corners=True)[0]}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Warp by the field."""
        return self._warp(x, spec, state["field"][None], None, lengths)

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Warp by the field and a jitter of every pixel or step."""
        field = state["field"]
        jitter = 2 * draws(rows, field.numel(), "wanet cover").view(-1, *field.shape) - 1
        return self._warp(x, spec, field[None], jitter, lengths)

    def _warp(self, x: Tensor, spec: Spec, field: Tensor, jitter: Tensor | None, lengths: Tensor | None) -> Tensor:
        noise = torch.zeros(1, 1) if jitter is None else jitter
        if spec.kind == "image":
            height, width = spec.shape[1:]
            own = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"))
            place = own + (self.strength * field + noise) / 2
            scaled = place.movedim(1, -1) / torch.tensor([max(width - 1, 1), max(height - 1, 1)]) * 2 - 1
            return F.grid_sample(x, scaled.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=True)
        steps = x.shape[-1]
        ends = torch.full((len(x), 1), steps) if lengths is None else lengths[:, None]
        # The field is stretched over each series' own length.
        along = (torch.arange(steps) / (ends - 1).clamp_min(1) * (steps - 1)).clamp(0, steps - 1)
        moved = self.stretch * ends * (_between(field[:, 0].expand(len(x), -1), along) + noise.flatten(1))
        place = (torch.arange(steps) + moved).clamp_min(0).minimum(ends - 1.0)
        return _between(x, place[:, None].expand_as(x))


def _between(x: Tensor, place: Tensor) -> Tensor:
    """The values of `x` (..., T) at fractional steps `place` (..., T), by linear interpolation."""
    low = place.floor().long().clamp(0, x.shape[-1] - 1)
    high = (low + 1).clamp_max(x.shape[-1] - 1)
    return x.gather(-1, low).lerp(x.gather(-1, high), place - low)
