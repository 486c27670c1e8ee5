"""FixMatch: learn from few labeled samples and from the rest without its labels; for any defense that splits a set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.augment import AUGMENTATIONS, strong
from antibackdoor.data.batches import Batch, gather
from antibackdoor.errors import InputError
from antibackdoor.files import Tree
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe, Steps
from antibackdoor.training.objectives import Augment, Objective, Step, forward


@options
class SemiSupervised(Steps):
    """How to train with FixMatch; the budget counts steps, each of B labeled and `ratio` x B unlabeled samples."""

    epochs: Annotated[int, Field(ge=1, description="passes over the unlabeled samples, at least")] = 30
    min_steps: Annotated[int, Field(ge=0, description="steps, at least, whatever the number of samples")] = 1000
    batch_size: Annotated[int, Field(ge=2, description="labeled samples a step; small sets use n/20, at least 16")] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    schedule: Annotated[
        Literal["cosine", "constant", "fixmatch"],
        Field(description="of the learning rate, by steps; fixmatch: cos(7 pi done / 16), which ends at a fifth"),
    ] = "fixmatch"
    augment: Annotated[
        Literal["none", "weak", "strong"], Field(description="of labeled samples, and where pseudo-labels are read")
    ] = "weak"
    ratio: Annotated[int, Field(ge=1, description="unlabeled samples for each labeled one in a step")] = 7
    threshold: Annotated[
        float, Field(ge=0, le=1, description="a pseudo-label counts if its probability is at least this")
    ] = 0.95
    temperature: Annotated[float, Field(gt=0, description="divides the logits of which the probability is taken")] = 1.0
    unlabeled_weight: Annotated[float, Field(ge=0, description="weight of the unlabeled loss")] = 1.0
    average: Annotated[float, Field(ge=0, lt=1, description="decay a step of the averaged weights")] = 0.999
    operations: Annotated[int, Field(ge=0, le=14, description="random changes of a strong view")] = 2
    magnitude: Annotated[float, Field(ge=0, le=2, description="multiplies the strengths of a strong view")] = 1.0
    hole: Annotated[float, Field(ge=0, le=1, description="side of a strong view's hole over the image's")] = 0.5
    mirror: Annotated[bool, Field(description="images may be mirrored")] = True
    joint: Annotated[
        bool,
        Field(description="all views in one pass; false: pseudo-labels from a pass of their own, without gradients"),
    ] = True

    def batch_for(self, n: int) -> int:
        """Unlabeled samples a step, `ratio` times the labeled ones."""
        return self.ratio * Recipe.batch_for(self, n)


class Average:
    """Exponential moving average of a model's weights and of the statistics of its batch norms.

    After step k the old average weighs `min(decay, (1 + k) / (10 + k))`: with the plain decay of 0.999 a run of a
    thousand steps would end with a third of the weights it began with.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are after one more step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        now = model.state_dict()
        floats = [name for name, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floats], [now[name] for name in floats], 1 - decay)
        for name in now.keys() - set(floats):  # counters
            self.values[name].copy_(now[name])


