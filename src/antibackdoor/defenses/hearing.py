"""The objective of `jury`: train on the trusted samples, then hear what the model says of all others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.augment import strong
from antibackdoor.data.batches import Batch, gather
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.files import Tree
from antibackdoor.intervals import lower
from antibackdoor.models.tap import Tap
from antibackdoor.training.groups import FEW, FIRM
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import Augment, Objective, Step, forward
from antibackdoor.training.ranking import within
from antibackdoor.training.scores import logits_of
from antibackdoor.training.semi_supervised import Average

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury

OUT = -1
"""The label of a sample that nothing learns from at present."""


@dataclass(frozen=True)
class Deposition:
    """What the shallow witnesses of `jury` said.

    tap: the one that learned everything. suspicion: `(n,)` in [0, 1], percentile within the samples of the same given
    label, 1 for those apart. ease: `(n,)`, how early each label was learned. apart: `(n,)` bool, samples that mixtures
    or outsiders set apart from their class beyond doubt. elsewhere: `(n,)`, what an outsider is confident to see in
    place of the label, -1 for nothing. bonds, divisions: how clearly mixtures and outsiders divide each class; clear:
    how clearly the clearest of all witnesses does.
    """

    tap: Tap
    suspicion: Tensor
    ease: Tensor
    apart: Tensor
    elsewhere: Tensor
    bonds: Sequence[float]
    divisions: Sequence[float]
    clear: Sequence[float]

    def scores(self, given: Tensor) -> Tensor:
        """`(n,)`, suspicion for a ranking of the whole set: classes that are firmly divided come before all others."""
        firm = torch.tensor([clear if clear >= FIRM else 0.0 for clear in self.clear], dtype=torch.float64)
        return self.suspicion + firm[given]

    def finding(self, label: int, given: Tensor) -> dict[str, Any]:
        """About one class, before any hearing: what `verdict` reads."""
        apart = int(self.apart[given == label].sum())
        told = {"bond": self.bonds[label], "division": self.divisions[label], "apart": apart}
        return {"count": 0, "n": 0, "early": 0.0, "stayed": False, "alike": 0.0, **told, "attacked": apart > 0}

    def evidence(self, findings: Sequence[dict[str, Any]], options: Jury) -> dict[str, Any]:
        """For the verdict: what was found about each class, and the limits beyond which it counts."""
        names = ("acquittal", "alike", "bond", "division")
        return {"by_class": list(findings), "limits": {name: getattr(options, name) for name in names}}


class Hearing(Objective):
    """Cross entropy with labels that the model's own average hands out, epoch by epoch, to samples not trusted."""

    def __init__(self, options: Jury, job: Job, model: nn.Module, deposition: Deposition):
        self.options, self.job, self.deposition = options, job, deposition
        suspicion = deposition.suspicion
        self.given = job.data.y.cpu()
        self.early = within(deposition.ease, torch.zeros_like(self.given))
        self.trusted = suspicion <= options.trusted
        for label in self.given.unique().tolist():  # of a class of one or two samples, the least suspicious one
            rows = (self.given == label).nonzero().flatten()
            self.trusted[rows[suspicion[rows].argmin()]] = True
        self.classes = range(len(job.data.spec.classes))
        divided = torch.bincount(self.given, weights=deposition.apart.double(), minlength=len(self.classes)) > 0
        self.excluded = torch.where(divided[self.given], deposition.apart, suspicion > 1 - options.excluded)
        self.large = torch.bincount(self.given, minlength=len(self.classes)) >= FEW
        self.last = job.recipe(options.main).epochs_for(len(self.given))
        self.first = options.hearing * self.last
        self.average, self.witness = Average(model, 0.995), copy.deepcopy(model)
        self.findings = [deposition.finding(label, self.given) for label in self.classes]
        self.partitions: list[Partition] = []
        self._assign(0, torch.where(self.trusted, self.given, OUT))

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
        rows = (~self.trusted).nonzero().flatten()
        given, probabilities = self.given[rows], self._answers(rows)
        confidence, answers = probabilities.max(1)
        against = (answers != given) & (confidence >= self.options.confidence)
        findings = [
            self._finding(label, rows[given == label], answers[given == label], against[given == label], epoch)
            for label in self.classes
        ]
        # What was found once stays: later the model would only repeat what it was taught since.
        known = zip(self.findings, findings, strict=True)
        self.findings = [old if old["attacked"] and old["n"] else new for old, new in known]
        attacked = self._attacked()[given]
        restored = (answers == given) & ~self.excluded[rows]
        judged = torch.where(against, answers, torch.where(restored, given, OUT))
        of_given = probabilities.gather(1, given[:, None]).squeeze(1)
        impossible = of_given < self.options.impossible / len(self.classes)
        left_out = impossible & self.excluded[rows] & self.large[given]
        labels = self.given.clone()
        labels[rows] = torch.where(attacked, judged, torch.where(left_out, OUT, given))
        self._assign(epoch, labels)

    def _finding(self, label: int, heard: Tensor, answers: Tensor, against: Tensor, epoch: int) -> dict[str, Any]:
        """About one class: how many of those heard are confidently taken for others, and whether that is like poison.

        A clean sample that looks like another class is learned late, and known in the end, unless it is of a kind that
        none of the trusted are; then all its kind look like the same class, while poison was gathered from all.
        """
        confident = heard[against]
        early = float(self.early[confident].median()) if len(confident) else 0.0
        alike = self._alike(label, answers[answers != label])
        many = lower(len(confident), len(heard)) > self.options.acquittal
        found = self.deposition.finding(label, self.given)
        stayed = many and epoch >= self.last and bool(self.large[label])
        like_poison = (early > 0.5 or stayed) and alike < self.options.alike
        counted = {"count": len(confident), "n": len(heard), "early": early, "stayed": stayed, "alike": alike}
        return {**found, **counted, "attacked": found["attacked"] or (many and like_poison)}

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
        return {"partitions": kept, "labels": self.labels.cpu(), "average": average, "findings": self.findings}

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.partitions = [Partition(*values) for values in state["partitions"]]
        self.labels = state["labels"].to(self.job.fabric.device)
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
