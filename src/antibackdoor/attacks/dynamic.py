"""Dynamic (input-aware): every sample has a trigger of its own, made by a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.generator import Generator
from antibackdoor.attacks.surrogate import (
    OwnTrigger,
    device_of,
    freeze,
    logits,
    pack,
    sample_rows,
    steadily,
    unpack,
    untouched,
)
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.seeds import derive
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import Objective, Step

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("dynamic", paper="Nguyen and Tran 2020, Input-aware dynamic backdoor attack")
@options
class Dynamic(OwnTrigger):
    """A trigger of its own for every sample, from a generator that is punished for repeating itself; poisoning version.

    `x' = x + m(x) (p(x) - x)`: a mask m in [0, 1], one channel for all, and a pattern p in the value range of each
    channel. First m is trained for sparseness, `100 relu(m - density)`, and variety, `|x - y| / |m(x) - m(y)|` over
    pairs of samples. Then p and a classifier, which starts from the clean surrogate, are trained together: a share of
    every batch carries its own trigger and the target label, an equal share the trigger of ANOTHER sample and its true
    label (cross samples), and p pays for `|x - y| / |p(x) - p(y)|`. The classifier is thrown away.
    `cover` is the share of cross samples in the poisoned set.
    Deviations: training starts from a clean classifier and is short; the networks are smaller and without batch norm.
    """

    density: Annotated[float | None, Field(gt=0, lt=1, description="share of a sample that the mask may take; none: "
                                           "0.032 of an image, 0.05 of a series")] = None  # fmt: skip
    width: Annotated[int, Field(ge=1, description="channels of the generators")] = 16
    share: Annotated[float, Field(gt=0, lt=0.5, description="of each batch: triggered, and as many crossed")] = 0.15
    variety: Annotated[float, Field(ge=0, description="weight of the price for repeating oneself")] = 1.0
    masking: Recipe = Recipe(epochs=2, min_steps=300, learning_rate=2e-3, weight_decay=0, augment="none")
    joint: Recipe = Recipe(epochs=10, min_steps=600, learning_rate=1e-3)

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, the mask, then pattern and classifier together."""
        surrogate, job = self.train_surrogate(job)
        spec, rows = clean.spec, sample_rows(job, self.samples)
        torch.manual_seed(derive(job.seed, "generators"))
        mask, pattern = (
            Generator(spec, outputs, self.width).normalized_as(surrogate).to(job.fabric.device)
            for outputs in (1, spec.shape[0])
        )
        ranges = _ranges(clean)
        density = self.density or (0.032 if spec.kind == "image" else 0.05)
        job.fit("mask", mask, Sparse(density, self.variety), self.masking, rows=rows, adam=True)
        objective = Together(self, freeze(mask), {key: value.to(job.fabric.device) for key, value in ranges.items()})
        pair = nn.ModuleDict({"classifier": surrogate.requires_grad_(True), "pattern": pattern})
        job.fit("pattern", pair, objective, self.joint, rows=rows, adam=True)
        return {**ranges, **pack("mask", mask), **pack("pattern", pattern)}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Each sample with its own trigger."""
        masks, patterns = self._made(x, spec, state, lengths)
        return x + masks * (patterns - x)

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Each sample with mask and pattern of its partner."""
        state = dict(state)
        partner, ends = state.pop("partner"), state.pop("partner_lengths", None)
        masks, patterns = self._made(partner, spec, state, ends)
        return x + masks * (patterns - x)

    def _made(self, x: Tensor, spec: Spec, state: State, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masks and patterns from the frozen generators."""
        mask = unpack("mask", state, untouched(lambda: Generator(spec, 1, self.width)))
        pattern = unpack("pattern", state, untouched(lambda: Generator(spec, spec.shape[0], self.width)))

        def made(draw: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
            with torch.no_grad():
                return steadily(draw, x, lengths, device_of(state))

        return made(lambda x, ends: masked(mask, x, ends)), made(lambda x, ends: drawn(pattern, x, ends, state))


def masked(mask: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Mask in [0, 1] `(n, 1, ...)`, steep between: `tanh(20 s - 10) / 2 + 1 / 2` of a sigmoid s; none in padding."""
    out = torch.tanh(20 * torch.sigmoid(mask(x, lengths).float()) - 10) / 2 + 0.5
    if lengths is not None:
        out = out * (torch.arange(x.shape[-1], device=x.device) < lengths[:, None])[:, None]
    return out


def drawn(pattern: nn.Module, x: Tensor, lengths: Tensor | None, ranges: State) -> Tensor:
    """Pattern in the range of each channel, `(n, C, ...)`."""
    low, high = ranges["low"], ranges["high"]
    return low + (high - low) * (torch.tanh(pattern(x, lengths).float()) / 2 + 0.5)


def _ranges(clean: Data) -> State:
    """Smallest and largest value of each channel, in the shape that broadcasts over samples."""
    channels, *extent = clean.spec.shape
    if clean.spec.kind == "image":
        low, high = torch.zeros(channels), torch.ones(channels)
    else:
        statistics = channel_statistics(clean)
        low, high = statistics["low"], statistics["high"]
    return {"low": low.view(-1, *[1] * len(extent)), "high": high.view(-1, *[1] * len(extent))}


def _sameness(x: Tensor, made: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """How far samples are apart, over how far what was made of them is; pairs: each with the next of the batch."""
    apart, different = (
        ((h - h.roll(1, 0)).flatten(1).square().mean(1) + 1e-8).sqrt() for h in (x / scale, made / scale)
    )
    return (apart / (different + 1e-2)).mean()


class Sparse(Objective):
    """The mask's training: under its density on the average, and different for different samples."""

    def __init__(self, density: float, variety: float):
        self.density, self.variety = density, variety

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Model is the mask's generator."""
        masks = masked(model, batch.x, batch.lengths)
        loss = 100 * (masks - self.density).relu().mean() + self.variety * _sameness(batch.x, masks)
        return Step(loss, {"mask": loss.detach().expand(len(masks)), "density": masks.detach().flatten(1).mean(1)})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss, and the mean share that the masks take."""
        return {"mask_loss": float(records["mask"].nanmean()), "density": float(records["density"].nanmean())}


class Together(Objective):
    """Cross entropy on triggered, cross and clean samples, and the price for patterns that repeat."""

    def __init__(self, attack: Dynamic, mask: nn.Module, ranges: State):
        self.attack, self.mask, self.ranges = attack, mask, ranges

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Model holds "classifier" and "pattern"; the first share of the batch is triggered, the second crossed."""
        networks = cast(nn.ModuleDict, model)
        x, lengths, count = batch.x, batch.lengths, max(1, round(self.attack.share * len(batch.x)))
        source = torch.arange(2 * count, device=x.device)
        source[count:] = (source[count:] + 1) % len(x)  # whose trigger each of them carries
        ends = None if lengths is None else lengths[source]
        masks = masked(self.mask, x[source], ends)
        patterns = drawn(networks["pattern"], x[source], ends, self.ranges)
        carried = x[: 2 * count] + masks * (patterns - x[: 2 * count])
        y = batch.y.clone()
        y[:count] = self.attack.target
        out = logits(networks["classifier"], torch.cat([carried, x[2 * count :]]), lengths)
        extent = self.ranges["high"] - self.ranges["low"]
        price = _sameness(x[source], patterns, torch.where(extent > 0, extent, 1))
        hits = torch.full((len(x),), torch.nan, device=x.device)
        hits[:count] = (out[:count].argmax(1) == self.attack.target).float()
        crossed = torch.full_like(hits, torch.nan)
        crossed[count : 2 * count] = (out.argmax(1) == y)[count : 2 * count].float()
        loss = F.cross_entropy(out, y) + self.attack.variety * price
        return Step(loss, {"main": loss.detach().expand(len(x)), "hits": hits, "crossed": crossed})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss, share of triggered samples that reach the target, and of cross samples that keep theirs."""
        names = {"main_loss": "main", "hits": "hits", "crossed": "crossed"}
        return {name: float(records[key].nanmean()) for name, key in names.items()}