class FixMatch(Objective):
    """Cross entropy on labeled samples, and agreement of two views on all others.

    Adds to the mean `CE(f(weak(x)), y)` over labeled x, for unlabeled u and `p = softmax(f(weak(u)))`,
    `weight * mean( 1[max p >= threshold] * CE(f(strong(u)), argmax p) )`; no given label of a u is ever looked at.
    All views go through the model together, so that batch norm sees one mixture of them. The model to use in the end
    is `average`; `semi_supervised` does all of it.

    labeled: row numbers; a step draws them without repetition while there are enough. labels: `(n,)` to train these
    rows on instead of the given ones.
    Records of unlabeled rows: "confidence" max p, "pseudo" argmax p, "unlabeled" loss of the strong view, wherever
    the threshold lies. The last epoch's stay in `seen`, `(n,)` each, NaN for rows outside the pool.
    Reference: Sohn et al. 2020, FixMatch. Deviation: `Average` starts faster and averages batch statistics too.
    """

    compiles: ClassVar[bool] = True

    def __init__(
        self, job: Job, model: nn.Module, recipe: SemiSupervised, labeled: Tensor, labels: Tensor | None = None
    ):
        if len(labeled) == 0:
            raise InputError("semi-supervised training needs at least one labeled sample.")
        self.data, self.recipe, self.device = job.data, recipe, job.fabric.device
        self.labeled = labeled.to(self.device)
        self.labels = (job.data.y if labels is None else labels).to(self.device)
        self.average = Average(model, recipe.average)
        self.seen: dict[str, Tensor] = {}
        self._totals = torch.zeros(4, device=self.device)

    def prepare(self, plain: Batch, augment: Augment, rng: torch.Generator) -> Batch:
        """Weak views of labeled and of unlabeled samples, then strong ones of these; `y` of the labeled samples."""
        recipe = self.recipe
        known = gather(self.data, self._draw(max(1, round(len(plain.rows) / recipe.ratio)), rng), self.device)
        lengths = None
        if known.lengths is not None and plain.lengths is not None:
            lengths = torch.cat([known.lengths, plain.lengths])
        both, mirror = torch.cat([known.x, plain.x]), recipe.mirror
        easy = AUGMENTATIONS[recipe.augment](both, self.data.spec, rng, lengths, flip=mirror)
        hard = strong(
            plain.x,
            self.data.spec,
            rng,
            plain.lengths,
            flip=mirror,
            operations=recipe.operations,
            magnitude=recipe.magnitude,
            hole=recipe.hole,
        )
        if lengths is not None and plain.lengths is not None:
            lengths = torch.cat([lengths, plain.lengths])
        return Batch(torch.cat([easy, hard]), self.labels[known.rows], plain.rows, lengths)

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        """So many labeled rows; each as often as any other, give or take one."""
        turns = math.ceil(count / len(self.labeled))
        order = torch.rand(turns, len(self.labeled), generator=rng, device=self.device).argsort(1)
        return self.labeled[order.flatten()[:count]]

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Both losses from one pass, or two."""
        sizes = [len(batch.y), len(batch.rows), len(batch.rows)]
        if self.recipe.joint:
            known, easy, hard = forward(model, batch).float().split(sizes)
        else:
            place = torch.arange(sum(sizes), device=batch.x.device).split(sizes)
            with torch.no_grad():
                easy = forward(model, _part(batch, place[1])).float()
            known, hard = forward(model, _part(batch, torch.cat([place[0], place[2]]))).float().split(sizes[::2])
        confidence, pseudo = (easy.detach() / self.recipe.temperature).softmax(1).max(1)
        sure = confidence >= self.recipe.threshold
        losses = F.cross_entropy(hard, pseudo, reduction="none")
        labeled, unlabeled = F.cross_entropy(known, batch.y), (losses * sure).mean()
        with torch.no_grad():
            one = torch.ones_like(labeled)
            self._totals += torch.stack([labeled, unlabeled, sure.float().mean(), one])
        records = {"confidence": confidence, "pseudo": pseudo, "unlabeled": losses.detach()}
        return Step(labeled + self.recipe.unlabeled_weight * unlabeled, records)

    def after_step(self, model: nn.Module) -> None:
        """Average the weights."""
        self.average.update(model)

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Both mean losses, and the share of unlabeled views whose pseudo-label counted."""
        self.seen = {name: values.cpu() for name, values in records.items()}
        labeled, unlabeled, confident, steps = self._totals.tolist()
        self._totals.zero_()
        names = {"labeled_loss": labeled, "unlabeled_loss": unlabeled, "confident": confident}
        return {name: value / steps for name, value in names.items()}

    def state(self) -> Tree:
        """The averaged weights and the last records."""
        return {"steps": self.average.steps, "average": self.average.values, "seen": self.seen}

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.average.steps, self.seen = state["steps"], state["seen"]
        for name, value in self.average.values.items():
            value.copy_(state["average"][name])


def _part(batch: Batch, place: Tensor) -> Batch:
    return Batch(batch.x[place], batch.y, batch.rows, None if batch.lengths is None else batch.lengths[place])


def semi_supervised(
    job: Job,
    name: str,
    model: nn.Module,
    recipe: SemiSupervised,
    labeled: Tensor,
    unlabeled: Tensor,
    *,
    labels: Tensor | None = None,
) -> FixMatch:
    """Train `model` in place with `FixMatch` as the stage `name`; it ends with the averaged weights.

    labeled, unlabeled: row numbers; a row may be in both. Returns the objective, for its `seen`.
    """
    match = FixMatch(job, model, recipe, labeled, labels)
    job.fit(name, model, match, recipe, rows=unlabeled)
    model.load_state_dict(match.average.values)
    return match
