"""Verdicts of a ledger's cells against the truth: false alarms, misses, and what their confidence is worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from antibackdoor.bench.declared import Results

BINS = (0.0, 0.6, 0.7, 0.8, 0.9, 1.01)
"""Of the confidence: few runs so far, so few bins."""


class Judged(NamedTuple):
    """A verdict and what it was about.

    attack: with its rate. takes: what the undefended cells say of it. free: whether its model obeys no trigger.
    """

    by: str
    data: str
    attack: str
    takes: str
    poisoned: bool
    said: bool
    right: bool
    confidence: float
    ratio: float
    free: bool

    @property
    def true(self) -> bool:
        """Whether the set is what the verdict says."""
        return self.said == self.poisoned


def verdicts(ledger: Results) -> Iterator[Judged]:
    """Of every cell that has one."""
    for record in ledger.records.values():
        cell, measures = record["cell"], record["measures"]
        usual = cell["defense"] == "jury" and not cell.get("defense_changes")  # as users run it, nothing taken away
        told = {"jury": measures.get("verdict")} if usual else {}
        told["witnesses"] = measures.get("detectors", {}).get("witnesses", {}).get("verdict")
        for by, verdict in told.items():
            if verdict is None or cell["attack_options"].get("rate") == 0:
                continue
            values = {name: measure["value"] for name, measure in verdict.items()}
            rate = cell["attack_options"].get("rate", 0)
            yield Judged(
                by,
                cell["data"],
                f"{cell['attack']} at {rate:.1%}",
                ledger.gate_of(cell) if rate >= 0.01 else "rare",
                cell["attack"] != "none",
                bool(values["poisoned"]),
                bool(values["right"]),
                values["confidence"],
                values.get("rate_ratio", 1.0),
                by == "jury" and measures.get("excess_attack_success_rate", {"value": 1})["value"] <= 0.05,
            )


def counts(found: list[Judged]) -> pd.DataFrame:
    """One row a data set, and one of all."""
    rows = []
    for data in [*sorted({one.data for one in found}), "all"]:
        mine = [one for one in found if data in (one.data, "all")]
        clean, bites = [one for one in mine if not one.poisoned], [one for one in mine if one.takes == "takes"]
        caught = [one for one in bites if one.said]
        weak = [one for one in mine if one.poisoned and one.takes != "takes"]
        row = {
            "data": data,
            "false alarms": (sum(one.said for one in clean), len(clean)),
            "found": (len(caught), len(bites)),
            "right class": (sum(one.right for one in caught), len(caught)),
            "rate": (sum(2 / 3 <= one.ratio <= 1.5 for one in caught), len(caught)),
            "found of the others": (sum(one.said for one in weak), len(weak)),
        }
        rows.append({name: value if name == "data" else f"{value[0]} of {value[1]}" for name, value in row.items()})
    return pd.DataFrame(rows)


def binned(found: list[Judged]) -> Iterator[tuple[float, float, list[Judged]]]:
    """The runs by confidence; none of attacks that do not take."""
    for low, high in itertools.pairwise(BINS):
        mine = [one for one in found if low <= one.confidence < high and (not one.poisoned or one.takes == "takes")]
        if mine:
            yield low, high, mine


def confidences(found: list[Judged]) -> pd.DataFrame:
    """How often an answer was true, by the confidence that it was given with."""
    return pd.DataFrame(
        {
            "confidence": f"{low:.0%} to {min(high, 1):.0%}",
            "mean": f"{sum(one.confidence for one in mine) / len(mine):.0%}",
            "true": f"{sum(one.true for one in mine)} of {len(mine)}",
        }
        for low, high, mine in binned(found)
    )


def reliability(found: list[Judged]) -> list[tuple[float, float]]:
    """The same as points of a curve, in per cent."""
    return [
        (round(100 * sum(one.confidence for one in mine) / len(mine)), 100 * sum(one.true for one in mine) / len(mine))
        for _, _, mine in binned(found)
    ]


def missed(found: list[Judged]) -> list[str]:
    """Which attacks that take passed unseen, and of which of them the model is free all the same."""
    unseen = [one for one in found if one.takes == "takes" and not one.said]
    free = " (of which its model is free)"
    return sorted({f"{one.attack} on {one.data}{free if one.free else ''}" for one in unseen})
