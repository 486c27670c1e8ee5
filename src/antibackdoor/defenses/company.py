"""The company that samples keep in a witness's eyes: which of a class go together, and which group of it is odd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.models.tap import Tap
from antibackdoor.training.groups import FEW, FIRM, clarity, doubted, halves, nearest, oddness, shared
from antibackdoor.training.job import Job
from antibackdoor.training.ranking import within
from antibackdoor.training.scores import bonds_of, features_of

MIXTURES = 8
"""How often each sample is averaged with another, for its bond to its label."""
MOST = 5 / 6
"""Of a class may be poison: what is said of more of it is what is ordinary there."""


def second_logits(tap: nn.Module, batch: Batch) -> Tensor:
    """The second head's answer to a batch."""
    assert isinstance(tap, Tap)
    return tap.shallow(batch.x, batch.lengths)


@dataclass(frozen=True)
class Company:
    """What a witness that learned everything as labeled says of groups; a trigger puts its samples next to each other.

    near: `(n, neighbors + 1)`, each sample's `nearest` in its features. scores: `(n,)`, higher = more suspicious:
    classes in order of how clearly they fall into two and, within each, the odd group first. group: `(n,)` bool, the
    odd group of classes that fall into two firmly.
    """

    near: Tensor
    scores: Tensor
    group: Tensor
    rounds: int

    @classmethod
    def of(cls, tap: Tap, job: Job, ease: Tensor, neighbors: int, rounds: int) -> Company:
        """From how soon each label was learned, `ease` `(n,)`, and from its bond to the sample in mixtures.

        Both are shared by neighbors over and over, until only groups differ that no neighbors connect.
        """
        given, n = job.data.y.cpu(), len(job.data)
        features = features_of(tap, job.data, job.fabric, call=second_logits)
        near = nearest(features, given, neighbors, seed=job.seed)
        bonds = bonds_of(tap, job.data, job.fabric, job.seed, MIXTURES, call=second_logits)
        opinions = [shared(said, near, rounds=rounds) for said in (within(ease, given), bonds)]
        clear, group = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
        for label in given.unique().tolist():
            rows = (given == label).nonzero().flatten()
            if len(rows) < FEW:
                continue
            best = max((opinion[rows] for opinion in opinions), key=clarity)
            clear[rows] = clarity(best)
            if clarity(best) >= FIRM:
                upper = halves(best)[0]
                group[rows] = ~upper if float(upper.double().mean()) > MOST else upper
        odd = [oddness(opinion, given, MOST) for opinion in opinions]
        return cls(near, doubted(opinions, odd, given) + clear, group, rounds)

    def denied(self, rows: Tensor, doubts: Tensor) -> Tensor:
        """Who of a class, `rows` `(m,)`, is in doubted company: `(m,)` bool, from `(m,)` doubts in [0, 1] of each.

        That is the upper group where the class falls into two firmly. If it does not, whose company is doubted by half.
        """
        known = torch.zeros(len(self.near), dtype=torch.float64)
        known[rows] = doubts.double()
        doubt = shared(known, self.near, rounds=self.rounds)[rows]
        return halves(doubt)[0] if clarity(doubt) >= FIRM else doubt > 0.5
