"""The objective of `jury`: train on the trusted samples, then hear what the model says of all others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.augment import strong
from antibackdoor.data.batches import Batch, gather
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.defenses.deposition import Deposition
from antibackdoor.files import Tree
from antibackdoor.intervals import lower
from antibackdoor.training.groups import FEW, clarity, halves, shared
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Augment, Objective, Step, forward
from antibackdoor.training.ranking import within
from antibackdoor.training.scores import logits_of
from antibackdoor.training.semi_supervised import Average

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury

OUT = -1
"""The label of a sample that nothing learns from at present."""


class Hearing(Objective):
    """Cross entropy with labels that the model's own average hands out, epoch by epoch, to samples not trusted."""

    def __init__(self, options: Jury, job: Job, model: nn.Module, deposition: Deposition):
        self.options, self.job, self.deposition = options, job, deposition
        self.given = job.data.y.cpu()
        self.early = within(deposition.ease, torch.zeros_like(self.given))
        self.classes = range(len(job.data.spec.classes))
        self.denied = torch.zeros_like(deposition.apart)
        self._choose()
        self.large = torch.bincount(self.given, minlength=len(self.classes)) >= FEW
        self.last = job.recipe(options.main).epochs_for(len(self.given))
        self.first = options.hearing * self.last
        self.average, self.witness = Average(model, 0.995), copy.deepcopy(model)
        self.findings = [deposition.finding(label, self.given) for label in self.classes]
        self.partitions: list[Partition] = []
        self._assign(0, torch.where(self.trusted, self.given, OUT))

    def _choose(self) -> None:
        """Whose label is trusted, and who of an attacked class does not get it back by agreement; nobody denied."""
        suspicion, apart = self.deposition.suspicion, self.deposition.apart
        self.trusted = suspicion <= self.options.trusted
        for label in self.given.unique().tolist():  # of a class of one or two samples, the least suspicious one
            rows = (self.given == label).nonzero().flatten()
            self.trusted[rows[suspicion[rows].argmin()]] = True
        self.trusted &= ~self.denied
        divided = torch.bincount(self.given, weights=apart.double(), minlength=len(self.classes)) > 0
        most = torch.where(divided[self.given], apart, suspicion > 1 - self.options.excluded)
        self.excluded = most | self.denied

    def _assign(self, epoch: int, labels: Tensor) -> None:
        self.labels = labels.to(self.job.fabric.device)
        learns = labels != OUT
        self.learns = learns.nonzero().flatten().to(self.labels.device)
        self.partitions.append(Partition(epoch, ~self.trusted, learns & ~self.trusted, labels.clamp(min=0)))

    def prepare(self, plain: Batch, augment: Augment, rng: torch.Generator) -> Batch:
        """Samples without a label at present give their places to random ones that have one: as many steps as ever."""
        rows = plain.rows
        learns = self.learns
        others = learns[torch.randint(len(learns), (len(rows),), generator=rng, device=learns.device)]
        batch = gather(self.job.data, torch.where(self.labels[rows] == OUT, others, rows), self.job.fabric.device)
        batch = replace(batch, y=self.labels[batch.rows])
        if self.settled:
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
        probabilities = self._answers(torch.arange(len(self.given)))
        confidence, answers = probabilities.max(1)
        own = probabilities.gather(1, self.given[:, None]).squeeze(1)
        groups = self._denied_together(own, answers)
        against = (answers != self.given) & (confidence >= self.options.confidence) & ~self.trusted
        findings = [
            self._finding(label, ~self.trusted & (self.given == label), answers, against, epoch)
            for label in self.classes
        ]
        # What was found once stays: later the model would only repeat what it was taught since.
        known = zip(self.findings, findings, groups, strict=True)
        self.findings = [{**(old if old["attacked"] and old["n"] else new), **group} for old, new, group in known]
        attacked = self._attacked()[self.given]
        restored = (answers == self.given) & ~self.excluded
        judged = torch.where(against, answers, torch.where(restored, self.given, OUT))
        left_out = (own < self.options.impossible / len(self.classes)) & self.excluded & self.large[self.given]
        heard = torch.where(attacked, judged, torch.where(left_out, OUT, self.given))
        self._assign(epoch, torch.where(self.trusted, self.given, heard))

    def _denied_together(self, own: Tensor, answers: Tensor) -> list[dict[str, Any]]:
        """Find the group in each class whose label the model denies; what is told of it if it is taken for poison.

        own: `(n,)`, the model's probability of the given label. A poisoned sample that the model happens to agree with,
        or was taught, is found in the company it keeps; poison of a few samples keeps the company of few, and a faint
        denial is seen in that of many. Odd but clean samples form groups too: late ones, of which all look `alike`.
        """
        told: list[dict[str, Any]] = [{} for _ in self.classes]
        opinions = [shared(1 - own, self.deposition.near, count) for count in (self.options.closest, None)]
        for label in self.classes:
            rows = (self.given == label).nonzero().flatten()
            if len(rows) < FEW or self.findings[label]["together"]:
                continue
            opinion = max((opinion[rows] for opinion in opinions), key=clarity)
            group, clear = rows[halves(opinion)[0]], clarity(opinion)
            if clear < self.options.denial or len(group) > (1 - self.options.trusted) * len(rows):
                continue
            early = float(self.early[group].median())
            alike = self._alike(label, answers[group][answers[group] != label])
            if early > self.options.late and alike < self.options.alike:
                known = {"denial": clear, "together": len(group), "early": early, "alike": alike}
                told[label] = {**known, "attacked": True}
                self.denied[group] = True
        self._choose()
        return told

    def _finding(self, label: int, asked: Tensor, answers: Tensor, against: Tensor, epoch: int) -> dict[str, Any]:
        """About one class: how many of those asked are confidently taken for others, and whether that is like poison.

        A clean sample that looks like another class is learned late, and known in the end, unless it is of a kind that
        none of the trusted are; then all its kind look like the same class, while poison was gathered from all.
        """
        n, confident = int(asked.sum()), asked & against
        count = int(confident.sum())
        early = float(self.early[confident].median()) if count else 0.0
        alike = self._alike(label, answers[asked & (answers != label)])
        many = lower(count, n) > self.options.acquittal
        found = self.deposition.finding(label, self.given)
        stayed = many and epoch >= self.last and bool(self.large[label])
        like_poison = (early > 0.5 or stayed) and alike < self.options.alike
        heard = {"count": count, "n": n, "early": early, "stayed": stayed, "alike": alike}
        return {**found, **heard, "attacked": found["attacked"] or (many and like_poison)}

    def _alike(self, label: int, answers: Tensor) -> float:
        """Total variation distance between the classes in `answers`, none of them `label`, and all samples of these."""
        others = torch.bincount(self.given[self.given != label], minlength=len(self.classes)).double()
        taken = torch.bincount(answers, minlength=len(self.classes)).double()
        distance = taken / taken.sum().clamp_min(1) - others / others.sum().clamp_min(1)
        return float(distance.clamp_min(0).sum())

    @property
    def settled(self) -> bool:
        """Whether there was a hearing, and poison is nowhere or was set apart beyond doubt wherever it is.

        Strong augmentation, which keeps leaked triggers from being learned and costs accuracy, is then needed no more.
        """
        heard = any(finding["n"] for finding in self.findings)
        return heard and all(finding["apart"] for finding in self.findings if finding["attacked"])

    def _attacked(self) -> Tensor:
        return torch.tensor([bool(finding["attacked"]) for finding in self.findings])

    def _answers(self, rows: Tensor) -> Tensor:
        return logits_of(self.witness, self.job.data, self.job.fabric, rows).double().softmax(1)

    def state(self) -> Tree:
        """The labels of each epoch, the averaged weights, and the findings that the verdict rests on."""
        kept = [[p.epoch, p.isolated, p.recovered, p.labels] for p in self.partitions]
        average = {"steps": self.average.steps, "values": self.average.values}
        return {
            "partitions": kept,
            "labels": self.labels.cpu(),
            "denied": self.denied,
            "average": average,
            "findings": self.findings,
        }

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.partitions = [Partition(*values) for values in state["partitions"]]
        self.labels = state["labels"].to(self.job.fabric.device)
        self.denied = state["denied"]
        self._choose()
        self.learns = (self.labels != OUT).nonzero().flatten()
        self.average.steps, self.findings = state["average"]["steps"], state["findings"]
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
        doubt[self.deposition.apart] = 1.0
        answers = probabilities.argmax(1)
        other = self._attacked()[self.given] & ~self.trusted & (answers != self.given)
        flagged = other | self.deposition.apart
        reasons = {
            row: f"labeled {names[self.given[row]]!r}, "
            + (
                "but a model that learned from trusted samples sees another class"
                if other[row]
                else "but set apart from its class by something that has nothing to do with what it shows"
            )
            for row in flagged.nonzero().flatten().tolist()
        }
        evidence = {**self.deposition.evidence(self.findings, self.options), "flagged": int(flagged.sum())}
        return Outcome(
            model,
            doubt + 0.01 * self.deposition.suspicion,
            doubt.clamp(0, 1),
            flagged,
            torch.where(other, answers, -1),
            reasons,
            evidence,
            self.partitions,
        )
