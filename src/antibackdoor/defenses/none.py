"""No defense: the control of every experiment, and where every repair starts."""

from __future__ import annotations

import torch
from torch import nn

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
        return without_suspects(trained(job, self.recipe), len(job.data))


def trained(job: Job, recipe: Recipe) -> nn.Module:
    """The undefended model, in the budget of the run: the same, bit for bit, whatever is done with it afterwards."""
    model = job.model()
    job.fit("training", model, CrossEntropy(), job.recipe(recipe))
    return model


def without_suspects(model: nn.Module, n: int, evidence: dict[str, object] | None = None) -> Outcome:
    """The outcome of a method that looks at no sample: all scores are 0 and nothing is flagged."""
    zeros = torch.zeros(n, dtype=torch.float64)
    return Outcome(
        model, zeros, zeros, torch.zeros(n, dtype=torch.bool), torch.full((n,), -1), evidence=dict(evidence or {})
    )
