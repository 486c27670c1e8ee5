"""The company that samples keep in a witness's eyes: which of a class go together, and which group of it is odd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.models.tap import Tap
from antibackdoor.training.groups import FIRM, FOREIGN, clarity, company, doubted, halves, odd, oddness, shared, sure
from antibackdoor.training.ranking import within

DIVIDED = 1.0
"""Clarity from which on opinions that were shared over and over divide a class: where nothing keeps groups apart all
agree in the end, and little is left of the clarity that noise has."""

HALFWAY = 0.5
"""Clarity of a division that is none, but tells more than noise of which of a class go together."""

SMALL = 100
"""A class of fewer samples falls into groups by itself: a dozen pictures of one thing, as frames of a film are, lie as
close to each other as poison does."""

DENIED = 2.5
"""Clarity from which on doubts that were shared once divide a class: hard but clean samples lie together, too."""

FIRST = 0.99
"""Share of all samples of other classes before which most of a class was learned, if it is poison: of the easiest clean
class of seven data sets it was 0.97, but for one that was most of its set."""

CERTAIN = 8.0
"""Clarity from which on a group of 20 or more counts as denied whatever it is taken for: the model doubts its label by
0.63 more than that of the rest of the class. A dozen clean samples of one odd kind reach that, too; more do not."""


def second_logits(tap: nn.Module, batch: Batch) -> Tensor:
    """The second head's answer to a batch."""
    assert isinstance(tap, Tap)
    return tap.shallow(batch.x, batch.lengths)


@dataclass(frozen=True)
class Outsiders:
    """Those who do not know the label of a sample, and what they see in it.

    number: of their opinion among all, in [0, 1]: how sure they are of another class. seen: `(n,)`, of which. kind:
    how far the classes seen in a group may be `alike` before it is one kind; poison was gathered from everywhere.
    """

    number: int
    seen: Tensor
    kind: float

    def one_kind(self, label: int, rows: Tensor, given: Tensor) -> bool:
        """Whether they take a group of `label`, these `rows`, for one class; then it is a kind of its own."""
        return alike(label, self.seen[rows], given) >= self.kind


