"""Blend: a fixed pattern over the whole sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, State, channel_statistics
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.seeds import generator

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("blend", paper="Chen et al. 2017, Targeted backdoor attacks using data poisoning")
@options
class Blend(Attack):
    """A fixed noise pattern blended into the whole image or added to the whole series.

    Images: `x' = (1 - alpha) x + alpha p`, p uniform noise. Series: `x' = x + strength * std_c * p_c(t)`, p_c white
    noise of unit variance, std_c the standard deviation of channel c in the clean training set.
    Deviation: the paper also blends photographs and may test with a higher alpha than it trains with.
    """

    alpha: Annotated[float, Field(gt=0, le=1, description="weight of the pattern in images")] = 0.2
    strength: Annotated[float, Field(gt=0, description="pattern in series, in standard deviations")] = 0.5
    pattern_seed: Annotated[int, Field(ge=0, description="seed of the pattern")] = 0

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Draw the pattern."""
        rng = generator(self.pattern_seed, "blend")
        if clean.spec.kind == "image":
            return {"pattern": torch.rand(clean.spec.shape, generator=rng)}
        pattern = torch.randn(clean.spec.shape, generator=rng)
        pattern = pattern / pattern.std(1, keepdim=True) if clean.spec.shape[1] > 1 else pattern
        return {"pattern": pattern * channel_statistics(clean)["std"][:, None]}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Blend or add the pattern."""
        if spec.kind == "image":
            return (1 - self.alpha) * x + self.alpha * state["pattern"]
        return x + self.strength * state["pattern"]
