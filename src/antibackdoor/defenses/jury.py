"""Jury: a sample keeps its label only if models that were not taught by that label can live with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

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

    1. Ease: a shallow model learns everything as labeled; poison, once learned, stays easy. `e`: percentile, within
       the samples of the same label, of `Persistence` over looks at geometric steps.
    2. Bond: averaged half and half with samples of other labels, how sure is that model still of the given label, in
       the mean of `mixtures`? A clean sample has to share the answer with its partner; a trigger goes on leading to its
       own, also where the label is true.
    3. Home: for each class a shallow outsider learns all OTHER classes. A sample that only the trigger ties to its
       label looks to it like one of its own: `h`, its confidence in another class.
    4. Company: a trigger puts its samples next to each other in the features of the model that learned it, so each
       sample shares the three with its `neighbors` nearest of the same label. What is noise in single samples averages
       out, and a poisoned sample that looks innocent by itself is found in the company it keeps. Shared over and over
       (`rounds`), an opinion differs in the end only between groups that no neighbors connect: a class that is still
       divided is divided by more than chance, and its odd group is suspicious, or even set apart (`ease`, `bond`,
       `division`; but not in a class of fewer than 100, nor what outsiders take for one class only: that is a rare
       kind). Where all agree in the end there is no large group; shared once or a few times, the opinions still tell of
       a few samples. Then those that divide the class firmly count alone, all three if none does; the suspicion is the
       worst that is said of a sample, early being odd unless ease comes half-way to dividing the class. Odd is, as a
       rule, the upper group. Of early and late samples it is the one that mixtures tie to the label, where they divide
       the class, or else that outsiders recognize: a class may be easier than its poison. And it is the lower one, if
       the upper one is too large to be poison (a faint trigger is lost in a mixture, and leaves nothing of what the
       sample showed). But where nearly all mixtures of the upper group keep the label and few of the lower one's do,
       most of the class is poison, unless it is most of the set: nothing that a class shows by itself wins every time,
       and in some of its samples only. So is most of a class that ease or bond divides, if the outsider recognizes the
       upper group as its own more than the lower one, and as more than one kind.
    5. The `trusted` share of each class with the least suspicion trains the model, under strong augmentation, in which
       a few leaked triggers are not learned; it ends with the hearing, unless a class is attacked whose poison was not
       set apart beyond doubt.
    6. After `hearing` of the epochs it answers, anew after each epoch, for all samples. A class is attacked if it was
       divided beyond doubt (but what divides it less than half again as clearly needs the model's word: if it agrees
       with the labels of those set apart, which it never learned, they are freed), or if the model denies a group of
       it together: its doubt of the given label, shared by neighbors as in 4, divides the class, so that also those it
       happens to agree with, or was taught by mistake, are found in their company. Odd but clean samples of a kind
       that is not among the trusted are denied together, too; but these are `alike`, all taken for one class, where
       poison comes from everywhere, or not learned in the easier half of the set and `kin`, taken rather for what the
       rest of their class is taken for (where they are `late`, the last of all to be learned, half that near is
       enough, unless they are taken for all others evenly); of a few, one of the two is enough. Where it is certain of
       many, what they are taken for does not matter: so poison of one source class is found. Single samples count
       where groups are too small to be seen: if the model confidently takes more than `acquittal` of a class for
       others (lower end of the Wilson interval), not alike, and these were learned in the easier half of the whole set
       (and are not kin, if they are few), or are still there in the end. Samples of an attacked class learn as what
       the model confidently takes them for, unless they are `alike` and may be of their class (clean-label); those it
       agrees with get their label back, but for the group, those set apart beyond doubt or, where nobody is, the
       `excluded` share with the most suspicion. In a class that was not attacked these too get their label back,
       unless it is `impossible` in the eyes of the model: few poisoned samples do not look like an attack. And a few
       that lie together and are denied as poison is, up to a twentieth of the class, are left out for good.

    What it cannot see: clean-label poison whose trigger does not survive a mixture (the model agrees with its label),
    and a group of less than 20 that is not learned early, or is kin.
    What it leaves out, at best, and never tells of: poison of less than `acquittal` of a class, or of one source class
    where it is little. Poison that is more than `1 - trusted` of its class passes for what is ordinary there, unless
    mixtures are `sure` or outsiders recognize it. With two classes it has no outsiders. Its cost is that of the main
    training, `trap.epochs` shallow epochs and one shallow epoch per outsider.
    """

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
    hearing: Annotated[Share, Field(description="share of the epochs before the others are heard")] = 0.4
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
        float, Field(ge=0, description="`clarity` beyond doubt of a division by when they were learned")
    ] = 3.0
    division: Annotated[float, Field(ge=0, description="`clarity` beyond doubt of a division by the outsiders")] = 3.0
    bond: Annotated[float, Field(ge=0, description="`clarity` beyond doubt of a division by the mixtures")] = 1.2
    excluded: Annotated[Share, Field(description="share of a class whose labels are not simply given back")] = 0.3
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
        company = Company.of(said, given, near, classes, rounds=self.rounds, most=most, outsiders=outsiders)
        nearby = torch.stack([company.nearby(said, rounds) for rounds in NEARBY]).amax(0)
        divided = (company.clearest >= DIVIDED)[given]
        suspicion = torch.where(divided, company.suspicion, within(nearby, given))
        enough = (self.ease, self.bond, self.division)
        company = company.believed(enough)
        apart = company.apart(enough)
        suspicion = torch.where(apart, 1.0, suspicion)
        elsewhere = torch.where(confidence >= self.confidence, elsewhere, -1)
        return Deposition(tap, suspicion, ease, near, apart, elsewhere, company.clear)

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
