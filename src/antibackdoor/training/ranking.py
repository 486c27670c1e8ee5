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


def top(scores: Tensor, count: int) -> Tensor:
    """The row numbers of the `count` highest scores, ties broken by row number, so that the choice is reproducible."""
    return torch.argsort(scores, descending=True, stable=True)[:count]
