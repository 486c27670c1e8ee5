"""DLP: learn everything, unlearn what was learned too well, and learn the rest again without its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, snapshot
from antibackdoor.defenses.suspects import suspects_of
from antibackdoor.files import Tree
from antibackdoor.options import options
from antibackdoor.training.features import clusters, projections, scored_by_class
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Step, forward
from antibackdoor.training.ranking import Persistence
from antibackdoor.training.scores import check_finite, entropies, features_of, logits_of, losses
from antibackdoor.training.semi_supervised import SemiSupervised, semi_supervised
from antibackdoor.training.unlearning import Ascent, Unlearn

Order = Literal["sl-au-assft", "sl-au", "sl-assft", "sl-assft-au"]
Filter = Literal["entropy", "loss", "activation_clustering", "spectral_signatures"]
OF_FEATURES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "activation_clustering": lambda features, label: clusters(features, label)[0],
    "spectral_signatures": lambda features, label: projections(features, label) ** 2,
}
"""Filters that score the features of a class, `(m, D)`, in place of the network's answers: `(m,)`, high = poisoned."""


@DEFENSES.register("dlp", paper="Ying and Wu 2023, DLP: towards active defense against backdoor attacks")
@options
class DLP(Defense):
    """Decoupled learning: train on everything, unlearn the surest samples, relearn from the least sure ones.

    1. SL: short supervised training on everything as labeled. What carries a trigger is learned first and best.
    2. Filter: the entropy `H(x) = - sum_c p_c log p_c` of the network's answers. The `filter_rate` of all samples with
       the lowest is the poisoned side; of each class, as labeled, an equal share with the highest is the clean side,
       together as many samples as the poisoned one. In place of the entropy, the loss, or what the detectors of these
       names make of the features: `activation_clustering`, `spectral_signatures`.
    3. AU: gradient ascent on the poisoned side (`Unlearn`).
    4. ASSFT: FixMatch with the clean side as labeled and all others, the poisoned side included, as unlabeled samples.

    Deviations: the literal reading of the paper is the profile "paper"; its unlearning at a rate of 0.01 destroys the
    network, so the default is slower and guarded. By default the entropies are those of all epochs of SL, not of the
    last (`look`). Small sets get floors of steps and counts. Equal entropies are ordered by loss. The paper names no
    suspects; here they are the samples of the class that the poisoned side is mostly labeled with, if the final
    network, which never learned them as labeled, sees another class.
    """

    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "look": "end",
            "poisoned_floor": 1,
            "clean_floor": 1,
            "supervised": Recipe(epochs=10, min_steps=0, learning_rate=0.01, schedule="constant", augment="none"),
            "guards": "literal",
            "unlearning": Ascent(min_steps=0, learning_rate=0.01),
            "tuning": SemiSupervised(epochs=1, min_steps=2**16),
        }
    }

    order: Annotated[Order, Field(description="of the stages; the filter looks at the network after SL")] = (
        "sl-au-assft"
    )
    supervised: Annotated[Recipe, Field(description="SL")] = Recipe(
        epochs=10, min_steps=100, learning_rate=0.01, schedule="constant", augment="none"
    )
    filter: Annotated[Filter, Field(description="what tells the two sides")] = "entropy"
    look: Annotated[
        Literal["end", "epochs"],
        Field(
            description="entropy and loss: of the network after SL, or averaged in logarithms over all epochs of SL; "
            "the other filters look at the end"
        ),
    ] = "epochs"
    filter_rate: Annotated[float, Field(gt=0, le=0.5, description="share of all samples on either side")] = 0.01
    poisoned_floor: Annotated[int, Field(ge=1, description="samples on the poisoned side, at least")] = 8
    clean_floor: Annotated[int, Field(ge=1, description="of each class on the clean side, at least; half at most")] = 8
    guards: Annotated[Literal["guarded", "literal"], Field(description="AU: clip, frozen statistics, stop rule")] = (
        "guarded"
    )
    clip: Annotated[float, Field(gt=0, description="guarded: largest norm of the gradient")] = 1.0
    enough: Annotated[
        float, Field(ge=0, le=1, description="guarded: stop where so few, times chance, are answered as labeled")
    ] = 0.5
    unlearning: Annotated[Ascent, Field(description="AU")] = Ascent()
    tuning: Annotated[SemiSupervised, Field(description="ASSFT; the main training")] = SemiSupervised()
    keep_poisoned_side: Annotated[bool, Field(description="it stays among the unlabeled samples")] = True
    judged: Annotated[
        float, Field(gt=0, lt=1, description="share of the singled-out class, surest first, that may be suspect")
    ] = 0.65

    def run(self, job: Job) -> Outcome:
        """All stages in `order`; the outcome holds the network after each."""
        model, stages = job.model(), {}
        sides: dict[str, Tensor] = {}
        watched = Watched(len(job.data), self.filter)
        for stage in self.order.split("-"):
            if stage == "sl":
                job.fit("supervised", model, watched, self.supervised)
                sides = job.keep("sides", lambda: self.split(job, model, watched))
            elif stage == "au":
                enough = self.enough / len(job.data.spec.classes)
                climb = Unlearn(guarded=self.guards == "guarded", clip=self.clip, enough=enough)
                job.fit("unlearning", model, climb, self.unlearning, rows=sides["poisoned"])
            else:
                out = sides["clean"] if self.keep_poisoned_side else torch.cat([sides["clean"], sides["poisoned"]])
                pool = torch.ones(len(job.data), dtype=torch.bool)
                pool[out] = False
                recipe = job.recipe(self.tuning)
                semi_supervised(job, "fine-tuning", model, recipe, sides["clean"], pool.nonzero().flatten())
            stages[stage.upper()] = snapshot(model)
        return self.judge(job, model, sides, stages)

    def split(self, job: Job, model: nn.Module, watched: Watched) -> dict[str, Tensor]:
        """What the network makes of all samples: scores `(n,)`, and the row numbers of both sides."""
        logits, y = logits_of(model, job.data, job.fabric), job.data.y.cpu()
        loss = losses(logits, y)
        if self.filter in OF_FEATURES:
            features = check_finite(features_of(model, job.data, job.fabric), job.data)
            scores = scored_by_class(features, y, OF_FEATURES[self.filter])
        elif self.look == "epochs":
            scores = watched.ranking.scores()
        else:
            scores = -(entropies(logits) if self.filter == "entropy" else loss)
        n, classes = len(y), len(job.data.spec.classes)
        count = max(self.poisoned_floor, round(self.filter_rate * n))
        each = max(self.clean_floor, round(self.filter_rate * n / classes))
        poisoned, clean = two_sides(scores, loss, y, count, each)
        return {"scores": scores, "poisoned": poisoned, "clean": clean}

    def judge(self, job: Job, model: nn.Module, sides: dict[str, Tensor], stages: dict[str, Any]) -> Outcome:
        """Suspect is what the network was surest of as labeled, in one class, and now takes for another."""
        scores, y = sides["scores"], job.data.y.cpu()
        logits = logits_of(model, job.data, job.fabric)
        answers = logits.argmax(1)
        singled = int(y[sides["poisoned"]].mode().values)
        rows = (y == singled).nonzero().flatten()
        taught = torch.isin(rows, sides["clean"])
        surest = rows[torch.argsort(scores[rows], descending=True, stable=True)][: round(self.judged * len(rows))]
        asked = torch.full_like(y, -1)
        asked[surest] = answers[surest]
        asked[rows[taught]] = -1
        rest = answers[rows[(asked[rows] < 0) & ~taught]]
        found = suspects_of(model, job.data, scores, logits, asked, singled, [])
        found.evidence["disagree_in_rest_of_class"] = {"count": int((rest != singled).sum()), "n": len(rest)}
        for name in ("poisoned", "clean"):
            found.selections[f"{name} side"] = torch.isin(torch.arange(len(y)), sides[name])
        found.stages.update(stages)
        return found


