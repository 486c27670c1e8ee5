"""Groups among samples of one class: opinions shared by neighbors, and where a class falls into two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from antibackdoor.seeds import generator
from antibackdoor.training.ranking import within

FEW = 20
"""In a class of fewer samples no group can be told from the rest."""
CHUNK = 2048
"""Samples whose distances are computed at once."""


def nearest(features: Tensor, labels: Tensor, neighbors: int, *, most: int = 4096, seed: int = 0) -> Tensor:
    """The rows `(n, neighbors + 1)` int64 nearest to each sample by cosine among those of its label, nearest first.

    features `(n, D)`, labels `(n,)`. A sample is its own nearest; -1 beyond the `company` that a small class gives. Of
    a label with more than `most` samples, random `most` are asked, so that time grows with n and not with its square.
    """
    found = torch.full((len(labels), neighbors + 1), -1)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        count = company(len(rows), neighbors) + 1
        asked = rows
        if len(rows) > most:
            asked = rows[torch.randperm(len(rows), generator=generator(seed, "neighbors", label))[:most]]
        known = F.normalize(features[asked].float(), dim=1)
        for part in rows.split(CHUNK):
            near = (F.normalize(features[part].float(), dim=1) @ known.T).topk(count, dim=1).indices
            found[part, :count] = asked[near]
    return found


def shared(opinions: Tensor, near: Tensor, neighbors: int | None = None, *, rounds: int = 1) -> Tensor:
    """Each sample's opinion `(n,)` averaged with those of its `nearest`, all or `neighbors` of them; float64.

    A noisy opinion about single samples becomes a sharp one about groups, if only the features keep them apart. The
    more `rounds`, the further an opinion travels: all of a class come to agree but where no neighbors lead across.
    """
    opinions, near = opinions.double(), near if neighbors is None else near[:, : neighbors + 1]
    for _ in range(rounds):
        opinions = torch.cat(
            [torch.where(part >= 0, opinions[part], 0.0).sum(1) / (part >= 0).sum(1) for part in near.split(CHUNK)]
        )
    return opinions


def company(m: int, neighbors: int) -> int:
    """With how many others a sample of a class of m shares: more than a tenth would drown a group in the rest."""
    return min(neighbors, max(1, m // 10), m - 1)


FOREIGN = 0.1
"""By how much more is said of one part of a class than of the rest of it, in the mean, if that means anything."""


def odd(values: Tensor, most: float, other: Tensor | None = None) -> Tensor:
    """The odd one of the `halves` of `(m,)`, bool: the upper, or the lower if an `other` opinion, in [0, 1], says so.

    But never more than `most` of all, which is what is ordinary.
    """
    group = halves(values)[0]
    if other is not None and float(other[~group].mean() - other[group].mean()) >= FOREIGN:
        group = ~group
    return ~group if float(group.double().mean()) > most else group


SURE = 0.9
"""A level that clean samples of a class do not reach together while others of the class stay below a half: what they
show is theirs, and some of it shows in the others as well."""


def sure(values: Tensor, most: float) -> bool:
    """Whether `(m,)` opinions in [0, 1] are all but certain of more than `most`, and of the others not even by half.

    Then the upper of the `halves` is odd even if it is most of its class. In a class of less than `FEW` nothing is.
    """
    if len(values) < FEW:
        return False
    upper = halves(values)[0]
    certain = float(values[upper].mean()) >= SURE and float(values[~upper].mean()) < 0.5
    return certain and float(upper.double().mean()) > most


def oddness(opinions: Tensor, labels: Tensor, most: Sequence[float], other: Tensor | None = None) -> Tensor:
    """Percentile `(n,)` in (0, 1), within its label, of how far towards the `odd` end a sample's opinion lies.

    most: of each class, by its number. other: `(n,)`, as `odd` reads it.
    """
    toward = opinions.double().clone()
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        if len(rows) > 1:
            group = odd(toward[rows], most[label], None if other is None else other[rows])
            if toward[rows][group].mean() < toward[rows][~group].mean():
                toward[rows] *= -1
    return within(toward, labels)


FIRM = 1.5
"""Clarity from which on a division is believed: one normal distribution of standard deviation s has about 4.2 s, so
that shared confidences would have to spread over all of [0, 1] to reach it without two groups."""


def doubted(opinions: Sequence[Tensor], oddness: Sequence[Tensor], labels: Tensor, firm: float = FIRM) -> Tensor:
    """Percentile `(n,)` within its label of the oddest that is said of a sample.

    opinions: `(n,)` each; oddness: of a sample in each of them. Which of them knows something differs from class to
    class. In a class that some divide with a clarity of `firm`, nobody else is asked.
    """
    worst = torch.zeros(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        clear = [own[rows] for opinion, own in zip(opinions, oddness, strict=True) if clarity(opinion[rows]) >= firm]
        worst[rows] = torch.stack(clear or [own[rows] for own in oddness]).amax(0).double()
    return within(worst, labels)


def clarity(values: Tensor) -> float:
    """How clearly `(m,)` shares or confidences fall into two groups: Ashman's D of their `halves` times their distance.

    So the halves have to lie apart both in their own spread, which is taken to be at least `SHARP` (a few samples agree
    by chance), and by what the values mean.
    """
    if len(values) < 2:
        return 0.0
    group, apart = halves(values.double())
    distance = abs(float(values[group].mean() - values[~group].mean()))
    return min(apart, distance / SHARP) * distance


SHARP = 0.05
"""Least spread of a group of opinions that all lie in [0, 1]."""


def halves(values: Tensor) -> tuple[Tensor, float]:
    """The cut of `(m,)` numbers into two groups of least variance, and how far they lie apart.

    Returns the group `(m,)` bool whose values lie further from zero, and Ashman's D, |mean_1 - mean_2| over the root
    mean variance of the groups: 2.6 for one normal distribution cut in its middle, 3.5 for a uniform one.
    """
    ordered, order = values.sort()
    m = len(values)
    counts = torch.arange(1, m, dtype=torch.float64)
    sums = ordered.cumsum(0)
    between = (sums[:-1] - counts * sums[-1] / m) ** 2 / (counts * (m - counts))
    cut = int(between.argmax()) + 1
    low, high = ordered[:cut], ordered[cut:]
    spread = ((low.var(correction=0) + high.var(correction=0)) / 2).sqrt()
    group = torch.zeros(m, dtype=torch.bool)
    group[order[cut:] if float((high**2).mean()) > float((low**2).mean()) else order[:cut]] = True
    # Two groups of equal values are as far apart as can be; the bound keeps the number finite.
    return group, min(1e6, float((high.mean() - low.mean()) / spread.clamp_min(1e-300)))
