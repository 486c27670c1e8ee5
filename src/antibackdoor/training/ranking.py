"""Rankings that watch each sample's loss from epoch to epoch; higher score = more suspicious."""

from __future__ import annotations

import torch
from torch import Tensor

from antibackdoor.files import Tree

EPSILON = 0.01
"""Losses below this count as equally small: how far below is noise, and would outweigh everything else in a log."""


class LossDrop:
    """Eq. 5 of E2ABL with the sign that its text asks for: `sum_i (L_{i-1} - L_i) * w_i` over entries i = 2, 3, ...

    weights: "square" w_i = 1/(i-1)^2 as printed, "linear" 1/(i-1), "uniform" 1.
    Keeps two numbers a sample, whatever the number of epochs.
    """

    def __init__(self, n: int, weights: str = "square"):
        self.power = {"square": 2, "linear": 1, "uniform": 0}[weights]
        self.seen = 0
        self.last, self.total = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)

    def add(self, losses: Tensor) -> None:
        """The next entry of the loss history, `(n,)`; NaN keeps a sample's last loss."""
        current = torch.where(losses.isnan(), self.last, losses.double().cpu())
        if self.seen:
            self.total += (self.last - current) / self.seen**self.power
        self.last, self.seen = current, self.seen + 1

    def scores(self) -> Tensor:
        """`(n,)` float64."""
        return self.total.clone()

    def state(self) -> Tree:
        """For a checkpoint."""
        return {"seen": self.seen, "last": self.last, "total": self.total}

    def load(self, state: Tree) -> None:
        """From a checkpoint."""
        self.seen, self.last, self.total = state["seen"], state["last"], state["total"]


class Persistence:
    """Minus the mean log loss over all entries after the first `skip`: `-mean_i log(L_i + epsilon)`.

    When a backdoor is learned depends on steps, batch and augmentation, so the size of any single drop says little.
    But once learned it stays learned, while easy clean samples come and go: the mean over many epochs does not depend
    on the moment. Keeps one number a sample.
    """

    def __init__(self, n: int, skip: int):
        self.skip = skip
        self.seen = 0
        self.total = torch.zeros(n, dtype=torch.float64)

    def add(self, losses: Tensor) -> None:
        """The next entry of the loss history, `(n,)`."""
        self.seen += 1
        if self.seen > self.skip:
            self.total -= (losses.double().cpu() + EPSILON).log()

    def scores(self) -> Tensor:
        """`(n,)` float64."""
        return self.total / max(1, self.seen - self.skip)

    def state(self) -> Tree:
        """For a checkpoint."""
        return {"seen": self.seen, "total": self.total}

    def load(self, state: Tree) -> None:
        """From a checkpoint."""
        self.seen, self.total = state["seen"], state["total"]


def geometric(steps: int, count: int, first: int = 12) -> frozenset[int]:
    """At most `count` moments between step `first` and the last of `steps`, each later by the same factor.

    What separates poison from clean samples may happen within 50 steps or within 2,000, depending on the data; looks
    whose distance grows with the steps taken serve both.
    """
    first = min(first, steps)
    factor = (steps / first) ** (1 / max(1, count - 1))
    return frozenset(min(steps, round(first * factor**i)) for i in range(count)) | {steps}


def within(scores: Tensor, labels: Tensor) -> Tensor:
    """Percentile `(n,)` in (0, 1) of each score among those of its label; ties follow the row number."""
    percentile = torch.empty(len(scores), dtype=torch.float64)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        order = scores[rows].argsort(stable=True)
        percentile[rows[order]] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return percentile


def top(scores: Tensor, count: int) -> Tensor:
    """The row numbers of the `count` highest scores, ties broken by row number, so that the choice is reproducible."""
    return torch.argsort(scores, descending=True, stable=True)[:count]
