"""The answer a user acts on: does this set look poisoned, towards which class, how much, how sure, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.defenses.deposition import DIVISIONS
from antibackdoor.evidence import told_of, told_of_hold
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
"""Of the default defense and detector, their options as they are: what the ledger gives, as a test holds."""


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
    if "hold" in evidence:
        sentences += told_of_hold(targets, evidence["hold"])
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


MANY = 0.4
"""A clean class of which the main model takes more than this share for others, unseen, would be no class at all."""


def _sure(gap: float) -> float:
    """Confidence from the gap between two shares: a monotone map into 0.5 .. 0.99, not calibrated."""
    return round(min(0.99, max(0.5, 0.5 + gap)), 3)
