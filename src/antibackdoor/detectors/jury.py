"""The default of `scan`: the default defense, whose model is thrown away."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.defenses.jury import Jury
from antibackdoor.detectors.base import DETECTORS, Detector
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.verdict import Verdict, decide


@DETECTORS.register("jury")
@options
class Heard(Detector):
    """Shallow witnesses choose whom to trust, and a model that learns from these hears all others.

    The defense of the same name, with all that it finds and misses, and its verdict. It needs a model to judge by, but
    not a good one: `scan` trains it at half the width of the one that `train` hands out. The other options of `Jury`
    stand at their defaults here.
    """

    watches_training: ClassVar[bool] = True
    estimates_probability: ClassVar[bool] = True

    recipe: Annotated[Recipe, Field(description="of the model that hears")] = Jury().main
    trap: Annotated[Recipe, Field(description="of the shallow model that learns everything")] = Jury().trap
    outsider: Annotated[Recipe, Field(description="of the shallow models that each lack some classes")] = (
        Jury().outsider
    )

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """Question the witnesses, train the model, and judge."""
        self.refuse(model)
        return Jury(main=self.recipe, trap=self.trap, outsider=self.outsider).run(job)

    def verdict(self, data: Data, outcome: Outcome) -> Verdict:
        """That of the defense."""
        return decide(data, outcome)
