"""The two objectives of E2ABL: warm-up of the second head, and dual training on a partition of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.defenses.suspects import suspects_of
from antibackdoor.files import Tree
from antibackdoor.models.tap import Tap
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Objective, Step
from antibackdoor.training.ranking import LossDrop, Persistence, top
from antibackdoor.training.scores import logits_of, losses, mixed_logits_of

if TYPE_CHECKING:
    from antibackdoor.defenses.e2abl import E2ABL


def second_logits(tap: nn.Module, batch: Batch) -> Tensor:
    """The second head's answer to a batch."""
    assert isinstance(tap, Tap)
    return tap.shallow(batch.x, batch.lengths)


class Trap(Objective):
    """The warm-up: cross entropy of h2 alone, and the ranking fed with its losses."""

    def __init__(self, options: E2ABL, job: Job):
        self.options, self.job = options, job
        n = len(job.data)
        if options.ranking == "loss_drop" or options.warm_up is None:
            self.ranking: LossDrop | Persistence = LossDrop(n, options.drop_weights)
        else:
            entries = options.warm_up.epochs_for(n) + (options.loss_history == "init")
            entries *= 1 + (options.mixing and options.loss_history != "running")
            self.ranking = Persistence(n, skip=entries - max(1, round(options.window * entries)))

    def look(self, tap: nn.Module, epoch: int) -> None:
        """One entry of the history: the loss of every sample as it is and, with `mixing`, mixed with another class."""
        data, fabric = self.job.data, self.job.fabric
        self.ranking.add(losses(logits_of(tap, data, fabric, call=second_logits), data.y))
        if self.options.mixing:
            rng = generator(self.job.seed, "mixing", epoch)
            self.ranking.add(losses(mixed_logits_of(tap, data, fabric, rng, call=second_logits), data.y))

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Only the shallow layers and h2 are computed."""
        values = F.cross_entropy(second_logits(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"second": values.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Feed the ranking: losses seen while training, or one evaluation pass of the shallow part."""
        if self.options.loss_history == "running":
            self.ranking.add(records["second"])
        else:
            self.look(model, epoch)
        return {"second_loss": float(torch.nanmean(records["second"]))}

    def state(self) -> Tree:
        """The ranking."""
        return self.ranking.state()

    def load(self, state: Tree) -> None:
        """The ranking."""
        self.ranking.load(state)


