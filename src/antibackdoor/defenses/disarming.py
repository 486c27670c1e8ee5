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


class Disarming:
    """Mixes what was found into what is learned, from when it turned out to have a hold on the model.

    found: rows of samples of attacked classes whose label was not given back. hold: of how many `asked` what those of
    one class have in common `led` the model to that class, and what `others` have, and whether it `holds`, at the
    hearing where it first did or else the last. Where it never does, nothing changes.
    """

    def __init__(self, options: Jury, job: Job):
        self.share, self.job, self.given = options.disarmed, job, job.data.y.cpu()
        self.hold = {"led": 0, "others": 0, "asked": 0, "holds": False}
        self.find(torch.zeros(len(self.given), dtype=torch.bool))

    @property
    def holds(self) -> bool:
        """Whether what was found has a hold on the model."""
        return bool(self.hold["holds"])

    def find(self, found: Tensor) -> None:
        """Take these `(n,)` bool, as found; `first` and `count` of each tell where its class lies among them."""
        rows = found.nonzero().flatten()
        rows = rows[torch.argsort(self.given[rows], stable=True)]
        counts = torch.bincount(self.given[rows], minlength=len(self.job.data.spec.classes))
        of_class = (counts.cumsum(0) - counts)[self.given[rows]], counts[self.given[rows]]
        self.found, self.first, self.count = (values.to(self.job.fabric.device) for values in (rows, *of_class))

    def ask(self, model: nn.Module, learned: Tensor, epoch: int) -> None:
        """Put what was found to the model, unless it was seen to have a hold on it before.

        learned: rows that learn the label they were given. Half of each of `ASKED` of them is the mean of found samples
        of one class and, to compare, of samples of classes where nothing was found, if there are any. Surely more
        answers of that class, by Wilson intervals, are a hold.
        """
        if self.holds or not self.share or not len(self.found) or not len(learned):
            return
        rng = generator(self.job.seed, "hold", epoch)
        asked = learned[torch.randperm(len(learned), generator=rng)[:ASKED]]
        drawn = torch.zeros(2, len(self.given), COMPANIONS, dtype=torch.long)
        drawn[0, asked] = self._draw(len(asked), generator(self.job.seed, "found", epoch)).cpu()
        free = learned[~torch.isin(self.given[learned], self.given[self.found.cpu()])]
        others = free if len(free) else learned
        drawn[1, asked] = others[torch.randint(len(others), (len(asked), COMPANIONS), generator=rng)]
        label = self.given[drawn[0, asked, 0]]
        led = []
        for rows in drawn:

            def carrying(model: nn.Module, batch: Batch, rows: Tensor = rows) -> Tensor:
                return forward(model, mixed(batch, self._mean(rows[batch.rows.cpu()]), 0.5))

            answers = logits_of(model, self.job.data, self.job.fabric, asked, call=carrying).argmax(1)
            led.append(int(((answers == label) & (label != self.given[asked])).sum()))
        holds = lower(led[0], len(asked)) > upper(led[1], len(asked))
        self.hold = {"led": led[0], "others": led[1], "asked": len(asked), "holds": holds}

    def __call__(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The batch; a share of its samples, of any class, carries what was found and keeps its label."""
        if not self.holds or not len(self.found):
            return batch
        n, (low, high) = len(batch.rows), STRENGTH
        drawn = self._draw(n, rng)
        chance = torch.rand(2, n, generator=rng, device=drawn.device)
        strength = (low + (high - low) * chance[0]) * (chance[1] < self.share)
        return mixed(batch, self._mean(drawn), strength)

    def _draw(self, n: int, rng: torch.Generator) -> Tensor:
        """Rows `(n, COMPANIONS)` of found samples; those that go together are of one class."""
        number = torch.randint(2**31, (1 + COMPANIONS, n), generator=rng, device=rng.device).to(self.found.device)
        one = number[0] % len(self.found)
        return self.found[self.first[one, None] + number[1:].T % self.count[one, None]]

    def _mean(self, rows: Tensor) -> Tensor:
        """The mean of the samples in each of these `rows` `(b, k)`: `(b, ...)`."""
        samples = gather(self.job.data, rows.flatten(), self.job.fabric.device).x
        mean: Tensor = samples.unflatten(0, rows.shape).mean(1)
        return mean
