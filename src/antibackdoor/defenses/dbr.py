"""D-BR: poison changes more under transformations; unlearn what changes most, relearn what changes least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.augment import AUGMENTATIONS
from antibackdoor.data.batches import Batch
from antibackdoor.defenses.abl import outcome_of_isolation, taken_back
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, snapshot
from antibackdoor.defenses.none import trained
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective, Step, forward
from antibackdoor.training.ranking import top
from antibackdoor.training.scores import logits_of
from antibackdoor.training.unlearning import Unlearn


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """`(b, D)`: what the network's last linear layer reads."""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError("this model has no linear layer, so it has no features in front of one.")
    handles = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in layers]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1]


def overlap_of_classes(features: Tensor, y: Tensor) -> Tensor:
    """Mean cosine between the centers of different classes of a batch; what apart-ness costs, 0 for one class."""
    centers = F.normalize(torch.stack([features[y == k].mean(0) for k in y.unique()]), dim=1)
    cosines = centers @ centers.T
    return (cosines.sum() - cosines.diagonal().sum()) / cosines.numel()


class Apart(Objective):
    """Drive the class centers apart: poison, a cluster of its own inside of the target class, is then easier to see."""

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """The overlap of the classes in the batch."""
        loss = overlap_of_classes(embed(model, batch).float(), batch.y)
        return Step(loss, {"overlap": loss.detach().expand(len(batch.y))})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean overlap."""
        return {"overlap_loss": float(torch.nanmean(records["overlap"]))}


def sensitivity(model: nn.Module, job: Job, transform: str, looks: int) -> Tensor:
    """`(n,)` mean squared change of a sample's features under a random transformation, averaged over `looks` draws."""
    augment, total = AUGMENTATIONS[transform], torch.zeros(len(job.data))
    for look in range(looks):
        rng = generator(job.seed, "sensitivity", look, device=job.fabric.device)

        def change(model: nn.Module, batch: Batch, rng: torch.Generator = rng) -> Tensor:
            moved = replace(batch, x=augment(batch.x, job.data.spec, rng, batch.lengths))
            return (embed(model, batch).float() - embed(model, moved).float()).square().mean(1)

        total += logits_of(model, job.data, job.fabric, call=change, in_turn=True)
    return total.double() / looks


class UnlearnRelearn(Unlearn):
    """`(sum_{clean} CE - sum_{poison} CE) / b`: descent on what is held for clean, ascent on the poison."""

    def __init__(self, poison: Tensor, *, guarded: bool):
        super().__init__(guarded=guarded, enough=-1.0)  # what is relearned stays as labeled: no end by that
        self.poison = poison

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Climb for some, descend for the others."""
        self.poison = self.poison.to(batch.rows.device)
        signs = 1 - 2 * self.poison[batch.rows].float()
        return self.step(model, batch, signs)


@DEFENSES.register("dbr", paper="Chen et al. 2022, Effective Backdoor Defense by Exploiting Sensitivity (NeurIPS)")
@options
class DBR(Defense):
    """D-BR: unlearn the samples whose features change most under transformations, relearn those that change least.

    1. Look: a model trained briefly without augmentation learns the trigger as a fixed pattern; its class centers are
       then driven apart. Sensitivity of a sample: `mean (f(x) - f(transform(x)))^2` over its features f. Poison that
       loses its trigger leaves the target's cluster, clean samples stay near their own.
    2. Train the undefended model, with augmentation, in the budget of the run.
    3. Unlearn the most sensitive `poison_rate` of all samples and relearn the least sensitive `clean_rate`.

    Why it is here: of the defenses without clean data that beat ABL in their papers it is the simplest, and it looks at
    something else than the speed of learning. Deviations: the transformation is this package's strong augmentation
    (the paper's: rotations, affine and flips); unlearning and relearning share every batch, where the code gives each
    its own half of an epoch; the code keeps the epoch of best test accuracy minus attack success, which no defender
    knows: the last epoch counts here; small sets get floors of steps, fewer than the 2,000 of the paper on CIFAR-10,
    at five times its rate (the paper's own is the profile "paper"; in 1,000 steps on a small set it removed nothing).
    """

    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"removal": Recipe(epochs=20, min_steps=0, learning_rate=1e-4, schedule="constant")}
    }

    look: Annotated[Recipe, Field(description="training of the model that sensitivity is read from")] = Recipe(
        epochs=2, min_steps=200, learning_rate=0.05, schedule="constant", augment="none"
    )
    apart: Annotated[Recipe, Field(description="driving its class centers apart")] = Recipe(
        epochs=10, min_steps=100, learning_rate=0.01, augment="none"
    )
    transform: Annotated[Literal["weak", "strong"], Field(description="what samples are changed by")] = "strong"
    looks: Annotated[int, Field(ge=1, description="random draws of the transformation that are averaged")] = 1
    training: Annotated[Recipe, Field(description="training of the undefended model")] = Recipe()
    poison_rate: Annotated[float, Field(gt=0, lt=1, description="share of all samples that is unlearned")] = 0.05
    clean_rate: Annotated[float, Field(gt=0, lt=1, description="share of all samples that is relearned")] = 0.2
    removal: Annotated[Recipe, Field(description="unlearning and relearning")] = Recipe(
        epochs=20, min_steps=400, learning_rate=5e-4, schedule="constant"
    )
    guards: Annotated[
        Literal["guarded", "literal"], Field(description="of the removal: clipping and frozen statistics")
    ] = "literal"

    def run(self, job: Job) -> Outcome:
        """Look, train, unlearn and relearn."""
        n, watcher = len(job.data), job.model("watcher")
        job.fit("look", watcher, CrossEntropy(), self.look)
        job.fit("apart", watcher, Apart(), self.apart)
        scores = sensitivity(watcher, job, self.transform, self.looks)
        poison, clean = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        poison[top(scores, max(1, round(self.poison_rate * n)))] = True
        clean[top(-scores, max(1, round(self.clean_rate * n)))] = True
        clean &= ~poison
        model = trained(job, self.training)
        stages = {"training": snapshot(model)}
        removal = UnlearnRelearn(poison, guarded=self.guards == "guarded")
        job.fit("removal", model, removal, self.removal, rows=(poison | clean).nonzero().flatten())
        evidence = {"unlearned": int(poison.sum()), "relearned": int(clean.sum()), **taken_back(job)}
        reason = "its features change more under transformations than those of almost all others"
        return outcome_of_isolation(model, job, scores, poison, evidence, reason, stages)
