"""What `jury` holds against each class, and who of it: from the witnesses, and from what the model answers later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from antibackdoor.defenses.company import CERTAIN, alike, distance
from antibackdoor.defenses.deposition import DIVISIONS, PLAIN, Deposition
from antibackdoor.files import Tree
from antibackdoor.intervals import lower
from antibackdoor.training.groups import FEW, clarity, halves, shared
from antibackdoor.training.ranking import within

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury

OUT = -1
"""The label of a sample that nothing learns from at present."""

RARE = 0.5
"""The limit of `kin` for less than `FEW`, and for a group that is `late` and as `alike` as may be. Rare kinds and the
hardest of a class lie there, and are taken for only some of what the rest of their class is taken for; the less alike
they are, the higher is the limit."""

LITTLE = 0.05
"""Share of a class that is left out without a verdict, if it is denied as poison is: clean samples may be, where they
are few, and a class can spare as many."""


class Judgement:
    """Who is trusted, which classes are attacked, and what label each sample gets; nothing is trained here.

    trusted: `(n,)` bool, whose label is taken as given. groups: `(3, n)`, whom the witnesses set apart, but for those
    freed. denied: those whose label the model denied together. excluded: those of an attacked class who do not get
    their label back by agreement. findings: one for each class. last: the epoch after which nothing more is learned.
    """

    def __init__(self, options: Jury, given: Tensor, classes: int, deposition: Deposition, last: int):
        self.options, self.given, self.deposition, self.last = options, given, deposition, last
        self.classes = range(classes)
        self.early = within(deposition.ease, torch.zeros_like(given))
        self.large = torch.bincount(given, minlength=classes) >= FEW
        self.groups, self.denied = deposition.groups.clone(), torch.zeros_like(deposition.apart)
        self.findings = [deposition.finding(label, given) for label in self.classes]
        self.choose()

    def choose(self) -> None:
        """Whose label is trusted, and who of an attacked class does not get it back by agreement; nobody denied."""
        suspicion = self.deposition.suspicion
        self.trusted = suspicion <= self.options.trusted
        for label in self.given.unique().tolist():  # of a class of one or two samples, the least suspicious one
            rows = (self.given == label).nonzero().flatten()
            self.trusted[rows[suspicion[rows].argmin()]] = True
        self.trusted &= ~self.denied
        divided = torch.bincount(self.given, weights=self.apart.double(), minlength=len(self.classes)) > 0
        most = torch.where(divided[self.given], self.apart, suspicion > 1 - self.options.excluded)
        self.excluded = most | self.denied

    def hear(self, probabilities: Tensor, epoch: int) -> Tensor:
        """Find what the answers say against each class; the label `(n,)` that each sample learns from now on, or `OUT`.

        probabilities: `(n, K)` float64, what the model answers after this epoch.
        """
        confidence, answers = probabilities.max(1)
        own = probabilities.gather(1, self.given[:, None]).squeeze(1)
        self._free(own)
        groups = self._denied_together(own, probabilities)
        against = (answers != self.given) & (confidence >= self.options.confidence) & ~self.trusted
        findings = [
            self._finding(label, ~self.trusted & (self.given == label), probabilities, against, epoch)
            for label in self.classes
        ]
        # What was found once stays: later the model would only repeat what it was taught since.
        known = zip(self.findings, findings, groups, strict=True)
        self.findings = [{**(old if old["attacked"] and old["n"] else new), **group} for old, new, group in known]
        attacked = self.attacked[self.given]
        restored = (answers == self.given) & ~self.excluded
        foreign = self.foreign[self.given]
        judged = torch.where(against & foreign, answers, torch.where(restored, self.given, OUT))
        left_out = (own < self.options.impossible / len(self.classes)) & self.excluded & self.large[self.given]
        heard = torch.where(attacked, judged, torch.where(left_out | self.denied, OUT, self.given))
        return torch.where(self.trusted, self.given, heard)

    @property
    def apart(self) -> Tensor:
        """`(n,)` bool: whom any witness set apart and nobody freed."""
        return self.groups.any(0)

    @property
    def attacked(self) -> Tensor:
        """Which classes are, `(K,)` bool."""
        return torch.tensor([bool(finding["attacked"]) for finding in self.findings])

    @property
    def foreign(self) -> Tensor:
        """Which classes are attacked with samples of many others, `(K,)` bool.

        In the others what is taken for poison looks `alike`, and may well be of the class: its labels are true.
        """
        return torch.tensor([f["alike"] < self.options.alike for f in self.findings]) & self.attacked

    @property
    def settled(self) -> bool:
        """Whether there was a hearing, and poison is nowhere or was set apart beyond doubt wherever it is.

        Strong augmentation, which keeps leaked triggers from being learned and costs accuracy, is then needed no more.
        """
        return self.heard and all(finding["apart"] for finding in self.findings if finding["attacked"])

    @property
    def heard(self) -> bool:
        """Whether there was a hearing."""
        return any(finding["n"] for finding in self.findings)

    def carriers(self, labels: Tensor) -> Tensor:
        """`(n,)` bool: who of an attacked class was not given its own at the hearing that gave out these `labels`."""
        return self.attacked[self.given] & (labels != self.given) & self.heard

    def state(self) -> Tree:
        """The findings that the verdict rests on, who is set apart, and who was denied."""
        return {"groups": self.groups, "denied": self.denied, "findings": self.findings}

    def load(self, state: Tree) -> None:
        """Back to them."""
        self.groups, self.denied, self.findings = state["groups"], state["denied"], state["findings"]
        self.choose()

    def _free(self, own: Tensor) -> None:
        """At the first hearing, free a group set apart none too clearly whose labels the model agrees with by half.

        It never learned these labels. A clean kind of its own divides a class, too, but it is known for what it is.
        """
        for label, found in enumerate(self.findings):
            if found["n"]:
                continue
            of_class = self.given == label
            for number, name in enumerate(DIVISIONS):
                group = self.groups[number] & of_class
                if group.any():
                    found["agreed"][name] = float(own[group].mean())
                    if found["agreed"][name] >= 0.5 and found[name] < PLAIN * getattr(self.options, name):
                        self.groups[number] &= ~group
            apart = int((self.apart & of_class).sum())
            found |= {"apart": apart, "attacked": apart > 0}
        self.choose()

    def _denied_together(self, own: Tensor, probabilities: Tensor) -> list[dict[str, Any]]:
        """Find the group in each class whose label the model denies; what is told of it if it convicts the class.

        own: `(n,)`, the model's probability of the given label. A poisoned sample that the model happens to agree with,
        or was taught, is found in the company it keeps; poison of a few samples keeps the company of few, and a faint
        denial is seen in that of many. Odd but clean samples form groups too, but not early ones: these look `alike`,
        or are taken for what the rest of their class is taken for (by `kin`, or only by half, `RARE`, where they are
        the last of all to be learned and not taken for all others evenly). Less than `FEW` of them may be early by
        chance, or be taken for anything: they convict only if both speak against them, and are left out, if they are
        `LITTLE`. Where the denial of enough is `CERTAIN`, as it is of poison from one source class, nothing of this is
        asked.
        """
        told: list[dict[str, Any]] = [{} for _ in self.classes]
        answers = probabilities.argmax(1)
        opinions = [shared(1 - own, self.deposition.near, count) for count in (self.options.closest, None)]
        for label in self.classes:
            rows = (self.given == label).nonzero().flatten()
            if len(rows) < FEW or self.findings[label]["together"]:
                continue
            opinion = max((opinion[rows] for opinion in opinions), key=clarity)
            inside, clear = halves(opinion)[0], clarity(opinion)
            group, rest = rows[inside], rows[~inside]
            if clear < self.options.denial or len(group) > (1 - self.options.trusted) * len(rows):
                continue
            early = float(self.early[group].median())
            alike = self._alike(label, answers[group][answers[group] != label])
            kin = self._kin(label, probabilities[group], probabilities[rest])
            enough = len(group) >= FEW
            below = self._limit_of_kin(early, alike) if enough else RARE
            like_poison = alike < self.options.alike and (early > 0.5 or kin < below)
            certain = clear >= CERTAIN and enough
            convicts = certain or (like_poison and (enough or (early > 0.5 and kin < below)))
            little = int((self.denied[rows] | inside).sum()) <= LITTLE * len(rows)  # with those left out before
            if convicts or (like_poison and little):
                self.denied[group] = True
            if convicts:
                known = {"denial": clear, "together": len(group), "early": early, "alike": alike}
                known |= {"kin": kin, "below": below, "certain": certain}
                told[label] = {**known, "attacked": True}
        self.choose()
        return told

    def _finding(self, label: int, asked: Tensor, probabilities: Tensor, against: Tensor, epoch: int) -> dict[str, Any]:
        """About one class: how many of those asked are confidently taken for others, and whether that is like poison.

        A clean sample that looks like another class is learned late, and known in the end, unless it is of a kind that
        none of the trusted are; then all its kind look like the same class, while poison was gathered from all. Less
        than `FEW` may be early by chance, and from many classes: they must not be taken for what the rest of their
        class is taken for (`kin`, by half). Nor must those that are late and still there in the end, by the limit that
        groups have.
        """
        n, confident = int(asked.sum()), asked & against
        count = int(confident.sum())
        early = float(self.early[confident].median()) if count else 0.0
        answers = probabilities.argmax(1)
        alike = self._alike(label, answers[asked & (answers != label)])
        rest = (self.given == label) & ~confident
        kin = self._kin(label, probabilities[confident], probabilities[rest]) if count else 0.0
        many = lower(count, n) > self.options.acquittal
        found = self.findings[label]
        stayed = many and epoch >= self.last and bool(self.large[label])
        below = RARE if early > 0.5 else self._limit_of_kin(early, alike)
        like_poison = (early > 0.5 and count >= FEW) or (kin < below and (early > 0.5 or stayed))
        like_poison &= alike < self.options.alike
        heard = {"count": count, "n": n, "early": early, "stayed": stayed, "alike": alike, "kin": kin, "below": below}
        return {**found, **heard, "attacked": found["attacked"] or (many and like_poison)}

    def _alike(self, label: int, answers: Tensor) -> float:
        """How far the classes in `answers`, none of them `label`, are off those of all samples that are not of it."""
        return alike(label, answers, self.given)

    def _kin(self, label: int, group: Tensor, rest: Tensor) -> float:
        """How far off the others a group is taken for, over how far off what the rest of its class is taken for.

        group, rest: probabilities `(m, K)`. Poison was gathered from everywhere; a clean group is of its class,
        whatever kind it is, and is taken for what its class is taken for.
        """
        taken, own = (part.sum(0).index_fill(0, torch.tensor([label]), 0) for part in (group, rest))
        return distance(taken, self._others(label)) / max(distance(taken, own), 1e-9)

    def _limit_of_kin(self, early: float, alike: float) -> float:
        """From which `kin` on a group counts as clean; of a late one `RARE`, and more where it is less `alike`."""
        if early > self.options.late:
            return self.options.kin
        return RARE * self.options.alike / max(alike, 0.05)

    def _others(self, label: int) -> Tensor:
        """How many samples each other class has, `(K,)`."""
        return torch.bincount(self.given[self.given != label], minlength=len(self.classes))
