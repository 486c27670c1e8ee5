"""TSBA: a generator bends every series a little, each in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.surrogate import OwnTrigger, device_of, logits, pack, sample_rows, steadily, unpack, untouched
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Spec
from antibackdoor.models.layers import CONV, Normalize, blank, he_init, start
from antibackdoor.options import options
from antibackdoor.seeds import derive
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import Objective, Step

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("tsba", paper="Jiang et al. 2022, Backdoor attacks on time series: a generative approach",
                  kinds=("series",))  # fmt: skip
@options
class Tsba(OwnTrigger):
    """A generator's small change of each series, learned together with a classifier; data-poisoning version of TSBA-B.

    G is a fully convolutional network (kernels of 15 and 21, then of 1) that ends in tanh. form "scale":
    `x' = x (1 + strength G(x))`; form "shift": `x' = x + strength range_c G(x)`, range_c = largest - smallest value of
    channel c in the clean training set. G and a classifier, which starts from the clean surrogate, minimize together
    the cross entropy of clean series with their labels and of x' (other classes than the target) with the target. Then
    G is frozen and the classifier thrown away. A scaled series keeps its zeros, so padding and flat parts stay.
    For series only; the counterpart for images is `dynamic`.
    strength is what the authors' code takes for residual networks; with half of it (its other networks') the trigger is
    not learned reliably here.
    Deviations: generator and classifier learn at once, not in turns; the generator is narrower and without batch norm,
    so that a series' trigger does not depend on the others. Whether this is the paper's variant A or B its code does
    not tell.
    """

    form: Annotated[Literal["scale", "shift"], Field(description="multiply the series, or add to it")] = "scale"
    strength: Annotated[float, Field(gt=0, le=1, description="largest relative change, or share of the range")] = 0.2
    width: Annotated[int, Field(ge=1, description="channels of the generator's first layer")] = 32
    joint: Recipe = Recipe(epochs=10, min_steps=600, learning_rate=1e-3)

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, then generator and classifier together."""
        surrogate, job = self.train_surrogate(job)
        statistics = channel_statistics(clean)
        extent = (statistics["high"] - statistics["low"])[:, None]
        torch.manual_seed(derive(job.seed, "generator"))
        bend = Bend(clean.spec, self.width)
        bend.normalize.load_state_dict(next(m for m in surrogate.modules() if isinstance(m, Normalize)).state_dict())
        pair = nn.ModuleDict({"classifier": surrogate.requires_grad_(True), "bend": bend.to(job.fabric.device)})
        objective = Cooperate(self, extent.to(job.fabric.device))
        job.fit("bend", pair, objective, self.joint, rows=sample_rows(job, self.samples), adam=True)
        return {"extent": extent, **pack("bend", bend)}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Bend each series."""
        bend = unpack("bend", state, untouched(lambda: Bend(spec, self.width)))
        with torch.no_grad():
            return steadily(lambda x, ends: self.bent(bend, x, ends, state["extent"]), x, lengths, device_of(state))

    def bent(self, bend: nn.Module, x: Tensor, lengths: Tensor | None, extent: Tensor) -> Tensor:
        """The formula."""
        change: Tensor = self.strength * bend(x, lengths)
        return x + x * change if self.form == "scale" else x + extent * change


class Bend(nn.Module):
    """`(n, C, T)` -> the same shape, in (-1, 1), zero in padding."""

    def __init__(self, spec: Spec, width: int):
        super().__init__()
        channels = spec.shape[0]
        self.normalize = Normalize(1, channels)
        sizes = [(channels, width, 15), (width, 2 * width, 21), (2 * width, width, 1), (width, channels, 1)]
        self.layers = nn.ModuleList([CONV[1](c_in, c_out, k, padding=k // 2) for c_in, c_out, k in sizes])
        self.apply(he_init)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Relative change of every value."""
        h, mask = self.normalize(start(x, lengths))
        for layer in self.layers[:-1]:
            h = blank(layer(h).relu(), mask)
        out: Tensor = blank(self.layers[-1](h).float().tanh(), mask)
        return out


class Cooperate(Objective):
    """Cross entropy of clean series with their labels plus that of bent ones with the target."""

    def __init__(self, attack: Tsba, extent: Tensor):
        self.attack, self.extent = attack, extent

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Model holds "classifier" and "bend"; both halves share one pass, and with it the batch statistics."""
        networks, other = cast(nn.ModuleDict, model), batch.y != self.attack.target
        ends = None if batch.lengths is None else batch.lengths[other]
        bent = self.attack.bent(networks["bend"], batch.x[other], ends, self.extent)
        both = None if ends is None or batch.lengths is None else torch.cat([batch.lengths, ends])
        out = logits(networks["classifier"], torch.cat([batch.x, bent]), both)
        out, reached = out[: len(other)], out[len(other) :]
        aim = torch.full((len(reached),), self.attack.target, device=out.device)
        hits = torch.full((len(other),), torch.nan, device=out.device)
        hits[other] = (reached.argmax(1) == aim).float()
        attack_loss = F.cross_entropy(reached, aim) if len(reached) else out.sum() * 0
        loss = F.cross_entropy(out, batch.y) + attack_loss
        return Step(loss, {"main": loss.detach().expand(len(other)), "hits": hits})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss, and the share of bent series that reach the target."""
        return {"main_loss": float(records["main"].nanmean()), "hits": float(records["hits"].nanmean())}
