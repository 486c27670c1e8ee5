"""The answer a user acts on: does this set look poisoned, towards which class, how much, how sure, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome


@dataclass(frozen=True)
class Verdict:
    """confidence: in [0, 1] that the answer is right. estimated_rate: share of the whole set that looks poisoned."""

    poisoned: bool
    confidence: float
    target_classes: list[str] = field(default_factory=list)
    estimated_rate: float = 0.0
    evidence: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        return asdict(self)


def decide(data: Data, outcome: Outcome) -> Verdict:
    """Weigh the outcome's evidence; a method that gathers none (no defense) finds nothing and says so."""
    evidence = outcome.evidence
    if not evidence:
        return Verdict(
            False, 0.0, evidence=["This method looks for no poison; train with a defense to have the data judged."]
        )
    if evidence["backdoor_class"] < 0:
        return Verdict(False, 0.0, evidence=["No class was singled out, so nothing was judged."])
    name = data.spec.classes[evidence["backdoor_class"]]
    first, second = evidence["disagree_in_suspicious_half"], evidence["disagree_in_other_half"]
    more, less = (_lower(first), _upper(second)) if first["n"] and second["n"] else (0.0, 1.0)
    sentences = [
        f"The shallow layers tie {first['n'] + second['n']} samples most closely to the class {name!r}. The main model "
        "was trained without them and then asked.",
        f"It takes {first['count']} of the {first['n']} more suspicious ones, and {second['count']} of the "
        f"{second['n']} less suspicious ones, for other classes. In clean data the first share is the smaller one.",
    ]
    if more <= less:
        return Verdict(False, _sure(less - more), [], 0.0, sentences)
    return Verdict(True, _sure(more - less), [name], evidence["flagged"] / len(data), sentences)


def _lower(part: dict[str, int], z: float = 1.64) -> float:
    """Lower end of the Wilson interval of a share, one-sided 95 %."""
    return _wilson(part, -z)


def _upper(part: dict[str, int], z: float = 1.64) -> float:
    """Upper end of the Wilson interval of a share, one-sided 95 %."""
    return _wilson(part, z)


def _wilson(part: dict[str, int], z: float) -> float:
    n, p = part["n"], part["count"] / part["n"]
    return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def _sure(gap: float) -> float:
    """Confidence from the gap between two shares; not calibrated yet (a monotone map into 0.5 .. 0.99)."""
    return round(min(0.99, 0.5 + gap), 3)