class Dual(Objective):
    """Dual training on the current partition; keeps one `Partition` an epoch for the judge."""

    def __init__(self, options: E2ABL, job: Job, trap: Trap):
        self.options, self.job, self.trap = options, job, trap
        n = len(job.data)
        self.isolated_count = max(1, round(options.isolation_rate * n))
        self.recovered_count = min(self.isolated_count, max(options.recovery_floor, round(options.recovery_rate * n)))
        self.partitions: list[Partition] = []
        self.backdoor_class = -1
        self.asked: Tensor | None = None  # what h1 first said of isolated samples labeled y_b, -1 elsewhere

    def partition(self, tap: nn.Module, epoch: int) -> None:
        """Split by the ranking as it stands and, once h1 has learned something, recover labels from it."""
        o, given = self.options, self.job.data.y.cpu()
        isolated = torch.zeros(len(given), dtype=torch.bool)
        suspects = torch.zeros(len(given), dtype=torch.bool)
        if not (o.warm_up is None and epoch == 0):  # without a warm-up nothing is known before the first epoch
            order = top(self.trap.ranking.scores(), self.isolated_count)
            first = order[: self.recovered_count]
            answers = logits_of(tap, self.job.data, self.job.fabric, first, call=second_logits).argmax(1)
            self.backdoor_class = int(answers.mode().values)
            isolated[order] = True
            predominance = float((given[first] == self.backdoor_class).double().mean())
            if predominance >= o.predominance:
                suspects[order if o.remainder == "recover" else first] = True
            if o.recover_only_backdoor_label:
                suspects &= given == self.backdoor_class
            if o.remainder in {"return", "agree"}:
                isolated &= (given == self.backdoor_class) | suspects
        of_class = (given == self.backdoor_class).nonzero().flatten()
        probation = torch.zeros(len(given), dtype=torch.bool)
        if o.remainder == "agree" and len(of_class):
            scores = self.trap.ranking.scores()[of_class]
            probation[of_class[top(scores, round(o.probation * len(of_class)))]] = True
            probation &= ~isolated
            isolated |= probation
        ready = self._ready(epoch)
        labels, recovered = given.clone(), suspects.clone()
        if ready and isolated.any():
            rows = isolated.nonzero().flatten()
            logits = logits_of(tap.backbone, self.job.data, self.job.fabric, rows)  # type: ignore[arg-type]
            answer = torch.full_like(given, -1).index_copy(0, rows, logits.argmax(1))
            if self.asked is None:
                self.asked = answer.masked_fill(given != self.backdoor_class, -1)
            if o.remainder == "agree":
                # Asked once: later h1 would only repeat what it was taught since.
                recovered |= (self.asked >= 0) & (self.asked != self.backdoor_class)
                isolated &= ~(probation & (self.asked == self.backdoor_class))
            logits[:, self.backdoor_class] = -torch.inf
            other = torch.full_like(given, -1).index_copy(0, rows, logits.argmax(1))
            labels = torch.where(recovered, other, labels)
        self._set(Partition(epoch, isolated, recovered, labels))

    def _ready(self, epoch: int) -> bool:
        """Whether h1 has seen enough to be asked for the true classes of D*."""
        delay = self.options.recovery_delay * self.job.recipe(self.options.main).epochs_for(len(self.job.data))
        return self.options.control == "recover" and epoch >= delay

    def _set(self, partition: Partition) -> None:
        device = self.job.fabric.device
        use_recovered = self._ready(partition.epoch) or self.options.control == "unlearn"
        in_main = ~partition.isolated | partition.recovered if use_recovered else ~partition.isolated
        self.in_main, self.labels = in_main.to(device), partition.labels.to(device)
        self.isolated = partition.isolated.to(device)
        sign = torch.ones(len(in_main))
        if self.options.control == "unlearn":
            sign[partition.recovered] = -1
        self.sign = sign.to(device)
        self.partitions.append(partition)

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Eq. 4 in one pass; every sample weighs the same, whichever head it goes to."""
        rows, use = batch.rows, self.in_main[batch.rows]
        assert isinstance(model, Tap)
        main, second = model(batch.x, batch.lengths, main=use, detach=self.options.stem_gradient == "detached")
        main_losses = F.cross_entropy(main.float(), self.labels[rows][use], reduction="none")
        second_losses = F.cross_entropy(second.float(), batch.y, reduction="none")
        total = (main_losses * self.sign[rows][use]).sum() + (second_losses * self.isolated[rows]).sum()
        seen = torch.full_like(second_losses, torch.nan).masked_scatter(use, main_losses.detach())
        return Step(total / len(rows), {"main": seen, "second": second_losses.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Rank again from the losses that the pass has given anyway (`refresh`), and make the next partition."""
        before = self.partitions[-1].isolated
        if self.options.refresh == "epoch":
            self.trap.ranking.add(records["second"])
        self.partition(model, epoch)
        return {
            "main_loss": float(torch.nanmean(records["main"])),
            "second_loss": float(torch.nanmean(records["second"])),
            "churn": float((before != self.partitions[-1].isolated).double().mean()),
        }

    def state(self) -> Tree:
        """The ranking, the partitions so far and the backdoor class."""
        kept = [[p.epoch, p.isolated, p.recovered, p.labels] for p in self.partitions]
        return {
            "ranking": self.trap.ranking.state(),
            "partitions": kept,
            "backdoor_class": self.backdoor_class,
            "asked": self.asked,
        }

    def load(self, state: Tree) -> None:
        """Back to the last partition, used as it was."""
        self.trap.ranking.load(state["ranking"])
        self.backdoor_class, self.asked = state["backdoor_class"], state["asked"]
        kept = [Partition(*values) for values in state["partitions"]]
        self.partitions = kept[:-1]
        self._set(kept[-1])

    def outcome(self, tap: Tap) -> Outcome:
        """Judge the samples by the ranking and by what the main head said before it was taught their labels."""
        logits = logits_of(tap.backbone, self.job.data, self.job.fabric)
        scores, last = self.trap.ranking.scores(), self.partitions[-1]
        asked = torch.full_like(last.labels, -1) if self.asked is None else self.asked
        return suspects_of(tap.backbone, self.job.data, scores, logits, asked, self.backdoor_class, self.partitions)
