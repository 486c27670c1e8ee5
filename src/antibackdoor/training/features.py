"""What the features of one class tell of its samples: two clusters, and the direction in which they vary most."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from antibackdoor.seeds import derive

DIRECTIONS, ROUNDS, LARGE = 6, 8, 1024
"""Size and rounds of the subspace iteration, and from which size of the smaller Gram matrix on it is the cheaper."""
SILHOUETTE_SAMPLES = 2000
"""The silhouette needs all distances between samples; of larger classes this many are looked at."""


def each_class(features: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Class number, row numbers `(m,)` and centered features `(m, D)` float64 of every class that can be cut in two.

    A class of fewer than 4 samples, or whose features are all the same, has nothing to cut.
    """
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten()
        own = features[rows].double()
        centered = own - own.mean(0)
        if len(rows) >= 4 and float(centered.abs().max()) > 1e-6 * (1 + float(own.abs().max())):
            yield int(label), rows, centered


def scored_by_class(features: Tensor, y: Tensor, score: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`(n,)` float64: what `score(features of a class, its number)` gives; 0 in a class that has nothing to cut."""
    scores = torch.zeros(len(y), dtype=torch.float64)
    for label, rows, own in each_class(features, y):
        scores[rows] = score(own, label)
    return scores


def projections(features: Tensor, label: int = 0) -> Tensor:
    """`(m,)` float64: centered features `(m, D)` along their first right singular vector; the sign has no meaning.

    Found from the smaller Gram matrix or, where both are large, by subspace iteration on a few random directions (Halko
    et al. 2011), drawn anew for each label; never by a full decomposition.
    """
    features = features.double()
    m, dims = features.shape
    if m < dims and m <= LARGE:
        values, vectors = torch.linalg.eigh(features @ features.T)
        along: Tensor = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
        return along
    if dims <= LARGE:
        direction: Tensor = torch.linalg.eigh(features.T @ features).eigenvectors[:, -1]
        return features.mv(direction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "spectral signatures", label))
        _, _, v = torch.svd_lowrank(features, q=min(DIRECTIONS, m, dims), niter=ROUNDS)
    return features.mv(v[:, 0])


def clusters(features: Tensor, label: int = 0, components: int = 10) -> tuple[Tensor, Tensor, float]:
    """Centered features `(m, D)` of one class, reduced to this many principal components, in two clusters by 2-means.

    Returns, for each sample, how much closer it lies to the smaller of the two, `s * (b - a) / max(a, b)` with a, b the
    distances to the centers of the smaller and the larger one and s the silhouette, `(m,)` in [-1, 1]; whether it is in
    the smaller one, `(m,)` bool; and s, of at most 2,000 samples, drawn from both clusters in proportion.
    """
    from sklearn.cluster import KMeans  # takes a second to load, and most commands cluster nothing
    from sklearn.decomposition import PCA

    seed = derive(0, "activation clustering", label) & 0x7FFFFFFF
    values = features.numpy()
    if components < min(values.shape):
        values = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(values)
    found = KMeans(2, n_init=10, random_state=seed).fit(values)
    smaller = int(np.bincount(found.labels_, minlength=2).argmin())
    group = found.labels_ == smaller
    distances = found.transform(values)
    near, far = distances[:, smaller], distances[:, 1 - smaller]
    apart = _silhouette(values, group, seed)
    leaning = max(apart, 0.0) * (far - near) / np.maximum(np.maximum(far, near), 1e-300)
    return torch.from_numpy(leaning), torch.from_numpy(group), apart


def _silhouette(values: np.ndarray, group: np.ndarray, seed: int) -> float:
    from sklearn.metrics import silhouette_score

    share = min(1.0, SILHOUETTE_SAMPLES / len(values))
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(group == side)) for side in (False, True)]
    chosen = np.concatenate([part[: max(2, round(share * len(part)))] for part in rows])
    if group[chosen].all() or not group.any():  # all samples in one cluster
        return 0.0
    return float(silhouette_score(values[chosen], group[chosen]))
