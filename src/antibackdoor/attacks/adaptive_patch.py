"""Adaptive Patch: one of several faint patches in training, all of them at test time, and cover samples."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, State
from antibackdoor.attacks.several import Several
from antibackdoor.data.core import Spec
from antibackdoor.options import options


@ATTACKS.register("adaptive_patch", paper="Qi et al. 2023, Revisiting the assumption of latent separability")
@options
class AdaptivePatch(Several):
    """`count` patches with ONE target: every training sample carries one of them, a test sample all, at full strength.

    In training a patch is blended in with weight `opacity`. The paper's rate is 0.3 % of the set, and 0.6 % cover; its
    patches are pictures of different sizes and weights.
    """

    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.003
    cover: Annotated[float, Field(ge=0, le=1, description="share of the set triggered with its true label")] = 0.006

    count: Annotated[int, Field(ge=2, le=8, description="number of patches")] = 4
    opacity: Annotated[float, Field(gt=0, le=1, description="weight of a patch in training")] = 0.5

    own_targets: ClassVar[bool] = False

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Stamp all patches."""
        for k in range(self.count):
            x = self.stamp(x, spec, state, torch.full_like(rows, k), lengths)
        return x

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Blend in the sample's patch."""
        return x.lerp(self.stamp(x, spec, state, self.which(rows), lengths), self.opacity)
