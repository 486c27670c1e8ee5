"""The objective of the shallow witnesses of `jury`: learn some labels, and look at everybody's losses on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.defenses.company import second_logits
from antibackdoor.files import Tree
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Objective, Step
from antibackdoor.training.ranking import Persistence
from antibackdoor.training.scores import logits_of, losses


class Witness(Objective):
    """Cross entropy of the shallow part and its head; `ranking` gets the loss of every sample after these `moments`.

    moments: steps, counted from 1. A look is one evaluation pass of the shallow part.
    """

    def __init__(self, job: Job, moments: Collection[int] = ()):
        self.job, self.moments, self.step = job, frozenset(moments), 0
        self.ranking = Persistence(len(job.data), skip=0)

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Only the shallow layers and their head are computed."""
        values = F.cross_entropy(second_logits(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"witness": values.detach()})

    def after_step(self, model: nn.Module) -> None:
        """Look, where it is time to."""
        self.step += 1
        if self.step in self.moments:
            logits = logits_of(model, self.job.data, self.job.fabric, call=second_logits)
            self.ranking.add(losses(logits, self.job.data.y))

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss."""
        return {"witness_loss": float(torch.nanmean(records["witness"]))}

    def state(self) -> Tree:
        """The ranking and the steps so far."""
        return {"step": self.step, "ranking": self.ranking.state()}

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.step = state["step"]
        self.ranking.load(state["ranking"])
