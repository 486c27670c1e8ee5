"""Rank by how early and how far the loss drops in a training that is watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from antibackdoor.defenses.base import Outcome
from antibackdoor.detectors.base import DETECTORS, Ranking
from antibackdoor.files import Tree
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.ranking import LossDrop
from antibackdoor.training.scores import logits_of, losses


class Watched(CrossEntropy):
    """Cross entropy whose losses, seen in the training pass itself, feed the ranking."""

    def __init__(self, ranking: LossDrop):
        self.ranking = ranking

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The next entry of the history."""
        self.ranking.add(records["main"])
        return super().after_epoch(model, epoch, records)

    def state(self) -> Tree:
        """The ranking."""
        return self.ranking.state()

    def load(self, state: Tree) -> None:
        """The ranking."""
        self.ranking.load(state)


@DETECTORS.register("loss_drop", paper="Jiang et al. 2024, End-to-End Anti-Backdoor Learning on Images and Time Series")
@options
class LossDropDetector(Ranking):
    """The weighted drop of each sample's loss over a short training: poison falls first and furthest.

    score = sum_i (L_{i-1} - L_i) * w_i over the entries of the loss history: before training, then one an epoch, taken
    from the training pass itself, so that watching costs one pass in all. Backdoors that are learned after the first
    epochs rank worse than by chance. Deviation: the whole network is watched, not a second head (see `trap`).
    """

    watches_training: ClassVar[bool] = True

    recipe: Annotated[Recipe, Field(description="the training that is watched")] = Recipe(
        epochs=3, min_steps=100, batch_size=64, schedule="constant", augment="none"
    )
    weights: Annotated[
        Literal["square", "linear", "uniform"], Field(description="w_i = 1/(i-1)^2, 1/(i-1) or 1 for i = 2, 3, ...")
    ] = "square"

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """Train for a while, recording."""
        self.refuse(model)
        model, ranking = job.model(), LossDrop(len(job.data), self.weights)
        ranking.add(losses(logits_of(model, job.data, job.fabric), job.data.y))
        job.fit("training", model, Watched(ranking), job.recipe(self.recipe))
        return self.ranked(model, job.data, ranking.scores(), "its loss fell among the first and furthest")
