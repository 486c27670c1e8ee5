"""The objective of `jury`: train on the trusted samples, then hear what the model says of all others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.augment import strong
from antibackdoor.data.batches import Batch, gather
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.defenses.deposition import Deposition
from antibackdoor.defenses.disarming import Disarming
from antibackdoor.defenses.judgement import OUT, Judgement
from antibackdoor.files import Tree
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Augment, Objective, Step, forward
from antibackdoor.training.scores import logits_of
from antibackdoor.training.semi_supervised import Average

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury


class Hearing(Objective):
    """Cross entropy with labels that the model's own average hands out, epoch by epoch, to samples not trusted."""

    compiles: ClassVar[bool] = True

    def __init__(self, options: Jury, job: Job, model: nn.Module, deposition: Deposition):
        self.options, self.job, self.deposition = options, job, deposition
        self.given = job.data.y.cpu()
        main = job.recipe(options.main)
        last, shortest = (recipe.epochs_for(len(self.given)) for recipe in (main, replace(main, epochs=1)))
        # The trusted are learned in a number of steps, however small a share of a long training these are; but a model
        # is not asked while its learning rate is so high that it wavers.
        self.first = options.hearing * max(shortest, last / 2)
        self.judgement = Judgement(options, self.given, len(job.data.spec.classes), deposition, last)
        self.average, self.witness = Average(model, 0.995), copy.deepcopy(model)
        self.partitions: list[Partition] = []
        self.disarming = Disarming(options, job)
        self._assign(0, torch.where(self.judgement.trusted, self.given, OUT))

    def _assign(self, epoch: int, labels: Tensor) -> None:
        self._use(labels)
        others = ~self.judgement.trusted
        self.partitions.append(Partition(epoch, others, (labels != OUT) & others, labels.clamp(min=0)))

    def _use(self, labels: Tensor) -> None:
        device = self.job.fabric.device
        self.labels, self.learns = labels.to(device), (labels != OUT).nonzero().flatten().to(device)
        self.disarming.find(self.judgement.carriers(labels))

    def prepare(self, plain: Batch, augment: Augment, rng: torch.Generator) -> Batch:
        """Samples without a label at present give their places to random ones that have one: as many steps as ever."""
        rows = plain.rows
        learns = self.learns
        others = learns[torch.randint(len(learns), (len(rows),), generator=rng, device=learns.device)]
        batch = gather(self.job.data, torch.where(self.labels[rows] == OUT, others, rows), self.job.fabric.device)
        batch = self.disarming(replace(batch, y=self.labels[batch.rows]), rng)
        if self.judgement.settled:
            return augment(batch, rng)
        return replace(batch, x=strong(batch.x, self.job.data.spec, rng, batch.lengths))

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Plain cross entropy."""
        values = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"main": values.detach()})

    def after_step(self, model: nn.Module) -> None:
        """Average the weights."""
        self.average.update(model)

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """From `hearing` on, hear all samples that are not trusted and hand out their labels anew."""
        if epoch >= self.first:
            self._hear(epoch)
        used = float((self.labels != OUT).double().mean())
        return {"main_loss": float(torch.nanmean(records["main"])), "used": used}

    def _hear(self, epoch: int) -> None:
        self.witness.load_state_dict(self.average.values)
        probabilities = logits_of(self.witness, self.job.data, self.job.fabric).double().softmax(1)
        self._assign(epoch, self.judgement.hear(probabilities, epoch))
        own = (self.labels.cpu() == self.given).nonzero().flatten()
        self.disarming.ask(self.witness, own, epoch)

    def state(self) -> Tree:
        """The labels of each epoch, the averaged weights, and the judgement."""
        kept = [[p.epoch, p.isolated, p.recovered, p.labels] for p in self.partitions]
        average = {"steps": self.average.steps, "values": self.average.values}
        return {
            "partitions": kept,
            "labels": self.labels.cpu(),
            "judgement": self.judgement.state(),
            "hold": self.disarming.hold,
            "average": average,
        }

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.partitions = [Partition(*values) for values in state["partitions"]]
        self.judgement.load(state["judgement"])
        self._use(state["labels"])
        self.disarming.hold = state["hold"]
        self.average.steps = state["average"]["steps"]
        for name, value in self.average.values.items():
            value.copy_(state["average"]["values"][name])

    def outcome(self, model: nn.Module) -> Outcome:
        """The averaged model; suspects are samples of attacked classes that it takes for another, or set apart.

        scores: its doubt of the given label, which of those apart is certain; ties are broken by suspicion.
        """
        model.load_state_dict(self.average.values)
        logits = logits_of(model, self.job.data, self.job.fabric).double()
        probabilities, names = logits.softmax(1), self.job.data.spec.classes
        doubt = 1 - probabilities.gather(1, self.given[:, None]).squeeze(1)
        doubt[self.judgement.apart] = 1.0
        answers = probabilities.argmax(1)
        attacked, foreign = self.judgement.attacked[self.given], self.judgement.foreign[self.given]
        accused = (foreign & ~self.judgement.trusted) | (attacked & self.judgement.denied)
        other = accused & (answers != self.given)
        flagged = other | self.judgement.apart
        reasons = {
            row: f"labeled {names[self.given[row]]!r}, "
            + (
                "but a model that learned from trusted samples sees another class"
                if other[row]
                else "but set apart from its class by something that has nothing to do with what it shows"
            )
            for row in flagged.nonzero().flatten().tolist()
        }
        evidence = self.deposition.evidence(self.judgement.findings, self.options)
        return Outcome(
            model,
            doubt + 0.01 * self.deposition.suspicion,
            doubt.clamp(0, 1),
            flagged,
            torch.where(other, answers, -1),
            reasons,
            {**evidence, "flagged": int(flagged.sum()), "hold": self.disarming.hold},
            self.partitions,
        )
