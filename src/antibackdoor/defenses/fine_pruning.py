"""Fine-pruning: cut channels that clean samples leave idle, then fine-tune."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather
from antibackdoor.data.core import Data
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, snapshot
from antibackdoor.defenses.none import trained, without_suspects
from antibackdoor.errors import InputError
from antibackdoor.models.blocks import call, feature_map, undisturbed
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe, Repair
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import logits_of


def reader_of_channels(model: nn.Module, example: Batch) -> tuple[nn.Linear, int]:
    """(the first linear layer that runs after the last convolution, channels of the last feature map before it).

    A channel is pruned by zeroing the columns of that layer that read it: nothing else reads the last feature map, in
    whatever way the network joins its branches. Raises InputError where there is no such layer.
    """
    runs: list[tuple[nn.Module, int]] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        found = feature_map(output)
        runs.append((module, 0 if found is None else found.shape[1]))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with undisturbed(model), torch.no_grad():
            call(model, example.x, example.lengths)
    finally:
        for handle in handles:
            handle.remove()
    last = max((i for i, (m, _) in enumerate(runs) if isinstance(m, nn.modules.conv._ConvNd)), default=None)
    after = [] if last is None else [i for i, (m, _) in enumerate(runs) if i > last and isinstance(m, nn.Linear)]
    if not after:
        raise InputError("this model has no linear layer behind a convolution, so there are no channels to prune.")
    linear = runs[after[0]][0]
    assert isinstance(linear, nn.Linear)
    channels = [c for _, c in runs[: after[0]] if c][-1]
    # Flattened maps have several columns a channel; where they do not fit, every column counts as a channel.
    return linear, channels if linear.in_features % channels == 0 else linear.in_features


def activations(model: nn.Module, linear: nn.Linear, channels: int, data: Data, job: Job) -> Tensor:
    """`(channels,)` mean of what `linear` reads of each channel, over all samples and positions."""
    total = torch.zeros(channels, dtype=torch.float64)

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        total.add_(args[0].detach().double().cpu().unflatten(1, (channels, -1)).mean(2).sum(0))

    handle = linear.register_forward_pre_hook(record)
    try:
        logits_of(model, data, job.fabric, in_turn=True)
    finally:
        handle.remove()
    return total / len(data)


class Pruned(CrossEntropy):
    """Cross entropy that keeps the pruned columns at zero."""

    def __init__(self, linear: nn.Linear, alive: Tensor):
        self.linear, self.alive = linear, alive

    def enforce(self) -> None:
        """Zero what was pruned; an optimizer step may have moved it."""
        with torch.no_grad():
            self.linear.weight.mul_(self.alive.to(self.linear.weight))

    def after_step(self, model: nn.Module) -> None:
        """What is pruned stays pruned."""
        self.enforce()


@DEFENSES.register("fine_pruning", paper="Liu et al. 2018, Fine-Pruning: Defending Against Backdooring Attacks")
@options
class FinePruning(Defense):
    """Fine-Pruning: cut the channels of the last convolution that clean samples use least, then fine-tune on them.

    An undefended model is trained first. Channels are cut in ascending order of their mean activation on the clean
    samples, until accuracy on these falls by more than `max_drop`; the last cut that did not is kept. Then the network
    is fine-tuned on the clean samples, what was cut staying cut.

    Deviations: the paper has no fixed tolerance (4 points here); pruning goes in steps of 1 % of the channels; small
    sets get a floor of steps. Profile "e2abl": no fine-tuning, as in the E2ABL paper's comparison.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"clean"})
    profiles: ClassVar[dict[str, dict[str, Any]]] = {"e2abl": {"fine_tuning": None}}

    training: Annotated[Recipe, Field(description="training of the undefended model")] = Recipe()
    max_drop: Annotated[float, Field(ge=0, le=1, description="accuracy on clean samples that pruning may cost")] = 0.04
    step: Annotated[float, Field(gt=0, le=1, description="share of the channels that is cut at a time")] = 0.01
    fine_tuning: Annotated[Repair | None, Field(description="on the clean samples; null: none")] = Repair(
        epochs=10, min_steps=200, batch_size=64, learning_rate=0.01
    )

    def run(self, job: Job) -> Outcome:
        """Train, prune, fine-tune."""
        clean, model = job.clean, trained(job, self.training)
        before = snapshot(model)
        linear, channels = reader_of_channels(model, gather(job.data, torch.arange(2), job.fabric.device))
        order = activations(model, linear, channels, clean, job).argsort(stable=True)
        pruned = Pruned(linear, self._alive(job, model, linear, order))
        pruned.enforce()
        if self.fine_tuning is not None:
            job.fit("fine-tuning", model, pruned, self.fine_tuning, data=clean)
        cut = channels - int(pruned.alive.sum()) * channels // linear.in_features
        return without_suspects(model, len(job.data), {"pruned_channels": {"count": cut, "n": channels}}, before)

    def _alive(self, job: Job, model: nn.Module, linear: nn.Linear, order: Tensor) -> Tensor:
        """`(columns,)` bool: what is left after the longest prefix of `order` that costs no more than allowed."""
        weight, channels = linear.weight.detach().clone(), len(order)
        y = job.clean.y.cpu()

        def accuracy() -> float:
            return float((logits_of(model, job.clean, job.fabric).argmax(1) == y).double().mean())

        def columns(count: int) -> Tensor:
            alive = torch.ones(channels, dtype=torch.bool)
            alive[order[:count]] = False
            return alive.repeat_interleave(linear.in_features // channels).to(weight.device)

        before, kept = accuracy(), 0
        with torch.no_grad():
            for count in range(max(1, round(self.step * channels)), channels, max(1, round(self.step * channels))):
                linear.weight.copy_(weight * columns(count))
                if before - accuracy() > self.max_drop + 1e-9:
                    break
                kept = count
            linear.weight.copy_(weight)
        return columns(kept)
