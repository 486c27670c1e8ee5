"""The answer a user acts on: does this set look poisoned, towards which class, how much, how sure, and why."""

from __future__ import annotations

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
    name = data.spec.classes[evidence["backdoor_class"]]
    ours, others = evidence["disagree_on_candidates"], evidence["disagree_on_other_isolated"]
    mine = (ours["count"] + 1) / (ours["n"] + 2)
    rest = (others["count"] + 1) / (others["n"] + 2)
    poisoned = evidence["flagged"] > 0 and mine > 2 * rest and mine > 0.25
    sentences = [
        f"The shallow head singles out the class {name!r}: {ours['n']} samples so labeled were learned first and kept from "
        f"the main model, which takes {ours['count']} of them for another class.",
        f"For early samples of all other labels it disagrees with {others['count']} of {others['n']}.",
    ]
    margin = abs(mine - max(2 * rest, 0.25))
    confidence = min(0.99, 0.5 + margin)
    if not poisoned:
        return Verdict(False, confidence, [], 0.0, sentences)
    return Verdict(True, confidence, [name], evidence["flagged"] / len(data), sentences)
