"""The answer a user acts on: does this set look poisoned, towards which class, how much, how sure, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