@dataclass(frozen=True)
class Company:
    """What opinions about samples say of groups, after they were shared over and over by neighbors of the same label.

    A trigger puts its samples next to each other in the features of whoever learned it. What is noise in single samples
    averages out, and in the end only groups differ that no neighbors connect.

    given: `(n,)`, labels. near: `(n, neighbors + 1)`, each sample's `nearest`. most: of each class, the share from
    which on the upper group is what is ordinary there; 1 where an opinion is `sure` of so large an upper group, where
    that is rather at home `elsewhere`, or was learned `before_all`: then most of the class is poison, and no opinion's
    upper group is ordinary. opinions:
    `(o, n)`, shared `rounds` times; the first is how early samples were learned, which tells groups apart but not which
    of them is odd, since a class may be easier than its poison. other: `(n,)` in [0, 1], an opinion that tells that of
    its groups: one that divides the class itself or, where none does, what `outsiders` say, if there are any.
    suspicion: `(n,)`, percentile within the label of being `odd` in the opinions that divide it. clear: how clearly
    each opinion divides each class.
    """

    given: Tensor
    near: Tensor
    rounds: int
    most: Sequence[float]
    opinions: Tensor
    suspicion: Tensor
    clear: Sequence[Sequence[float]]
    other: Tensor | None = None
    outsiders: Outsiders | None = None

    @classmethod
    def of(
        cls,
        opinions: Sequence[Tensor],
        given: Tensor,
        near: Tensor,
        classes: int,
        *,
        rounds: int,
        most: float,
        outsiders: Outsiders | None = None,
        early: Tensor | None = None,
    ) -> Company:
        """From `(n,)` opinions about single samples; higher = more suspicious, unless nearly all are high.

        early: `(n,)`, how early each was learned among all samples, higher = earlier; the first opinion tells it within
        the class only.
        """
        shares = torch.stack([shared(opinion, near, rounds=rounds) for opinion in opinions])
        groups = [(given == label).nonzero().flatten() for label in range(classes)]
        heard = [shares[:, rows] for rows in groups]
        home = None if outsiders is None else outsiders.number

        def limit(label: int) -> float:
            part = heard[label]
            # A class that is most of the set wins mixtures by that alone, and poison is not most of a set.
            if 2 * part.shape[1] > len(given):
                return most
            foreign = any(sure(opinion, most) for opinion in part)
            if early is not None:
                others = early[given != label]
                foreign |= before_all(part[0], early[groups[label]], others, near.shape[1] - 1, most)
            if outsiders is not None:
                for number, opinion in enumerate(part):
                    theirs = number == outsiders.number
                    if not theirs and elsewhere(opinion, part[outsiders.number], near.shape[1] - 1, most):
                        # A clean class may look like another one; poison looks like many.
                        foreign |= not outsiders.one_kind(label, groups[label][halves(opinion)[0]], given)
            return 1.0 if foreign else most

        limits = [limit(label) for label in range(classes)]
        clear = [[clear_in(opinion, near.shape[1] - 1) for opinion in part] for part in heard]
        other = None if home is None else opinions[home].double()
        if other is not None:
            for label, found in enumerate(clear):
                for number in range(1, len(found)):
                    if number != home and found[number] >= DIVIDED:
                        other = torch.where(given == label, opinions[number].double(), other)
        odd_in = [oddness(share, given, limits, None if number else other) for number, share in enumerate(shares)]
        suspicion = doubted(list(shares), odd_in, given, DIVIDED)
        return cls(given, near, rounds, limits, shares, suspicion, clear, other, outsiders)

    @property
    def clearest(self) -> Tensor:
        """`(K,)` float64: how clearly the clearest opinion divides each class."""
        return torch.tensor([max(clear) for clear in self.clear], dtype=torch.float64)

    @property
    def strangeness(self) -> Tensor:
        """`(n,)`: the suspicion, but in a divided class how far what is said of a sample lies from what most hear.

        The `odd` group of the clearest opinion comes first; of the others whoever lies furthest, in any opinion and to
        either side, from their median: poison of many classes falls into as many groups, and not all of these are odd.
        The least strange are in the middle of their class, the least suspicious as far from the odd as can be: who has
        other witnesses to find the groups that are not odd had better trust these.
        """
        strange = self.suspicion.clone()
        for label, clear in enumerate(self.clear):
            if max(clear) >= DIVIDED:
                rows = (self.given == label).nonzero().flatten()
                heard = self.opinions[:, rows]
                group = self._odd(clear.index(max(clear)), label, rows)
                ordinary = heard[:, ~group].median(1, keepdim=True).values
                strange[rows] = (2 * group + (heard - ordinary).abs().amax(0)).to(strange)
        return within(strange, self.given)

    def apart(self, enough: Sequence[float]) -> Tensor:
        """`(n,)` bool: the odd group of each class that an opinion divides with at least its clarity in `enough`."""
        return self.apart_by(enough).any(0)

    def apart_by(self, enough: Sequence[float]) -> Tensor:
        """The same, for each opinion by itself: `(o, n)` bool."""
        groups = torch.zeros(len(enough), len(self.given), dtype=torch.bool)
        for label, clear in enumerate(self.clear):
            rows = (self.given == label).nonzero().flatten()
            for number, (found, least) in enumerate(zip(clear, enough, strict=True)):
                if found >= least:
                    groups[number, rows] = self._odd(number, label, rows)
        return groups

    def believed(self, enough: Sequence[float]) -> Company:
        """The same, without divisions that would count beyond doubt but that clean samples make, too.

        enough: of each opinion, the clarity that counts. In a class of fewer than `SMALL` none is believed, nor is it
        believed of outsiders that a group is odd that they take for one kind.
        """
        clear = [list(found) for found in self.clear]
        for label, found in enumerate(clear):
            rows = (self.given == label).nonzero().flatten()
            for number, least in enumerate(enough):
                if found[number] < least:
                    continue
                by = self.outsiders if self.outsiders and number == self.outsiders.number else None
                group = rows[self._odd(number, label, rows)]
                if len(rows) < SMALL or (by and by.one_kind(label, group, self.given)):
                    found[number] = 0.0
        return replace(self, clear=clear)

    def _odd(self, number: int, label: int, rows: Tensor) -> Tensor:
        """The odd group of a class in the opinion of this number: `(m,)` bool of its `rows`."""
        other = None if number or self.other is None else self.other[rows]
        return odd(self.opinions[number, rows], self.most[label], other)

    def nearby(self, opinions: Sequence[Tensor], rounds: int) -> Tensor:
        """Suspicion `(n,)` by the same opinions about single samples, shared only so often; for classes not divided.

        Percentile within the label of the oddest that is said of a sample. What has not travelled far is noisier, so
        more clarity is asked of an opinion that is to count alone. Poison of a few samples divides nothing and was
        learned early; but where ease comes `HALFWAY` to dividing a class, that may be early and its poison late.
        """
        shares = [shared(opinion, self.near, rounds=rounds) for opinion in opinions]
        halfway = torch.tensor([clear[0] >= HALFWAY for clear in self.clear])[self.given]
        told = oddness(shares[0], self.given, [1.0] * len(self.clear), self.other)
        odd_in = [
            torch.where(halfway, told, within(shares[0], self.given)),
            *(oddness(share, self.given, self.most) for share in shares[1:]),
        ]
        return doubted(shares, odd_in, self.given)

    def denied(self, rows: Tensor, doubts: Tensor, taught: Tensor) -> Tensor:
        """Who of a class, `rows` `(m,)`, is in doubted company: `(m,)` bool, from `(m,)` doubts in [0, 1] of each.

        That is whoever's far company is doubted by half, and the upper group where doubts divide the class: shared over
        and over or, since who answers has learned the class and is less noisy than the opinions above, once. Where
        those are doubted by half that it was `taught` (`(m,)` bool), it has not learned the class yet: then its doubt
        counts where it divides the class, and against a group that was `apart` before.
        """
        known = torch.zeros(len(self.near), dtype=torch.float64)
        known[rows] = doubts.double()
        once, far = (shared(known, self.near, rounds=rounds)[rows] for rounds in (1, self.rounds))
        denied = far > 0.5
        if taught.any() and float(far[taught].mean()) > 0.5:
            denied &= self.apart([FIRM] * len(self.opinions))[rows]
        for doubt, enough in ((once, DENIED), (far, DIVIDED)):
            if clarity(doubt) >= enough:
                denied |= halves(doubt)[0]
        return denied


