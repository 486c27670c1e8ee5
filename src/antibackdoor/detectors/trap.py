"""E2ABL as a detector: up to its verdict, without the long training."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.detectors.base import DETECTORS, Detector
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.verdict import Verdict, decide


@DETECTORS.register("trap", paper="Jiang et al. 2024, End-to-End Anti-Backdoor Learning on Images and Time Series")
@options
class Trap(Detector):
    """A second head on the shallow layers ranks the samples; a main head that never saw the suspects is then asked.

    E2ABL up to its verdict: warm-up of the second head, whose losses rank the samples; a short training of the main
    head on what is not isolated; then the main head is asked, once, what the isolated samples are. Same ranking, flags,
    suggested labels and verdict as `train --defense e2abl`; the trained network is thrown away.
    """

    watches_training: ClassVar[bool] = True
    estimates_probability: ClassVar[bool] = True

    warm_up: Annotated[Recipe, Field(description="training of the second head alone")] = E2ABL().warm_up or Recipe()
    recipe: Annotated[Recipe, Field(description="training of the main head on what is not isolated")] = Recipe(
        epochs=4, min_steps=150
    )

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """Warm up, isolate, train the main head for a while, ask it."""
        self.refuse(model)
        return E2ABL(warm_up=self.warm_up, main=self.recipe, recovery_delay=1.0).run(job)

    def verdict(self, data: Data, outcome: Outcome) -> Verdict:
        """The same as that of a training."""
        return decide(data, outcome)
