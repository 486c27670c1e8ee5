"""Disarming: what was found in attacked classes goes with every label alike, so that it leads to none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather, mixed
from antibackdoor.intervals import lower, upper
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import forward
from antibackdoor.training.scores import logits_of

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury

COMPANIONS = 3
"""Samples whose mean others carry: it shows what they have in common, and little of what each of them shows."""

STRENGTH = (0.3, 0.7)
"""How large a part of a sample that mean may be. More than half, as no single sample in it has so large a part."""

ASKED = 2048
"""Samples, at most, that tell whether what was found has a hold on the model."""

FAINT = 0.4
"""How large a part of a sample that mean is when the model is asked: at half, what any class looks like leads to it."""

AGAIN = 1.5
"""How many times as often what was found has to lead the model as what others show does: classes differ in that."""


class Disarming:
    """Mixes what was found into what is learned, from when it turned out to have a hold on the model.

    found: rows of samples of attacked classes whose label was not given back. hold: of how many `asked` what those of
    one class have in common `led` the model to that class, the same of what samples of one `other` class have, and
    whether it `holds`, at the hearing where it first did or else the last. Where it never does, nothing changes.
    """

    def __init__(self, options: Jury, job: Job):
        self.share, self.job, self.given = options.disarmed, job, job.data.y.cpu()
        self.hold = {"led": 0, "asked": 0, "others_led": 0, "others_asked": 0, "holds": False}
        self.find(torch.zeros(len(self.given), dtype=torch.bool))

    @property
    def holds(self) -> bool:
        """Whether what was found has a hold on the model."""
        return bool(self.hold["holds"])

    def find(self, found: Tensor) -> None:
        """Take these `(n,)` bool, as found."""
        self.found = Kinds(found.nonzero().flatten(), self.given, self.job.fabric.device)

    def ask(self, model: nn.Module, learned: Tensor, epoch: int) -> None:
        """Put what was found to the model, unless it was seen to have a hold on it before.

        learned: rows that learn the label they were given. `FAINT` in `ASKED` of them is the mean of found samples of
        one class and, to compare, of learned samples of a class where nothing was found: what a class looks like leads
        to it, too, and some class is answered whenever a model is at a loss. Answers of the class that they come from,
        surely more by Wilson intervals and `AGAIN` as many as the others give of theirs or of that class, are a hold.
        """
        elsewhere = learned[~torch.isin(self.given[learned], self.given[self.found.rows.cpu()])]
        if self.holds or not self.share or not len(self.found.rows) or not len(elsewhere):
            return
        chosen = torch.randperm(len(learned), generator=generator(self.job.seed, "hold", epoch))
        asked = learned[chosen[:ASKED]]
        others = Kinds(elsewhere, self.given, self.found.rows.device)
        answers, labels = zip(
            self._carrying(model, asked, self.found, generator(self.job.seed, "found", epoch)),
            self._carrying(model, asked, others, generator(self.job.seed, "others", epoch)),
            strict=True,
        )

        def led(answers: Tensor, labels: Tensor) -> tuple[int, int]:
            free = labels != self.given[asked]
            return int((free & (answers == labels)).sum()), int(free.sum())

        found = led(answers[0], labels[0])
        control = max((led(answers[1], of) for of in labels), key=lambda counts: upper(*counts))
        self.hold = {"led": found[0], "asked": found[1], "others_led": control[0], "others_asked": control[1]}
        self.hold["holds"] = plainly_more(found, control)

    def _carrying(self, model: nn.Module, asked: Tensor, kinds: Kinds, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the model answers to those asked when they carry some of `kinds`, and the class of what they carry."""
        drawn = torch.zeros(len(self.given), COMPANIONS, dtype=torch.long)
        drawn[asked] = kinds.draw(len(asked), rng).cpu()

        def carrying(model: nn.Module, batch: Batch) -> Tensor:
            return forward(model, mixed(batch, self._mean(drawn[batch.rows.cpu()]), FAINT))

        answers = logits_of(model, self.job.data, self.job.fabric, asked, call=carrying).argmax(1)
        return answers, self.given[drawn[asked, 0]]

    def __call__(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The batch; a share of its samples, of any class, carries what was found and keeps its label."""
        if not self.holds or not len(self.found.rows):
            return batch
        n, (low, high) = len(batch.rows), STRENGTH
        drawn = self.found.draw(n, rng)
        chance = torch.rand(2, n, generator=rng, device=drawn.device)
        strength = (low + (high - low) * chance[0]) * (chance[1] < self.share)
        return mixed(batch, self._mean(drawn), strength)

    def _mean(self, rows: Tensor) -> Tensor:
        """The mean of the samples in each of these `rows` `(b, k)`: `(b, ...)`."""
        samples = gather(self.job.data, rows.flatten(), self.job.fabric.device).x
        mean: Tensor = samples.unflatten(0, rows.shape).mean(1)
        return mean


def plainly_more(found: tuple[int, int], others: tuple[int, int]) -> bool:
    """Whether a share, as a count of how many, is surely larger than another and `AGAIN` times as large."""
    if not found[1] or not others[1]:
        return False
    return lower(*found) > upper(*others) and found[0] / found[1] >= AGAIN * others[0] / others[1]


class Kinds:
    """Rows to draw from, so that those that are drawn together are of one class; `first` and `count` tell its place."""

    def __init__(self, rows: Tensor, given: Tensor, device: torch.device):
        rows = rows[torch.argsort(given[rows], stable=True)]
        counts = torch.bincount(given[rows], minlength=int(given.max()) + 1)
        of_class = (counts.cumsum(0) - counts)[given[rows]], counts[given[rows]]
        self.rows, self.first, self.count = (values.to(device) for values in (rows, *of_class))

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """`(n, COMPANIONS)` rows; a class comes as often as it has rows."""
        number = torch.randint(2**31, (1 + COMPANIONS, n), generator=rng, device=rng.device).to(self.rows.device)
        one = number[0] % len(self.rows)
        return self.rows[self.first[one, None] + number[1:].T % self.count[one, None]]
