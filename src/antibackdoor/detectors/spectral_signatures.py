"""Spectral Signatures: poison lies at one end of the direction in which its class varies most."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.defenses.base import Outcome
from antibackdoor.detectors.base import DETECTORS, Detector, Split, enough, split_classes
from antibackdoor.options import options
from antibackdoor.training.features import projections
from antibackdoor.training.groups import halves
from antibackdoor.training.job import Job
from antibackdoor.training.ranking import top
from antibackdoor.training.scores import check_finite, features_of


@DETECTORS.register("spectral_signatures", paper="Tran et al. 2018, Spectral Signatures in Backdoor Attacks")
@options
class SpectralSignatures(Detector):
    """The squared projection of each sample's features on the main direction of its class.

    For each class: features h of the network's last layer but one, centered; v the top right singular vector;
    score = ((h - mean) v)^2. Poison and clean samples of a class differ in their mean, so v points from the ones to the
    others and the smaller group lies further out.

    With `rate`, the 1.5 * rate on top of EVERY class are flagged, as in the paper, whether anything is wrong or not:
    then there is no verdict. Without it (our deviation, since nobody knows the rate) a class is flagged only where its
    projections fall into two groups, `separation` apart by Ashman's D, and of it the group further out. Natural
    subgroups of a class look the same; where poison is half of a class, which half is flagged is chance.
    """

    rate: Annotated[
        float | None, Field(gt=0, lt=1, description="expected poisoned share of a class; null: a rule of its own")
    ] = None
    separation: Annotated[float, Field(gt=0, description="least distance of the two groups, in Ashman's D")] = 4.0

    @property
    def decides(self) -> bool:
        """Only without a given rate."""
        return self.rate is None

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """One pass for the features, then class by class."""
        model = self.network(job, model)
        features = check_finite(features_of(model, job.data, job.fabric), job.data)
        return split_classes(model, job.data, features, self.split, "distance of the two groups", self.separation)

    def split(self, features: Tensor, label: int) -> Split:
        """One class: centered features `(m, D)`."""
        along = projections(features, label)
        group, apart = halves(along)
        scores, found = along**2, apart >= self.separation and enough(group)
        if self.rate is not None:
            group = torch.zeros_like(group)
            group[top(scores, min(len(scores), round(1.5 * self.rate * len(scores))))] = True
        return Split(scores, group, apart, found or self.rate is not None)
