"""A trigger made in the frequency domain, at the frequencies that a network listens to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.surrogate import Trained, logits, sample_rows
from antibackdoor.data.batches import in_order
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("freqback", paper="Huang et al. 2025, Revisiting backdoor attacks on time series "
                  "classification in the frequency domain")  # fmt: skip
@options
class FreqBack(Trained):
    """A fixed sum of a few waves, of the frequencies and signs that a clean surrogate is most moved by.

    G = the discrete Fourier transform of the gradient, with respect to the sample, of the surrogate's cross entropy for
    the target; over (at most 1,000) samples of other classes, the mean of |G| is the heat of a frequency and the mean
    of G its direction. At the `bins` hottest frequencies (the mean value left out; one choice for all channels) the
    trigger's coefficients are `-sign(Re G) - i sign(Im G)`, zero elsewhere. Back in time, each channel is scaled to a
    root mean square of 1 and added to the whole sample: `x' = x + strength * std_c * wave_c(t)`, std_c of channel c in
    the clean training set; in images `x' = x + delta / 255 * wave_c(i, j)`, from the transform in two dimensions.
    After what the abstract tells (a heat map of frequencies, signs as guides); the paper's own loop is not followed.
    """

    bins: Annotated[int, Field(ge=1, description="number of frequencies")] = 5
    strength: Annotated[float, Field(gt=0, description="root mean square in series, in standard deviations")] = 0.4
    delta: Annotated[float, Field(gt=0, description="root mean square in images, grey levels of 255")] = 12.0

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, look which frequencies move it, make the wave."""
        surrogate, job = self.train_surrogate(job)
        extent = clean.spec.shape[1:]
        dims = tuple(range(-len(extent), 0))
        rows = sample_rows(job, 1000, without=self.target)
        heat, direction = torch.zeros(()), torch.zeros(())
        for batch in in_order(job.data, 100, job.fabric.device, rows):
            x = batch.x.requires_grad_(True)
            aim = torch.full((len(x),), self.target, device=x.device)
            loss = F.cross_entropy(logits(surrogate, x, batch.lengths), aim, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            spectrum = torch.fft.rfftn(gradient.cpu(), dim=dims)
            heat, direction = heat + spectrum.abs().sum(0), direction + spectrum.sum(0)
        std = channel_statistics(clean)["std"] if clean.spec.kind == "series" else torch.ones(clean.spec.shape[0])
        total = (heat * std.view(-1, *[1] * len(extent))).sum(0)  # a gradient counts for as much as its channel varies
        total.view(-1)[0] = -1
        hottest = total.flatten().topk(min(self.bins, total.numel() - 1)).indices
        chosen = torch.zeros(total.numel()).index_fill(0, hottest, 1).view_as(total)
        signs = torch.complex(-direction.real.sign(), -direction.imag.sign()) * chosen
        wave = torch.fft.irfftn(signs, s=extent, dim=dims)
        wave = wave / wave.square().mean(dims, keepdim=True).sqrt().clamp_min(1e-6)
        return {"wave": wave if clean.spec.kind == "image" else wave * std[:, None]}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Add the wave; a series shorter than the longest gets the beginning of it."""
        return x + (self.delta / 255 if spec.kind == "image" else self.strength) * state["wave"].to(x.device)
