"""Jury: a sample keeps its label only if models that were not taught by that label can live with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.data.batches import gather, steps_per_epoch
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome
from antibackdoor.defenses.company import DIVIDED, Company, Outsiders, second_logits
from antibackdoor.defenses.deposition import Deposition
from antibackdoor.defenses.hearing import Hearing
from antibackdoor.defenses.witness import Witness
from antibackdoor.models.tap import Tap
from antibackdoor.options import options
from antibackdoor.seeds import generator
from antibackdoor.training.groups import nearest
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.ranking import geometric, within
from antibackdoor.training.scores import bonds_of, features_of, logits_of

NEARBY = (1, 3)
"""How often opinions are shared where there is no large group: once for a few samples, and a little further."""
Share = Annotated[float, Field(ge=0, le=1)]


@DEFENSES.register("jury")
@options
class Jury(Defense):
    """Shallow witnesses choose whom to trust; the model learns from these, then hears all others.

    The idea: whoever was taught a label by a trigger cannot judge it. So each label is put to somebody who was not: to
    a model that sees only half of the sample, to one that never saw the label, in the end to the model itself, which
    learned from samples that those two had nothing to say against. And as a trigger puts its samples next to each other
    in the features of a model that learned it, none is judged alone: what is noise in single samples averages out.

    1. Three opinions about each label. Ease `e`: a shallow model learns everything as labeled; poison, once learned,
       stays easy (percentile, within the label, of `Persistence` over looks at geometric steps). Bond `b`: averaged
       half and half with samples of other labels, how sure is that model still of the label, in the mean of `mixtures`?
       What a clean sample shows has to share the answer with its partner; a trigger goes on leading to its own, also
       where the label is true. Home `h`: for each class a shallow outsider learns all OTHER classes; its confidence in
       one of these. A sample that only the trigger ties to its label looks to it like one of its own.
    2. `Company`: each sample shares them with its `neighbors` nearest of the same label. Shared over and over
       (`rounds`), an opinion differs in the end only between groups that no neighbors connect: a class that is still
       divided is divided by more than chance, and the `odd` group of it is suspicious; it is set apart where the
       `clarity` is beyond doubt (`ease`, `bond`, `division`). Where nothing divides a class, opinions shared once or a
       few times still tell of a few samples: the worst that is said of a sample counts.
    3. The `trusted` share of each class with the least suspicion trains the model, under strong augmentation, in which
       a few leaked triggers are not learned; it ends with the hearing, unless a class is attacked whose poison was not
       set apart.
    4. `Judgement`: after `hearing` of the epochs that make `main.min_steps`, or after half of that share of a training
       twice as long, and longer, the model answers, anew after each epoch, for all samples. A class is
       attacked if samples of it were set apart, unless they were so none too clearly and the model agrees with their
       label; if the model denies a group together, its doubt shared as in 2; or if it confidently takes more than
       `acquittal` of the class for others (lower end of the Wilson interval). Odd but clean samples are denied, too:
       they are told from poison, which comes from everywhere and was learned by a trigger, in that they are taken for
       one class (`alike`), or learned late and taken for what the rest of their class is taken for (`late`, `kin`).
       Samples of an attacked class learn as what the model confidently takes them for, if it takes them for many
       classes (of clean-label poison the label is true); those it agrees with get their label back, but for the group,
       those set apart or, where nobody is, the `excluded` share with the most suspicion. In other classes all get it
       back, but for those of that share whose label is `impossible` in the eyes of the model, and a few that are denied
       together as poison is.
    5. `Disarming`: where what was found in attacked classes, mixed into other samples, leads the model to these classes
       (more of them than samples of other classes lead to theirs), the share `disarmed` of all that is learned carries
       it from then on and keeps its own label. So the model learns that it tells nothing: poison among the others
       teaches less, and a trigger that a model of clean data answers to loses its hold.

    What it cannot see: clean-label poison whose trigger does not survive a mixture half again as clearly as that of
    other poison has to (the model agrees with its label), and a group of less than 20 that is late or kin.
    What it leaves out, at best, and never tells of: poison of less than `acquittal` of a class, or of one source class
    where it is little. Poison that is more than `1 - trusted` of its class passes for what is ordinary there, unless
    mixtures are `sure`, outsiders recognize it or it was learned `before_all`. With two classes it has no outsiders.
    Its cost is that of the main training, `trap.epochs` shallow epochs and one shallow epoch per outsider.
    """

    later: ClassVar[frozenset[str]] = frozenset({"disarmed"})

    trap: Annotated[Recipe, Field(description="of the shallow model that learns everything")] = Recipe(
        epochs=8, min_steps=400, batch_size=64, learning_rate=0.05, schedule="constant", augment="none"
    )
    looks: Annotated[int, Field(ge=1, description="how many looks at the losses there are at most")] = 14
    outsider: Annotated[Recipe, Field(description="of the shallow models that each lack some classes")] = Recipe(
        epochs=1, min_steps=75, batch_size=64, learning_rate=0.05, augment="none"
    )
    lessons: Annotated[int, Field(ge=2, description="samples that an outsider learns from at most")] = 50_000
    mixtures: Annotated[int, Field(ge=1, description="how often each sample is averaged with another")] = 8
    groups: Annotated[int, Field(ge=2, description="outsiders at most; with more classes, each lacks several")] = 10
    neighbors: Annotated[int, Field(ge=0, description="how many share a sample's suspicion; 0: each for itself")] = 20
    rounds: Annotated[int, Field(ge=1, description="how often they share it")] = 10
    closest: Annotated[
        int, Field(ge=1, description="how many share the model's doubt of it, for small groups; `neighbors` too")
    ] = 5
    trusted: Annotated[float, Field(gt=0, le=1, description="share of each class that is trusted from the start")] = (
        0.35
    )
    hearing: Annotated[
        Share,
        Field(description="share of the fewest epochs that there may be before the others are heard; of many, half"),
    ] = 0.4
    confidence: Annotated[Share, Field(description="of an answer that counts against the given label")] = 0.9
    acquittal: Annotated[Share, Field(description="a class of which more is taken for others may be attacked")] = 0.03
    denial: Annotated[
        float, Field(ge=0, description="`clarity` from which on a group counts as denied by the model")
    ] = 1.5
    late: Annotated[
        Share, Field(description="last share of the set to be learned, where rare kinds lie: `kin` is lower there")
    ] = 0.2
    alike: Annotated[
        Share, Field(description="total variation distance of what they are taken for from all other classes")
    ] = 0.5
    kin: Annotated[
        float, Field(ge=0, description="that distance over the one from what the rest of the class is taken for")
    ] = 0.67
    ease: Annotated[
        float, Field(gt=0, description="`clarity` beyond doubt of a division by when they were learned")
    ] = 3.0
    division: Annotated[float, Field(gt=0, description="`clarity` beyond doubt of a division by the outsiders")] = 3.0
    bond: Annotated[float, Field(gt=0, description="`clarity` beyond doubt of a division by the mixtures")] = 1.2
    excluded: Annotated[Share, Field(description="share of a class whose labels are not simply given back")] = 0.3
    disarmed: Annotated[
        Share, Field(description="share of what is learned that carries what was found, once that has a hold")
    ] = 0.5
    impossible: Annotated[
        Share, Field(description="of what chance gives a label; a model that gives less denies it")
    ] = 0.5
    main: Annotated[Recipe, Field(description="of the model; its augmentation once poison is nowhere or set apart")] = (
        Recipe(min_steps=640)
    )

    def run(self, job: Job) -> Outcome:
        """Question the witnesses, train the model, and judge."""
        deposition = self.depose(job)
        model = job.model()
        hearing = Hearing(self, job, model, deposition)
        job.fit("training", model, hearing, job.recipe(self.main))
        return replace(hearing.outcome(model), witness=(deposition.tap, second_logits))

    def depose(self, job: Job) -> Deposition:
        """What the witnesses say, before any model is trained."""
        given, classes = job.data.y.cpu(), len(job.data.spec.classes)
        tap, ease = self._trap(job)
        features = features_of(tap, job.data, job.fabric, call=second_logits)
        near = nearest(features, given, self.neighbors, seed=job.seed)
        confidence, elsewhere = self._home(job, given)
        mixed = bonds_of(tap, job.data, job.fabric, job.seed, self.mixtures, call=second_logits)
        said = (within(ease, given), mixed, confidence)
        outsiders = Outsiders(2, elsewhere, self.alike)  # the third of what was said
        most = 1 - self.trusted
        company = Company.of(said, given, near, classes, rounds=self.rounds, most=most, outsiders=outsiders, early=ease)
        nearby = torch.stack([company.nearby(said, rounds) for rounds in NEARBY]).amax(0)
        divided = (company.clearest >= DIVIDED)[given]
        suspicion = torch.where(divided, company.suspicion, within(nearby, given))
        enough = (self.ease, self.bond, self.division)
        company = company.believed(enough)
        groups = company.apart_by(enough)
        suspicion = torch.where(groups.any(0), 1.0, suspicion)
        elsewhere = torch.where(confidence >= self.confidence, elsewhere, -1)
        return Deposition(tap, suspicion, ease, near, groups, elsewhere, company.clear)

    def tapped(self, job: Job, name: str) -> Tap:
        """A fresh network of the run's kind, cut where a witness ends."""
        example = gather(job.data, torch.arange(2), job.fabric.device)
        tap = Tap(job.model(name), None, len(job.data.spec.classes), example.x, example.lengths)
        return tap.to(job.fabric.device)

    def _trap(self, job: Job) -> tuple[Tap, Tensor]:
        """The witness that learned everything as labeled, and `(n,)`: how soon and how firmly it learned each label."""
        n, tap = len(job.data), self.tapped(job, "trap")
        steps = self.trap.epochs_for(n) * steps_per_epoch(n, self.trap.batch_for(n))
        witness = Witness(job, geometric(steps, self.looks))
        job.fit("trap", tap, witness, self.trap, parameters=tap.warm_up_parameters())
        return tap, witness.ranking.scores()

    def _home(self, job: Job, given: Tensor) -> tuple[Tensor, Tensor]:
        """Of the outsider that was never shown a sample of this label: `(n,)` confidence in another, and in which."""
        classes = len(job.data.spec.classes)
        groups = min(classes, self.groups)
        group = torch.arange(classes) % groups
        home, elsewhere = torch.zeros(len(given), dtype=torch.float64), torch.full_like(given, -1)
        for number in range(groups):
            inside = group[given] == number
            known = given[~inside].unique()
            if not inside.any() or len(known) < 2:  # whoever knows one class only is sure of everything
                continue
            name, rows = f"outsider {number}", inside.nonzero().flatten()
            tap = self.tapped(job, name)
            others = (~inside).nonzero().flatten()
            if len(others) > self.lessons:
                chosen = torch.randperm(len(others), generator=generator(job.seed, name))[: self.lessons]
                others = others[chosen.sort().values]
            job.fit(name, tap, Witness(job), self.outsider, rows=others, parameters=tap.warm_up_parameters())
            logits = logits_of(tap, job.data, job.fabric, rows, call=second_logits).double()
            best = logits[:, known].softmax(1).max(1)
            home[rows], elsewhere[rows] = best.values, known[best.indices]
        return home, elsewhere
