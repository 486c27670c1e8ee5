"""Rank by the loss: what the network has learned best."""

from __future__ import annotations

from torch import nn

from antibackdoor.defenses.base import Outcome
from antibackdoor.detectors.base import DETECTORS, Ranking
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.scores import logits_of, losses


@DETECTORS.register("loss", paper="Li et al. 2021, Anti-Backdoor Learning")
@options
class Loss(Ranking):
    """Minus each sample's cross entropy: a trigger is easy, so poison is learned best.

    score = log p(y | x), in nats, at most 0; of the samples as they are, in evaluation mode. It holds only once the
    network has learned the trigger, and while it has not yet learned everything else as well: the moment matters.
    """

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """One pass."""
        model = self.network(job, model)
        scores = -losses(logits_of(model, job.data, job.fabric), job.data.y)
        return self.ranked(model, job.data, scores, "among the samples that were learned best")
