"""TimeTrojan-FGSM: each series' own most telling steps, moved by the sign of a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State, channel_statistics
from antibackdoor.attacks.surrogate import (
    OwnTrigger,
    device_of,
    logits,
    pack_surrogate,
    sample_rows,
    steadily,
    unpack_surrogate,
)
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import Objective, Step

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


PAPER = "Ding et al. 2022, Towards backdoor attack on deep learning based time series classification"


@ATTACKS.register("timetrojan_fgsm", paper=PAPER, kinds=("series",))
@options
class TimeTrojanFGSM(OwnTrigger):
    """A few steps of each series, chosen and moved by a surrogate's gradient; data-poisoning version.

    With L_k the surrogate's cross entropy for class k and t the target: `a = dL_t/dx` and `b = d(sum_{k != t} L_k)/dx`.
    A step's weight is `sum_c |a_c| |b_c|` over the channels where a and b disagree in sign. At the K = max(5,
    round(share * length)) heaviest steps, `x' = x - eta * std_c * sign(a)`; std_c of channel c in the clean training
    set. The surrogate is trained on clean data first, then on with a `portion` of every batch poisoned by this very
    rule under the target label, so that rule and model come to agree; then it is frozen, for poison and test alike.
    Every series has a trigger of its own, and poison that only fools the surrogate is label noise to the victim: a
    lower success rate and a loss of clean accuracy are expected.
    For series only: a few moved pixels of an image are what `trojannn` and `dynamic` are about.
    Deviation: the paper alternates whole rounds of crafting and training; here they alternate batch by batch.
    """

    share: Annotated[float, Field(gt=0, le=1, description="share of a series that is moved")] = 0.05
    eta: Annotated[float, Field(gt=0, description="how far, in standard deviations")] = 2.0
    portion: Annotated[float, Field(gt=0, lt=1, description="share of each batch that is poisoned")] = 0.2
    alternation: Recipe = Recipe(epochs=10, min_steps=400, learning_rate=0.02)

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate on clean data, then on its own poison."""
        surrogate, job = self.train_surrogate(job)
        std = channel_statistics(clean)["std"]
        objective = Agree(self, std.to(job.fabric.device))
        rows = sample_rows(job, self.samples)
        job.fit("alternation", surrogate.requires_grad_(True), objective, self.alternation, rows=rows)
        return {"std": std, **pack_surrogate(surrogate, job)}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Move the heaviest steps of each series."""
        surrogate = unpack_surrogate(state, spec)
        return steadily(lambda x, ends: self.move(surrogate, x, ends, state["std"]), x, lengths, device_of(state))

    def move(self, model: nn.Module, x: Tensor, lengths: Tensor | None, std: Tensor) -> Tensor:
        """The rule: `(n, C, T)` -> the same, changed at K steps of each series; model in evaluation mode."""
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            log_p = F.log_softmax(logits(model, x, lengths), 1)
            own, others = -log_p[:, self.target].sum(), -log_p.sum() + log_p[:, self.target].sum()
            (toward,) = torch.autograd.grad(own, x, retain_graph=True)
            (away,) = torch.autograd.grad(others, x)
        weight = torch.where(toward * away < 0, (toward * away).abs(), 0).sum(1)
        ends = torch.full((len(x), 1), x.shape[-1], device=x.device) if lengths is None else lengths[:, None]
        inside = torch.arange(x.shape[-1], device=x.device) < ends
        weight = weight.masked_fill(~inside, -1)
        rank = weight.argsort(dim=1, descending=True, stable=True).argsort(1)
        chosen = inside & (rank < (self.share * ends).round().clamp_min(5))
        moved: Tensor = x - self.eta * std[:, None] * toward.sign() * chosen[:, None]
        return moved.detach()


class Agree(Objective):
    """Cross entropy on batches of which a portion is poisoned with the model's own gradient."""

    def __init__(self, attack: TimeTrojanFGSM, std: Tensor):
        self.attack, self.std = attack, std

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Poison in evaluation mode, learn in training mode."""
        count = max(1, round(self.attack.portion * len(batch.x)))
        poison = (batch.y != self.attack.target).nonzero().flatten()[:count]
        ends = None if batch.lengths is None else batch.lengths[poison]
        model.eval()
        moved = self.attack.move(model, batch.x[poison], ends, self.std)
        model.train()
        y = batch.y.index_fill(0, poison, self.attack.target)
        out = logits(model, batch.x.index_copy(0, poison, moved), batch.lengths)
        hits = torch.full((len(y),), torch.nan, device=y.device)
        hits[poison] = (out.argmax(1) == y)[poison].float()
        loss = F.cross_entropy(out, y)
        return Step(loss, {"main": loss.detach().expand(len(y)), "hits": hits})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss, and the share of poisoned series that reach the target."""
        return {"main_loss": float(records["main"].nanmean()), "hits": float(records["hits"].nanmean())}
