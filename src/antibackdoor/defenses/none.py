"""No defense: the control of every experiment."""

from __future__ import annotations

import torch

from antibackdoor.defenses.base import DEFENSES, Defense, Outcome
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy


@DEFENSES.register("none")
@options
class NoDefense(Defense):
    """Plain supervised training on everything as given; suspects nothing."""

    recipe: Recipe = Recipe()

    def run(self, job: Job) -> Outcome:
        """Train with cross entropy; all scores are 0 and nothing is flagged."""
        model, n = job.model(), len(job.data)
        job.fit("training", model, CrossEntropy(), job.recipe(self.recipe))
        zeros = torch.zeros(n, dtype=torch.float64)
        return Outcome(model, zeros, zeros, torch.zeros(n, dtype=torch.bool), torch.full((n,), -1))
