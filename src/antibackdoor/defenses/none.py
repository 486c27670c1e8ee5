"""No defense: the control of every experiment, and where every repair starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def without_suspects(
    model: nn.Module, n: int, evidence: dict[str, Any] | None = None, undefended: dict[str, Tensor] | None = None
) -> Outcome:
    """The outcome of a method that looks at no sample: all scores are 0 and nothing is flagged.

    undefended: the weights from before a repair, for the judge to tell what the repair did.
    """
    zeros, stages = torch.zeros(n, dtype=torch.float64), {} if undefended is None else {"training": undefended}
    unflagged, nothing = torch.zeros(n, dtype=torch.bool), torch.full((n,), -1)
    return Outcome(model, zeros, zeros, unflagged, nothing, evidence=evidence or {}, stages=stages)
