"""What a finding is called elsewhere: entries of MITRE ATLAS and of the NIST AI Risk Management Framework."""

from __future__ import annotations

from dataclasses import asdict, dataclass

ATLAS, NIST = "MITRE ATLAS", "NIST AI RMF 1.0"


@dataclass(frozen=True)
class Reference:
    """One entry: where, its id and name there, and what it has to do with the finding."""

    framework: str
    id: str
    name: str
    why: str
    url: str


def _atlas(entry: str, name: str, why: str) -> Reference:
    kind = "mitigations" if entry.startswith("AML.M") else "techniques"
    return Reference(ATLAS, entry, name, why, f"https://atlas.mitre.org/{kind}/{entry}")


def _nist(entry: str, name: str, why: str) -> Reference:
    return Reference(NIST, entry, name, why, "https://www.nist.gov/itl/ai-risk-management-framework")


POISONED = (
    _atlas("AML.T0020", "Training Data Poisoning", "samples were put into the data to change what a model learns"),
    _atlas("AML.T0018.000", "Poison AI Model", "what a model trained on the data as they are would be"),
    _atlas("AML.T0043.004", "Insert Backdoor Trigger", "how such a model would be abused"),
    _atlas("AML.T0010.002", "AI Supply Chain Compromise: Data", "the way in, where the data come from somebody else"),
    _nist("MANAGE 3.1", "Third-party risks are monitored, and controls are applied", "the source of the data"),
)
ALWAYS = (
    _atlas("AML.M0007", "Sanitize Training Data", "the mitigation that this run is"),
    _nist("MEASURE 2.7", "Security and resilience are evaluated and documented", "this verdict and its evidence"),
)
"""Names as of ATLAS 2026.07, where AML.T0020 was called Poison Training Data before."""


def references(poisoned: bool) -> list[dict[str, str]]:
    """The entries that a verdict touches, as plain JSON values."""
    return [asdict(entry) for entry in ((*POISONED, *ALWAYS) if poisoned else ALWAYS)]