class Watched(CrossEntropy):
    """Supervised training that keeps, for each sample, the mean logarithm of its entropy or loss over the epochs.

    How sure a network is of a sample after one epoch or another says less: it swings, and on a small set all samples
    are learned in the end, those with a trigger only earlier.
    """

    def __init__(self, n: int, what: str):
        self.what, self.ranking = what, Persistence(n, skip=0)

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Cross entropy; the entropies come with it."""
        log_p = F.log_softmax(forward(model, batch).float(), 1)
        loss = F.nll_loss(log_p, batch.y, reduction="none")
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(1)
        return Step(loss.mean(), {"main": loss.detach(), "entropy": entropy})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """One more entry."""
        self.ranking.add(records["entropy" if self.what == "entropy" else "main"])
        return super().after_epoch(model, epoch, records)

    def state(self) -> Tree:
        """The ranking."""
        return self.ranking.state()

    def load(self, state: Tree) -> None:
        """The ranking."""
        self.ranking.load(state)


def two_sides(scores: Tensor, loss: Tensor, y: Tensor, count: int, each: int) -> tuple[Tensor, Tensor]:
    """The row numbers of the `count` highest scores, and of the `each` lowest of every class as labeled.

    Equal scores are ordered by loss, the lowest first, and then by row. A row is on one side only; a class gives at
    most half of its samples, rounded up, to the clean side, and none where all are on the other.
    """
    by_loss = torch.argsort(loss, stable=True)
    order = by_loss[torch.argsort(scores[by_loss], descending=True, stable=True)]
    poisoned, rest = order[:count], order[count:]
    clean = []
    for label in y.unique().tolist():
        rows = rest[y[rest] == label]
        most = min(each, (int((y == label).sum()) + 1) // 2)
        clean.append(rows[len(rows) - min(most, len(rows)) :])
    return poisoned, torch.cat(clean)
