"""Rank by the entropy of the prediction: what the network is surest of."""

from __future__ import annotations

from torch import nn

from antibackdoor.defenses.base import Outcome
from antibackdoor.detectors.base import DETECTORS, Ranking
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.scores import entropies, logits_of


@DETECTORS.register("entropy", paper="Ying and Wu 2023, DLP: towards active defense against backdoor attacks")
@options
class Entropy(Ranking):
    """Minus the entropy of each prediction: triggered samples get the surest answers.

    score = sum_k p_k log p_k, in nats, between -log K and 0; labels are not looked at. Computed in float64, where sure
    predictions still differ. As with `loss`, the moment in training matters.
    """

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """One pass."""
        model = self.network(job, model)
        scores = -entropies(logits_of(model, job.data, job.fabric))
        return self.ranked(model, job.data, scores, "among the samples of which the network is surest")
