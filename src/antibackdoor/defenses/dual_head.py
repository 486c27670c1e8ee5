"""The second objective of E2ABL: dual training on a partition of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, sent
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.defenses.company import Company, second_logits
from antibackdoor.defenses.suspects import suspects_of
from antibackdoor.defenses.trap import Trap
from antibackdoor.files import Tree
from antibackdoor.models.tap import Tap
from antibackdoor.training.groups import FEW, FIRM
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Objective, Step
from antibackdoor.training.ranking import top
from antibackdoor.training.scores import logits_of

if TYPE_CHECKING:
    from antibackdoor.defenses.e2abl import E2ABL


class Dual(Objective):
    """Dual training on the current partition; keeps one `Partition` an epoch for the judge."""

    def __init__(self, options: E2ABL, job: Job, trap: Trap):
        self.options, self.job, self.trap = options, job, trap
        self.given = job.data.y.cpu()
        n = len(self.given)
        self.isolated_count = max(1, round(options.isolation_rate * n))
        self.recovered_count = min(self.isolated_count, max(options.recovery_floor, round(options.recovery_rate * n)))
        self.partitions: list[Partition] = []
        self.scores, self.ranked = torch.zeros(n, dtype=torch.float64), False
        self.company: Company | None = None
        self.backdoor_class = -1
        self.asked: Tensor | None = None  # what h1 first said of isolated samples labeled y_b, -1 elsewhere
        self.rest = [0, 0]  # how many of the other samples labeled y_b it took for another class then, of how many

    def partition(self, tap: Tap, epoch: int) -> None:
        """Split by the ranking as it stands and, once h1 has learned something, recover labels from it."""
        isolated, suspects, probation = self._isolate(tap, epoch)
        recovered, labels = suspects.clone(), self.given.clone()
        if self._ready(epoch) and isolated.any():
            if self.asked is None:
                self._ask(tap, isolated)
            assert self.asked is not None
            if self.options.remainder == "agree":
                agreed = self.asked == self.backdoor_class
                recovered = torch.where(self.asked >= 0, ~agreed, recovered)
                isolated &= ~(probation & agreed)
            rows = recovered.nonzero().flatten()
            logits = logits_of(tap.backbone, self.job.data, self.job.fabric, rows)
            logits[:, self.backdoor_class] = -torch.inf
            labels[rows] = logits.argmax(1)
        own = self.scores if self.options.refresh == "epoch" else None  # else the ranking stays what it is
        self._set(Partition(epoch, isolated, recovered, labels, own))

    def _isolate(self, tap: Tap, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """D_p; what is recovered of it in any case; what returns from it if h1 agrees with its label."""
        o = self.options
        isolated, suspects, probation = (torch.zeros(len(self.given), dtype=torch.bool) for _ in range(3))
        if o.warm_up is None and epoch == 0:  # nothing is known before the first epoch
            return isolated, suspects, probation
        if not self.ranked or o.refresh == "epoch":
            self.ranked = True
            self.company = self.trap.company(tap)
            if self.company is None:
                self.scores = self.trap.ranking.scores()
            else:  # class after class, the one that falls into two most clearly first
                large = torch.bincount(self.given, minlength=len(self.company.clear)) >= FEW
                self.scores = self.company.strangeness + (self.company.clearest * large)[self.given]
        scores = self.scores
        order = top(scores, self.isolated_count)
        first = order[: self.recovered_count]
        answers = logits_of(tap, self.job.data, self.job.fabric, first, call=second_logits).argmax(1)
        self.backdoor_class = int(answers.mode().values)
        of_class = self.given == self.backdoor_class
        isolated[order] = True
        if float(of_class[first].double().mean()) >= o.predominance:
            suspects[order if o.remainder == "recover" else first] = True
        if o.recover_only_backdoor_label:
            suspects &= of_class
        if o.remainder in {"return", "agree"}:
            isolated &= of_class | suspects
        if o.remainder == "agree":
            rows = of_class.nonzero().flatten()
            probation[rows[top(scores[rows], round(o.probation * len(rows)))]] = True
            if self.company is not None:  # a whole class may come first: the least suspicious of it teach h1
                isolated = suspects | (self.company.apart((FIRM, FIRM)) & of_class)
            probation &= ~isolated
        return isolated | probation, suspects, probation

    def _ask(self, tap: Tap, isolated: Tensor) -> None:
        """What h1 says of all samples labeled y_b, before it is taught any recovered label; of their company, if known.

        Asked once: later it would only repeat what it was taught since.
        """
        rows = (self.given == self.backdoor_class).nonzero().flatten()
        logits = logits_of(tap.backbone, self.job.data, self.job.fabric, rows)
        answers = logits.argmax(1)
        if self.company is not None:
            doubts = 1 - logits.double().softmax(1)[:, self.backdoor_class]
            denied = self.company.denied(rows, doubts, ~isolated[rows])
            logits[:, self.backdoor_class] = -torch.inf
            answers = torch.where(denied, logits.argmax(1), self.backdoor_class)
        self.asked = torch.full_like(self.given, -1)
        self.asked[rows] = torch.where(isolated[rows], answers, -1)
        rest = answers[~isolated[rows]]
        self.rest = [int((rest != self.backdoor_class).sum()), len(rest)]

    def _ready(self, epoch: int) -> bool:
        """Whether h1 has seen enough to be asked for the true classes of D*."""
        delay = self.options.recovery_delay * self.job.recipe(self.options.main).epochs_for(len(self.job.data))
        return self.options.control == "recover" and epoch >= delay

    def _set(self, partition: Partition) -> None:
        device = self.job.fabric.device
        use_recovered = self._ready(partition.epoch) or self.options.control == "unlearn"
        in_main = ~partition.isolated | partition.recovered if use_recovered else ~partition.isolated
        self.in_main, self.labels = in_main, partition.labels.to(device)
        self.isolated = partition.isolated.to(device)
        sign = torch.ones(len(in_main))
        if self.options.control == "unlearn":
            sign[partition.recovered] = -1
        self.sign = sign.to(device)
        self.partitions.append(partition)

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Eq. 4 in one pass; every sample weighs the same, whichever head it goes to."""
        # In main memory: how many samples go to the main head must be known before the device has come so far.
        rows, use = batch.rows, self.in_main[batch.rows.cpu() if batch.known is None else batch.known]
        own = sent(torch.from_numpy(np.flatnonzero(use.numpy())), rows.device)
        assert isinstance(model, Tap)
        main, second = model(batch.x, batch.lengths, main=use, detach=self.options.stem_gradient == "detached")
        main_losses = F.cross_entropy(main.float(), self.labels[rows[own]], reduction="none")
        second_losses = F.cross_entropy(second.float(), batch.y, reduction="none")
        total = (main_losses * self.sign[rows[own]]).sum() + (second_losses * self.isolated[rows]).sum()
        seen = torch.full_like(second_losses, torch.nan).index_copy(0, own, main_losses.detach())
        return Step(total / len(rows), {"main": seen, "second": second_losses.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Rank again from the losses that the pass has given anyway (`refresh`), and make the next partition."""
        before, trapped = self.partitions[-1].isolated, records["second"][self.isolated]
        if self.options.refresh == "epoch":
            self.trap.ranking.add(records["second"])
        assert isinstance(model, Tap)
        self.partition(model, epoch)
        return {
            "main_loss": float(torch.nanmean(records["main"])),
            **({"second_loss": float(trapped.mean())} if len(trapped) else {}),
            "churn": float((before != self.partitions[-1].isolated).double().mean()),
        }

    def state(self) -> Tree:
        """The ranking, the partitions so far and the backdoor class."""
        kept = [[p.epoch, p.isolated, p.recovered, p.labels, p.scores] for p in self.partitions]
        return {
            "ranking": self.trap.ranking.state(),
            "scores": self.scores,
            "ranked": self.ranked,
            "partitions": kept,
            "backdoor_class": self.backdoor_class,
            "asked": self.asked,
            "rest": self.rest,
        }

    def load(self, state: Tree) -> None:
        """Back to the last partition, used as it was."""
        self.trap.ranking.load(state["ranking"])
        self.scores, self.ranked = state["scores"], state["ranked"]
        self.backdoor_class, self.asked = state["backdoor_class"], state["asked"]
        self.rest = state["rest"]
        kept = [Partition(*values) for values in state["partitions"]]
        self.partitions = kept[:-1]
        self._set(kept[-1])

    def outcome(self, tap: Tap) -> Outcome:
        """Judge the samples by the ranking and by what the main head said before it was taught their labels."""
        logits = logits_of(tap.backbone, self.job.data, self.job.fabric)
        asked = torch.full_like(self.given, -1) if self.asked is None else self.asked
        found = suspects_of(
            tap.backbone, self.job.data, self.scores, logits, asked, self.backdoor_class, self.partitions
        )
        found.evidence["disagree_in_rest_of_class"] = {"count": self.rest[0], "n": self.rest[1]}
        found.evidence["parameters"] = tap.parameter_counts()
        return replace(found, witness=(tap, second_logits))
