"""The first objective of E2ABL: the warm-up of the second head, whose losses rank the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.defenses.company import Company, second_logits
from antibackdoor.files import Tree
from antibackdoor.models.tap import Tap
from antibackdoor.seeds import generator
from antibackdoor.training.groups import nearest
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Objective, Step
from antibackdoor.training.ranking import LossDrop, Persistence, within
from antibackdoor.training.scores import bonds_of, features_of, logits_of, losses, mixed_logits_of

if TYPE_CHECKING:
    from antibackdoor.defenses.e2abl import E2ABL

MIXTURES = 8
"""How often each sample is averaged with another, for its bond to its label."""
MOST = 5 / 6
"""Of a class may be poison, a little more than in any attack of the papers: more of it is what is ordinary there."""


class Trap(Objective):
    """The warm-up: cross entropy of h2 alone, and the ranking fed with its losses."""

    def __init__(self, options: E2ABL, job: Job):
        self.options, self.job = options, job
        n = len(job.data)
        if options.ranking == "loss_drop" or options.warm_up is None:
            self.ranking: LossDrop | Persistence = LossDrop(n, options.drop_weights)
        else:
            entries = options.warm_up.epochs_for(n) + (options.loss_history == "init")
            entries *= 1 + (options.mixing and options.loss_history != "running")
            self.ranking = Persistence(n, skip=entries - max(1, round(options.window * entries)))

    def look(self, tap: nn.Module, epoch: int) -> None:
        """One entry of the history: the loss of every sample as it is and, with `mixing`, mixed with another class."""
        data, fabric = self.job.data, self.job.fabric
        self.ranking.add(losses(logits_of(tap, data, fabric, call=second_logits), data.y))
        if self.options.mixing and isinstance(self.ranking, Persistence):  # Eq. 5 speaks of one history of losses
            rng = generator(self.job.seed, "mixing", epoch)
            self.ranking.add(losses(mixed_logits_of(tap, data, fabric, rng, call=second_logits), data.y))

    def company(self, tap: Tap) -> Company | None:
        """What the ranking as it stands, and each sample's bond to its label in mixtures, say of groups of samples."""
        if self.options.ranking != "company" or self.options.warm_up is None:
            return None
        data, fabric, seed = self.job.data, self.job.fabric, self.job.seed
        given, features = data.y.cpu(), features_of(tap, data, fabric, call=second_logits)
        near = nearest(features, given, self.options.neighbors, seed=seed)
        bonds = bonds_of(tap, data, fabric, seed, MIXTURES, call=second_logits)
        ease = within(self.ranking.scores(), given)
        classes = len(data.spec.classes)
        return Company.of((ease, bonds), given, near, classes, rounds=self.options.rounds, most=MOST)

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Only the shallow layers and h2 are computed."""
        values = F.cross_entropy(second_logits(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"second": values.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Feed the ranking: losses seen while training, or one evaluation pass of the shallow part."""
        if self.options.loss_history == "running":
            self.ranking.add(records["second"])
        else:
            self.look(model, epoch)
        return {"second_loss": float(torch.nanmean(records["second"]))}

    def state(self) -> Tree:
        """The ranking."""
        return self.ranking.state()

    def load(self, state: Tree) -> None:
        """The ranking."""
        self.ranking.load(state)
