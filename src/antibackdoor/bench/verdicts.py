"""Verdicts of a ledger's cells against the truth: false alarms, misses, and what their confidence is worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from antibackdoor.bench.declared import Results
from antibackdoor.verdict import Calibration

BINS = (0.0, 0.7, 0.9, 0.97, 1.01)
"""Of the confidence: few runs so far, so few bins."""
STEEPEST = 20.0
"""Slope of a calibration at most: from few runs, which a margin parts without fail, there is no more to learn."""


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
    margin: float
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
                _margin(values),
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


def calibrate(found: Sequence[Judged]) -> Calibration:
    """The calibration that makes the verdicts on these sets likeliest, clean and poisoned ones of equal weight.

    Sets whose attack does not take, or is rare, do not count. Raises ValueError where either sort is missing.
    """
    from scipy.optimize import minimize  # takes a second to load

    mine = _counted(found)
    poisoned, margins = np.array([one.poisoned for one in mine]), np.array([one.margin for one in mine])
    if not poisoned.any() or poisoned.all():
        raise ValueError("a calibration takes verdicts on clean and on poisoned sets")
    weights = np.where(poisoned, 0.5 / poisoned.sum(), 0.5 / (~poisoned).sum())

    def surprise(free: np.ndarray) -> float:
        calibration = Calibration(1 / (1 + np.exp(-free[0])), *free[1:])
        chances = np.array([calibration.chance(margin) for margin in margins])
        return -float(weights @ np.log(np.where(poisoned, chances, 1 - chances).clip(1e-6)))

    start, bounds = (-3.0, 6.0, 0.8), ((-5.0, 5.0), (1.0, STEEPEST), (0.0, 2.0))
    blind, slope, even = minimize(surprise, start, method="Nelder-Mead", bounds=bounds).x
    return Calibration(float(1 / (1 + np.exp(-blind))), float(slope), float(even))


class Told(NamedTuple):
    """Verdicts of like confidence: from `low` to `high`, in the mean, and how often true, also at even odds."""

    low: float
    high: float
    mean: float
    true: int
    n: int
    even: float


def told(found: Sequence[Judged]) -> list[Told]:
    """How often verdicts were true by their confidence; each data set is calibrated on the others (if of both sorts).

    At even odds: clean and poisoned sets weigh the same, however many there are of each.
    """
    mine = _counted(found)
    weight = {poisoned: 1 / max(1, sum(one.poisoned == poisoned for one in mine)) for poisoned in (False, True)}
    confidence = np.zeros(len(mine))
    for data in {one.data for one in mine}:
        others = [one for one in mine if one.data != data]
        calibration = calibrate(others if len({one.poisoned for one in others}) == 2 else mine)
        for row, one in enumerate(mine):
            if one.data == data:
                confidence[row] = calibration.confidence(one.margin, one.said)
    true, weights = np.array([one.true for one in mine]), np.array([weight[one.poisoned] for one in mine])
    bins = []
    for low, high in itertools.pairwise(BINS):
        inside = (low <= confidence) & (confidence < high)
        if inside.any():
            mean, even = confidence[inside].mean(), np.average(true[inside], weights=weights[inside])
            bins.append(Told(low, min(high, 1.0), float(mean), int(true[inside].sum()), int(inside.sum()), float(even)))
    return bins


def confidences(found: Sequence[Judged]) -> pd.DataFrame:
    """The same as a table."""
    return pd.DataFrame(
        {
            "confidence": f"{one.low:.0%} to {one.high:.0%}",
            "mean": f"{one.mean:.1%}",
            "true": f"{one.true} of {one.n}",
            "true at even odds": f"{one.even:.1%}",
        }
        for one in told(found)
    )


def missed(found: list[Judged]) -> list[str]:
    """Which attacks that take passed unseen, and of which of them the model is free all the same."""
    unseen = [one for one in found if one.takes == "takes" and not one.said]
    free = " (of which its model is free)"
    return sorted({f"{one.attack} on {one.data}{free if one.free else ''}" for one in unseen})


def _margin(values: dict[str, float]) -> float:
    """How clear a verdict is; of records that do not say so, from their confidence, which told no more than that."""
    if "margin" in values:
        return values["margin"]
    return 2 * values["confidence"] if values["poisoned"] else (0.9 - values["confidence"]) / 0.4


def _counted(found: Sequence[Judged]) -> list[Judged]:
    """Without those of attacks that do not take, or are rare."""
    return [one for one in found if not one.poisoned or one.takes == "takes"]
