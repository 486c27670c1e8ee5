"""The witnesses of the default defense, without the training of a model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.defenses.company import second_logits
from antibackdoor.defenses.jury import Jury
from antibackdoor.detectors.base import DETECTORS, Detector
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.verdict import Calibration, Verdict, decide

UNHEARD = Calibration(blind=0.25, slope=20.0, even=0.60)
"""What the runs of this detector in the ledger give, all on one data set so far, as a test holds."""


@DETECTORS.register("witnesses")
@options
class Witnesses(Detector):
    """Shallow networks say which samples something ties to their label that has nothing to do with what they show.

    `Jury` up to the training of its model: suspicion from ease, bond and home, shared by neighbors. Samples are flagged
    where these divide a class beyond doubt; the label suggested is what an outsider is confident to see (of clean-label
    poison a wrong one). Nobody is heard by a trained model: most poison ranks high, but of less it is beyond doubt.
    """

    watches_training: ClassVar[bool] = True

    recipe: Annotated[Recipe, Field(description="of the shallow model that learns everything")] = Jury().trap
    outsider: Annotated[Recipe, Field(description="of the shallow models that each lack some classes")] = (
        Jury().outsider
    )

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """Question the witnesses."""
        self.refuse(model)
        jury, given = Jury(trap=job.recipe(self.recipe), outsider=self.outsider), job.data.y.cpu()
        said = jury.depose(job)
        findings = [said.finding(label, given) for label in range(len(job.data.spec.classes))]
        names, rows = job.data.spec.classes, said.apart.nonzero().flatten().tolist()
        return Outcome(
            said.tap,
            said.scores(given),
            said.suspicion,
            said.apart,
            said.elsewhere.masked_fill(~said.apart, -1),
            {
                row: f"set apart from other samples labeled {names[given[row]]!r} by more than what it shows"
                for row in rows
            },
            {**said.evidence(findings, jury), "flagged": len(rows)},
            witness=(said.tap, second_logits),
        )

    def verdict(self, data: Data, outcome: Outcome) -> Verdict:
        """The same as that of a training, before its hearing."""
        return decide(data, outcome, UNHEARD)
