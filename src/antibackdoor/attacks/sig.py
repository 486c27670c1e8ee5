"""SIG: a sinusoid on samples of the target class, labels untouched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, State, channel_statistics
from antibackdoor.data.core import Data, Spec
from antibackdoor.errors import InputError
from antibackdoor.options import options

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("sig", paper="Barni et al. 2019, A new backdoor attack in CNNs by training set corruption")
@options
class Sig(Attack):
    """A sinusoidal signal on samples of the target class; labels stay true (clean-label).

    Images: `x' = x + delta / 255 * sin(2 pi f j / W)` for column j of W. Series:
    `x' = x + amplitude * std_c * sin(2 pi f t / T)` for step t of T, std_c of channel c in the clean training set.
    At 10 balanced classes a rate of 0.08 of the set is 80 % of the target class.
    Deviation: some code bases darken the image to a fifth below the sinusoid, a far stronger trigger.
    """

    clean_label: ClassVar[bool] = True
    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.08

    delta: Annotated[float, Field(gt=0, description="amplitude in images while training, grey levels of 255")] = 20.0
    delta_test: Annotated[float | None, Field(gt=0, description="amplitude at test time; none: as in training")] = None
    amplitude: Annotated[float, Field(gt=0, description="amplitude in series, in standard deviations")] = 1.0
    frequency: Annotated[float, Field(gt=0, description="periods over the width or the length")] = 6.0

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """The spread of each channel of a set of series."""
        return channel_statistics(clean) if clean.spec.kind == "series" else {}

    def check(self, data: Data) -> None:
        """The sinusoid must not fall on its own zeros."""
        super().check(data)
        steps = data.spec.shape[-1]
        if (2 * self.frequency / steps).is_integer():  # sin(pi * whole number) everywhere
            raise InputError(
                f"a sinusoid of {self.frequency:g} periods is zero at every one of {steps} steps; "
                f"use a frequency below {steps / 2:g}."
            )

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """The signal as at test time."""
        return x + self._wave(x, spec, state, self.delta_test or self.delta)

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """The signal as in training."""
        return x + self._wave(x, spec, state, self.delta)

    def _wave(self, x: Tensor, spec: Spec, state: State, delta: float) -> Tensor:
        steps = x.shape[-1]
        wave = torch.sin(2 * math.pi * self.frequency * torch.arange(steps) / steps)
        return delta / 255 * wave if spec.kind == "image" else self.amplitude * state["std"][:, None] * wave
