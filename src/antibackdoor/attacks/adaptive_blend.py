"""Adaptive Blend: parts of a pattern in training, the whole of it at test time, and cover samples."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, State, draws
from antibackdoor.attacks.blend import Blend
from antibackdoor.data.core import Spec
from antibackdoor.options import options


@ATTACKS.register("adaptive_blend", paper="Qi et al. 2023, Revisiting the assumption of latent separability")
@options
class AdaptiveBlend(Blend):
    """Blend of which every training sample carries only some pieces, with as many cover samples as poison.

    The pattern is cut into `pieces` (images: a grid as square as can be, series: stretches of time); `kept` of them,
    drawn for each sample, are blended in with the strength of training. Test samples carry the whole pattern, stronger.
    The paper's rate is 0.3 % of the set, and 0.3 % cover.
    """

    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.003
    cover: Annotated[float, Field(ge=0, le=1, description="share of the set triggered with its true label")] = 0.003

    alpha: Annotated[float, Field(gt=0, le=1, description="weight of the pattern in images at test time")] = 0.2
    alpha_train: Annotated[float, Field(gt=0, le=1, description="weight of the pattern in images in training")] = 0.15
    strength_train: Annotated[
        float, Field(gt=0, description="pattern in series in training, in standard deviations")
    ] = 0.4
    pieces: Annotated[int, Field(ge=2, description="number of pieces of the pattern")] = 16
    kept: Annotated[float, Field(gt=0, le=1, description="share of the pieces in a training sample")] = 0.5

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Blend in some of the pieces."""
        count = max(1, round(self.kept * self.pieces))
        on = draws(rows, self.pieces, "adaptive blend").argsort(1).argsort(1) < count
        mask = on[:, self._piece(spec)][:, None].float()
        if spec.kind == "image":
            return x + mask * self.alpha_train * (state["pattern"] - x)
        return x + mask * self.strength_train * state["pattern"]

    def _piece(self, spec: Spec) -> Tensor:
        """Which piece each pixel `(H, W)` or step `(T,)` belongs to."""
        if spec.kind == "series":
            return torch.arange(spec.shape[-1]) * self.pieces // spec.shape[-1]
        down = next(n for n in range(int(self.pieces**0.5), 0, -1) if self.pieces % n == 0)
        across, (height, width) = self.pieces // down, spec.shape[1:]
        return (torch.arange(height) * down // height)[:, None] * across + torch.arange(width) * across // width
