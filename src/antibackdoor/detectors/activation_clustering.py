"""Activation Clustering: in a poisoned class the features form two clusters, and the smaller one is suspicious."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from antibackdoor.defenses.base import Outcome
from antibackdoor.detectors.base import DETECTORS, Detector, Split, enough, split_classes
from antibackdoor.options import options
from antibackdoor.training.features import clusters
from antibackdoor.training.job import Job
from antibackdoor.training.scores import check_finite, features_of


@DETECTORS.register(
    "activation_clustering", paper="Chen et al. 2019, Detecting Backdoor Attacks by Activation Clustering"
)
@options
class ActivationClustering(Detector):
    """How much closer a sample lies to the smaller of two clusters of its class.

    For each whole class: features of the network's last layer but one, reduced to `components` principal components,
    2-means. With a, b the distances to the centers of the smaller and the larger cluster and s the silhouette of the
    clustering, score = s * (b - a) / max(a, b), in [-1, 1]: a class that does not fall apart stays near 0.
    A class is flagged where s >= `silhouette` and the smaller cluster holds at most `largest` of it; then the smaller
    cluster is. Where poison is half of its class or more, the size rule is blind or, for the scores, wrong.

    Deviations: principal instead of independent components; the silhouette of at most 2,000 samples of a class; a
    higher threshold (0.10 to 0.15 in the paper, which clean classes pass here).
    """

    components: Annotated[int, Field(ge=1, description="principal components that are kept")] = 10
    silhouette: Annotated[float, Field(gt=0, lt=1, description="least silhouette of a class that is flagged")] = 0.5
    largest: Annotated[float, Field(gt=0, le=0.5, description="largest share of a class that is flagged")] = 0.35

    def run(self, job: Job, model: nn.Module | None = None) -> Outcome:
        """One pass for the features, then class by class."""
        model = self.network(job, model)
        features = check_finite(features_of(model, job.data, job.fabric), job.data)
        return split_classes(model, job.data, features, self.split, "silhouette of two clusters", self.silhouette)

    def split(self, features: Tensor, label: int) -> Split:
        """One class: centered features `(m, D)`."""
        scores, group, apart = clusters(features, label, self.components)
        found = apart >= self.silhouette and float(group.double().mean()) <= self.largest and enough(group)
        return Split(scores, group, apart, found)
