"""The answer a user acts on: does this set look poisoned, towards which class, how much, how sure, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.defenses.deposition import DIVISIONS
from antibackdoor.intervals import lower, upper
from antibackdoor.threats import references
from antibackdoor.training.groups import FEW


class Calibration(NamedTuple):
    """How many of the sets whose verdicts are as clear as this one are poisoned, if half of all are.

    `P(poisoned | margin) = blind + (1 - blind) * sigmoid(slope * (min(margin, 2) - even))`: some attacks leave no
    trace, so that no margin, however small, says for certain that there is none.
    """

    blind: float
    slope: float
    even: float

    def chance(self, margin: float) -> float:
        """Of being poisoned, by how far the furthest class is on its way to being found attacked, 1 at the limit."""
        return self.blind + (1 - self.blind) / (1 + math.exp(-self.slope * (min(margin, 2.0) - self.even)))

    def confidence(self, margin: float, poisoned: bool) -> float:
        """That the answer is right: at least that of a guess, and never certain."""
        chance = self.chance(margin)
        return round(min(0.99, max(0.5, chance if poisoned else 1 - chance)), 3)


HEARD = Calibration(blind=0.06, slope=12.7, even=0.77)
"""Of the default defense and detector: what the runs of the ledger give, as a test holds (docs/verdict.md)."""


@dataclass(frozen=True)
class Verdict:
    """confidence: in [0, 1] that the answer is right; 0 where nothing was judged, so that `poisoned` means nothing.

    estimated_rate: share of the whole set that looks poisoned. margin: what a calibrated confidence was made of, None
    where the confidence is not calibrated and only puts runs in order.
    """

    poisoned: bool
    confidence: float
    target_classes: list[str] = field(default_factory=list)
    estimated_rate: float = 0.0
    evidence: list[str] = field(default_factory=list)
    margin: float | None = None

    @property
    def judged(self) -> bool:
        """Whether there is an answer at all: too few samples, say, cannot be judged."""
        return self.poisoned or self.confidence > 0

    def as_json(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        return {**asdict(self), "judged": self.judged, "references": references(self.poisoned)}


NO_VERDICT = (
    "This defense gives no verdict: it treats a fixed share of the samples as poison, or repairs its model, whether or "
    "not the data is poisoned."
)


def decide(data: Data, outcome: Outcome, calibration: Calibration = HEARD) -> Verdict:
    """Weigh the outcome's evidence; a method that gathers none (no defense) finds nothing and says so.

    calibration: of methods that judge class by class.
    """
    evidence = outcome.evidence
    if not evidence:
        return Verdict(
            False, 0.0, evidence=["This method looks for no poison; train with a defense to have the data judged."]
        )
    if "by_class" in evidence:
        return _by_class(data, evidence, calibration)
    if evidence.get("backdoor_class", -1) < 0:
        said = "No class was singled out, so nothing was judged." if "backdoor_class" in evidence else NO_VERDICT
        return Verdict(False, 0.0, evidence=[said])
    name = data.spec.classes[evidence["backdoor_class"]]
    more, less, rest = (evidence[f"disagree_in_{part}"] for part in ("suspicious_half", "other_half", "rest_of_class"))
    asked = {"count": more["count"] + less["count"], "n": more["n"] + less["n"]}
    if not (more["n"] and less["n"] and rest["n"]):
        return Verdict(False, 0.0, evidence=[f"Too few samples are labeled {name!r} to judge them."])
    sentences = [
        f"The shallow layers tie {asked['n']} samples most closely to the class {name!r}. The main model was trained "
        f"without them and then asked: it takes {asked['count']} of them for other classes, against {rest['count']} of "
        f"the {rest['n']} samples of that class that it was trained with.",
        f"Among the more suspicious half it is {more['count']} of {more['n']}, among the other half {less['count']} of "
        f"{less['n']}. In clean data what is learned first is the easiest, so the first share is the smaller one.",
    ]
    known = upper(**rest)
    many = lower(**asked) - max(known, MANY)
    concentrated = lower(**more) - max(known, upper(**less))
    gap = max(many, concentrated)
    if gap <= 0:
        return Verdict(False, _sure(-gap), [], 0.0, sentences)
    return Verdict(True, _sure(gap), [name], evidence["flagged"] / len(data), sentences)


def _by_class(data: Data, evidence: dict[str, Any], calibration: Calibration) -> Verdict:
    """What witnesses and a model that learned from trusted samples found about each class."""
    findings = dict(zip(data.spec.classes, evidence["by_class"], strict=False))
    targets = [name for name, found in findings.items() if found["attacked"]]
    if not targets and int(data.y.bincount().max()) < FEW:
        return Verdict(False, 0.0, evidence=[f"No class has {FEW} samples or more; that is too few to judge the data."])
    way = {name: _way(found, evidence["limits"]) for name, found in findings.items()}
    shown = targets or [max(way, key=lambda name: way[name])]
    sentences = [sentence for name in shown for sentence in told_of(name, findings[name], evidence["limits"])]
    poisoned, margin = bool(targets), max(way[name] for name in shown)
    rate = evidence["flagged"] / len(data) if poisoned else 0.0
    return Verdict(poisoned, calibration.confidence(margin, poisoned), targets, rate, sentences, round(margin, 3))


def _way(found: dict[str, Any], limits: dict[str, float]) -> float:
    """How far a class is on the way to being found attacked: 1 at the limit, of several ways the furthest."""
    beyond_doubt = 0.0
    for name in DIVISIONS:
        clear = found[name] / max(limits[name], 1e-9)
        denied = (1 - found["agreed"].get(name, 0.0)) / 0.5
        beyond_doubt = max(beyond_doubt, clear / limits["plain"], min(clear, denied))
    mixed = (1 - found["alike"]) / max(1 - limits["alike"], 1e-9)
    early, kin = found["early"] / 0.5, found["below"] / max(found["kin"], 1e-9)
    heard = together = 0.0
    if found["together"]:
        denied = found["denial"] / max(limits["denial"], 1e-9)
        either = min(early, kin) if found["together"] < FEW else max(early, kin)
        together = denied if found["certain"] else min(denied, either, mixed)
    elif found["n"]:
        many = lower(found["count"], found["n"]) / max(limits["acquittal"], 1e-9)
        sooner = min(early, kin) if found["count"] < FEW else early
        heard = min(many, max(sooner, kin) if found["stayed"] else sooner, mixed)
    return max(beyond_doubt, together, heard)


def told_of(name: str, found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """What was found about one class: what it means first, the numbers in brackets."""
    told = _told_of_divisions(name, found, limits)
    mixed = "many classes, as poison does" if found["alike"] < limits["alike"] else "one class, as a rare kind does"
    look = (
        f"They look like {mixed} (what they are taken for is {found['alike']:.0%} off the mix of all other classes; "
        f"{limits['alike']:.0%} or more is one kind)."
    )
    nearer = "nearer" if found["kin"] < found["below"] else "not much nearer"
    kin = (
        f"What they are taken for is {nearer} to that mix than to what the rest of {name!r} is taken for "
        f"({found['kin']:.2f} of that distance; {found['below']:.2f} or more is of its class)."
    )
    if found["together"]:
        like_poison = found["alike"] < limits["alike"] and (found["early"] > 0.5 or found["kin"] < found["below"])
        early = (
            "They were learned early, as poison is "
            f"(half of them earlier than {found['early']:.0%} of all samples; more than 50% is early)."
        )
        if not like_poison:
            why = [
                "That would be said of clean samples, too, but the model leaves next to no doubt about all of these "
                f"(clarity {found['denial']:.1f}; from {limits['certain']:.1f} on they are poison, or mislabeled)."
            ]
        elif found["together"] < FEW:
            why = [early, kin]
        else:
            why = [early if found["early"] > 0.5 else kin]
        told += [
            f"A model that learned from trusted samples denies the label {name!r} to a group of samples that lie "
            f"together ({found['together']}), and not to the others of the class.",
            look,
            *why,
        ]
    elif found["n"]:
        counts = f"({found['count']} of the {found['n']} that it was not shown)"
        few = lower(found["count"], found["n"]) <= limits["acquittal"]
        if few and not found["apart"]:
            told.append(
                f"A model that learned from trusted samples takes few samples labeled {name!r} for other classes, as "
                f"in clean data {counts}."
            )
        elif not few:
            when = (
                "early, as poison is"
                if found["early"] > 0.5
                else "late, and are not what they are labeled in the end either, when odd but clean samples are known"
                if found["stayed"]
                else "late, as odd but clean samples are"
            )
            told += [
                f"A model that learned from trusted samples takes more samples labeled {name!r} for other classes, "
                f"with confidence, than mistakes explain {counts}.",
                f"They were learned {when} (half of them earlier than {found['early']:.0%} of all samples; more than "
                "50% is early).",
                look,
                *([kin] if found["stayed"] or (found["count"] < FEW and found["early"] > 0.5) else []),
            ]
    return told or ["No class falls into two: not when it is learned, not mixed, not for models that never saw it."]


def _told_of_divisions(name: str, found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """By what a class is divided, and what the model says of those set apart by it."""
    meaning = {
        "ease": (
            f"Some samples labeled {name!r} lie together and were learned apart from the others of the class",
            "a shallow model came to know all of them sooner, or all of them later.",
        ),
        "bond": (
            f"Something other than what they show ties some samples to the label {name!r}",
            f"averaged with samples of other classes they are still taken for {name!r}, and others of it are not.",
        ),
        "division": (
            f"Some samples labeled {name!r} look like samples of another class",
            "models that never saw this label are sure of another for them, and not for the others of the class.",
        ),
    }
    told = []
    for division, (what, why) in meaning.items():
        if found[division] < limits[division]:
            continue
        agreed = found["agreed"].get(division)
        weak = agreed is not None and found[division] < limits["plain"] * limits[division]
        freed = weak and agreed >= 0.5
        apart = "" if freed or not found["apart"] else f" ({found['apart']} are set apart)"
        told.append(f"{what}{apart}: {why}")
        if weak:
            told.append(
                f"A model that never learned their label {'agrees with' if freed else 'denies'} it (gives it "
                f"{agreed:.0%} in the mean; from 50% on they count as a kind of their own, unless the class is divided "
                f"{limits['plain']:.1f} times as clearly as is beyond doubt)."
            )
    return told


MANY = 0.4
"""A clean class of which the main model takes more than this share for others, unseen, would be no class at all."""


def _sure(gap: float) -> float:
    """Confidence from the gap between two shares: a monotone map into 0.5 .. 0.99, not calibrated."""
    return round(min(0.99, max(0.5, 0.5 + gap)), 3)