def alike(label: int, answers: Tensor, given: Tensor) -> float:
    """How far the classes in `answers` are off those of all samples `given` `(n,)` that are not of `label`.

    Total variation distance of the two distributions, in [0, 1]; 1 where there are no answers.
    """
    return 1.0 if len(answers) == 0 else distance(torch.bincount(answers), torch.bincount(given[given != label]))


def distance(counts: Tensor, others: Tensor) -> float:
    """Total variation distance between two distributions, in [0, 1], given as weights `(K,)`."""
    length = max(len(counts), len(others))
    shares = [F.pad(w.double() / w.sum().clamp_min(1e-12), (0, length - len(w))) for w in (counts, others)]
    return float((shares[0] - shares[1]).clamp_min(0).sum())


def elsewhere(opinion: Tensor, home: Tensor, neighbors: int, most: float) -> bool:
    """Whether an opinion divides a class so that more than `most`, the upper group, are rather at `home` elsewhere."""
    if clear_in(opinion, neighbors) < DIVIDED:
        return False
    upper = halves(opinion)[0]
    gap = float(home[upper].mean() - home[~upper].mean())
    return gap >= FOREIGN and float(upper.double().mean()) > most


def before_all(opinion: Tensor, early: Tensor, others: Tensor, neighbors: int, most: float) -> bool:
    """Whether ease divides a class so that more than `most`, the upper group, were learned before nearly all `others`.

    early, others: how early the class and all other samples were learned; higher = earlier.
    """
    if len(others) == 0 or clear_in(opinion, neighbors) < DIVIDED:
        return False
    upper = halves(opinion)[0]
    if float(upper.double().mean()) <= most:
        return False
    behind = torch.searchsorted(others.sort().values, early[upper])
    return float(behind.double().mean()) >= FIRST * len(others)


def clear_in(opinion: Tensor, neighbors: int) -> float:
    """Clarity of shared opinions in a class, as the noise would have it that only `neighbors` sharers leave.

    The mean of few opinions is noisy, and divides a small class by itself.
    """
    if len(opinion) < 2:
        return 0.0
    return clarity(opinion) * math.sqrt(max(company(len(opinion), neighbors), 1) / max(neighbors, 1))
