"""ANP: prune the neurons that react most to small changes of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, snapshot
from antibackdoor.defenses.none import trained, without_suspects
from antibackdoor.errors import InputError
from antibackdoor.models.blocks import call
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe, Repair
from antibackdoor.training.objectives import Objective, Step

Noise = list[tuple[Tensor, Tensor]]
"""For each layer, relative changes of its weight and of its bias, `(channels,)` each."""


def neurons(model: nn.Module) -> list[str]:
    """Layers whose channels are masked: batch norms with weights; without any, convolutions; else linear layers."""
    kinds: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd, nn.Linear)
    for kind in kinds:
        found = [name for name, m in model.named_modules() if isinstance(m, kind) and m.weight is not None]
        found = found[:-1] if kind is nn.Linear else found  # the last linear layer's channels are the classes
        if found:
            return found
    raise InputError("this model has no batch norm, convolution or hidden linear layer whose neurons could be pruned.")


class Masked(nn.Module):
    """A network whose neurons are scaled by masks (all that is trained) and shaken by noise.

    `weight * (mask + noise_w)` and `bias * (1 + noise_b)` for every channel of the masked layers.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.layers = model, neurons(model)
        self.masks = nn.ParameterList([torch.ones(len(w), device=w.device) for w in map(self._weight, self.layers)])

    def forward(self, x: Tensor, lengths: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Logits `(n, K)`."""
        changed: dict[str, Tensor] = {}
        for i, (name, mask) in enumerate(zip(self.layers, self.masks, strict=True)):
            scale = mask if noise is None else mask + noise[i][0]
            weight, bias = self._weight(name).detach(), self.model.get_submodule(name).bias
            changed[f"{name}.weight"] = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            if isinstance(bias, Tensor) and noise is not None:
                changed[f"{name}.bias"] = bias.detach() * (1 + noise[i][1])
        return call(self.model, x, lengths, changed)

    def _weight(self, name: str) -> Tensor:
        return self.model.get_parameter(f"{name}.weight")

    @torch.no_grad()
    def clip(self) -> None:
        """Put the masks back into [0, 1]."""
        for mask in self.masks:
            mask.clamp_(0, 1)

    @torch.no_grad()
    def prune(self, threshold: float) -> dict[str, int]:
        """Zero the weight of every channel whose mask is under the threshold; how many of how many."""
        cut = 0
        for name, mask in zip(self.layers, self.masks, strict=True):
            self._weight(name)[mask < threshold] = 0
            cut += int((mask < threshold).sum())
        return {"count": cut, "n": sum(len(mask) for mask in self.masks)}


class Shaken(Objective):
    """`alpha * CE + (1 - alpha) * max_noise CE` over noise in [-epsilon, epsilon], as a loss of the masks."""

    def __init__(self, epsilon: float, alpha: float, steps: int):
        self.epsilon, self.alpha, self.steps = epsilon, alpha, steps

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """The noise starts at random and takes signed gradient steps of epsilon / steps upwards."""
        assert isinstance(model, Masked)
        values = F.cross_entropy(model(batch.x, batch.lengths).float(), batch.y, reduction="none")
        loss = self.alpha * values.mean()
        if self.epsilon and self.alpha < 1:
            worst = model(batch.x, batch.lengths, self._worst(model, batch))
            loss = loss + (1 - self.alpha) * F.cross_entropy(worst.float(), batch.y)
        return Step(loss, {"main": values.detach()})

    def _worst(self, model: Masked, batch: Batch) -> Noise:
        flat = [(2 * torch.rand_like(m) - 1) * self.epsilon for mask in model.masks for m in (mask, mask)]
        for _ in range(self.steps):
            flat = [value.detach().requires_grad_() for value in flat]
            logits = model(batch.x, batch.lengths, list(zip(flat[::2], flat[1::2], strict=True)))
            slopes = torch.autograd.grad(F.cross_entropy(logits.float(), batch.y), flat, allow_unused=True)
            flat = [
                (value + self.epsilon / self.steps * (0 if slope is None else slope.sign())).clamp(
                    -self.epsilon, self.epsilon
                )
                for value, slope in zip(flat, slopes, strict=True)
            ]
        flat = [value.detach() for value in flat]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def after_step(self, model: nn.Module) -> None:
        """Masks stay in [0, 1]."""
        assert isinstance(model, Masked)
        model.clip()

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean cross entropy of the masked network without noise."""
        return {"main_loss": float(torch.nanmean(records["main"]))}


@DEFENSES.register("anp", paper="Wu and Wang 2021, Adversarial Neuron Pruning Purifies Backdoored Deep Models")
@options
class ANP(Defense):
    """Adversarial Neuron Pruning: on clean samples, find and prune the neurons that small changes turn into a backdoor.

    An undefended model is trained first. A mask m in [0, 1] for every channel of its batch norms is then trained on
    clean samples, all weights fixed: `min_m alpha * L(m) + (1 - alpha) * max_{|noise| <= epsilon} L(m, noise)`.
    Channels whose mask ends under `threshold` are pruned.

    Deviations: noise stays within [-epsilon, epsilon], as in the formula (the code lets a random start and one step add
    up); networks without batch norm are masked at their convolutions. The threshold is fixed, never chosen by test
    accuracy or attack success, as in some benchmarks. As in the code, batch norms judge in the end with the statistics
    from before the pruning, although masks are learned with those of each batch.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"clean"})

    training: Annotated[Recipe, Field(description="training of the undefended model")] = Recipe()
    masking: Annotated[Repair, Field(description="training of the masks on the clean samples")] = Repair(
        epochs=1, min_steps=2000, learning_rate=0.2, weight_decay=0.0, schedule="constant"
    )
    epsilon: Annotated[float, Field(ge=0, description="largest relative change of a neuron")] = 0.4
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of the loss without noise")] = 0.2
    steps: Annotated[int, Field(ge=1, description="signed gradient steps to the worst noise")] = 1
    threshold: Annotated[float, Field(ge=0, le=1, description="masks under this are pruned")] = 0.2

    def run(self, job: Job) -> Outcome:
        """Train, learn the masks, prune."""
        clean, model = job.clean, trained(job, self.training)
        before = snapshot(model)
        masked = Masked(model)
        objective = Shaken(self.epsilon, self.alpha, self.steps)
        job.fit("masking", masked, objective, self.masking, data=clean, parameters=masked.masks.parameters())
        model.load_state_dict(before)  # training the masks moves the statistics of batch norms
        pruned = masked.prune(self.threshold)
        return without_suspects(model, len(job.data), {"pruned_neurons": pruned}, before)
