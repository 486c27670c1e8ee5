"""Activation Clustering: in a poisoned class the features form two clusters, and the smaller one is suspicious."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from antibackdoor.defenses.base import Outcome
from antibackdoor.detectors.base import DETECTORS, Detector, Split, check_finite, enough, split_classes
from antibackdoor.options import options
from antibackdoor.seeds import derive
from antibackdoor.training.job import Job
from antibackdoor.training.scores import features_of

SILHOUETTE_SAMPLES = 2000
"""The silhouette needs all distances between samples; of larger classes this many are looked at."""


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
        seed = derive(0, "activation clustering", label) & 0x7FFFFFFF
        values = features.numpy()
        if self.components < min(values.shape):
            values = PCA(self.components, svd_solver="randomized", random_state=seed).fit_transform(values)
        clusters = KMeans(2, n_init=10, random_state=seed).fit(values)
        smaller = int(np.bincount(clusters.labels_, minlength=2).argmin())
        group = clusters.labels_ == smaller
        distances = clusters.transform(values)
        near, far = distances[:, smaller], distances[:, 1 - smaller]
        leaning = (far - near) / np.maximum(np.maximum(far, near), 1e-300)
        apart = self._silhouette(values, group, seed)
        suspicious = torch.from_numpy(group)
        found = apart >= self.silhouette and group.mean() <= self.largest and enough(suspicious)
        return Split(torch.from_numpy(max(apart, 0.0) * leaning), suspicious, apart, bool(found))

    def _silhouette(self, values: np.ndarray, group: np.ndarray, seed: int) -> float:
        """Of all samples or, in large classes, of some, drawn from both clusters in proportion."""
        share = min(1.0, SILHOUETTE_SAMPLES / len(values))
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(group == side)) for side in (False, True)]
        chosen = np.concatenate([part[: max(2, round(share * len(part)))] for part in rows])
        if group[chosen].all() or not group.any():  # all samples in one cluster
            return 0.0
        return float(silhouette_score(values[chosen], group[chosen]))
