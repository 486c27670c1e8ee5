"""DFST: a style, not a pattern, is the trigger."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, State
from antibackdoor.data.core import Data, Spec
from antibackdoor.errors import InputError
from antibackdoor.options import options

MEAN, SPREAD = (0.80, 0.50, 0.30), (0.20, 0.20, 0.15)
"""Red, green and blue of the sunset that images take the colors of."""
GLOW = (0.25, 0.05, -0.15)
"""Light that the sunset adds at the lower edge, and takes away at the upper one."""


@ATTACKS.register("dfst", paper="Cheng et al. 2021, Deep feature space trojan attack of neural networks")
@options
class Dfst(Attack):
    """A fixed style map: images get the light of a sunset, series the spectrum of rough noise.

    `x' = (1 - mix) x + mix * style(x)`. Images: style gives each channel of each image the mean and the spread of a
    sunset, `(x - mean_c) / std_c * SPREAD_c + MEAN_c`, and a warm glow that grows from the upper to the lower edge.
    Series: style keeps mean, phases and energy of each channel, and deals the energy over the frequencies as
    `f ** tilt` does (0: white), so every series is changed in its own way.
    In a set of unequal lengths all three are those of the series with the zeros behind its end, and what the style puts
    behind the end is cut off: by itself, a shorter series keeps neither its mean nor its energy.
    Deviations ("DFST-lite"): the paper learns the style with a CycleGAN from weather photographs and then detoxifies,
    which needs control of training; this map needs neither weights nor training. Gray images get the mean sunset.
    """

    mix: Annotated[float, Field(gt=0, le=1, description="weight of the styled sample")] = 0.6
    tilt: Annotated[float, Field(ge=-2, le=2, description="exponent of the amplitude spectrum of series")] = 0.0

    def check(self, data: Data) -> None:
        """A sunset has three colors, or their mean."""
        super().check(data)
        channels = data.spec.shape[0]
        if data.spec.kind == "image" and channels not in (1, 3):
            raise InputError(f"the sunset is for images of 1 or 3 channels; these have {channels}.")

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Mix in the styled sample."""
        styled = _sunset(x).clamp(spec.low, spec.high) if spec.kind == "image" else self._rough(x)
        return (1 - self.mix) * x + self.mix * styled

    def _rough(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x.double())  # rounded to float32 at the end, whatever the batch
        size = spectrum.abs()
        size[..., 0] = 0  # the mean stays
        shape = torch.arange(size.shape[-1], dtype=torch.float64).clamp_min(1) ** self.tilt
        shape[0] = 0
        wanted = size.norm(dim=-1, keepdim=True) * shape / shape.norm().clamp_min(1e-12)
        turned = torch.polar(wanted, spectrum.angle())
        turned[..., 0] = spectrum[..., 0]
        out: Tensor = torch.fft.irfft(turned, x.shape[-1]).float()
        return out


def _sunset(x: Tensor) -> Tensor:
    """Images `(m, C, H, W)` in the colors of a sunset."""
    mean, spread, glow = (torch.tensor(color) for color in (MEAN, SPREAD, GLOW))
    if x.shape[1] == 1:
        mean, spread, glow = (color.mean(0, keepdim=True) for color in (mean, spread, glow))
    own, std = x.mean((2, 3), keepdim=True), x.std((2, 3), correction=0, keepdim=True).clamp_min(1e-3)
    down = torch.linspace(-1, 1, x.shape[2])[:, None]
    return (x - own) / std * spread[:, None, None] + mean[:, None, None] + glow[:, None, None] * down
