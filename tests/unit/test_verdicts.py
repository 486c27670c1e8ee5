"""Counting verdicts, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.declared import Results
from antibackdoor.bench.ledger import Ledger
from antibackdoor.bench.verdicts import Judged, calibrate, confidences, counts, missed, told, verdicts
from antibackdoor.detectors.witnesses import UNHEARD
from antibackdoor.verdict import HEARD, Calibration

PLAIN = Cell(data="ecg5000", attack="badnets", defense="none", model="resnet18-w16")


def write(ledger: Ledger, cell: Cell, rate: float, verdict: dict[str, float] | None = None) -> None:
    measures: dict[str, Any] = {name: {"value": rate} for name in ("attack_success_rate", "excess_attack_success_rate")}
    if verdict is not None:
        measures["verdict"] = {name: {"value": value, "n": 1} for name, value in verdict.items()}
    ledger.write(cell.name(), {"cell": cell.resolved(), "measures": measures})


@pytest.fixture
def results(tmp_path: Path) -> Results:
    ledger, jury = Ledger(tmp_path), replace(PLAIN, defense="jury")
    write(ledger, PLAIN, 0.99)
    write(ledger, replace(PLAIN, attack="blend"), 0.5)
    said = {"poisoned": 1.0, "right": 1.0, "confidence": 0.95, "estimated_rate": 0.1, "rate_ratio": 1.4}
    write(ledger, jury, 0.0, said)
    write(ledger, replace(jury, seed=1), 0.02, {**said, "poisoned": 0.0, "right": 0.0, "confidence": 0.55})
    write(ledger, replace(jury, seed=2), 0.0, {**said, "right": 0.0, "confidence": 0.91, "rate_ratio": 1.6})
    write(ledger, replace(jury, attack="blend"), 0.0, said)
    write(ledger, replace(jury, defense_options={"neighbors": 0}), 0.9, said)  # not as users run it: not counted
    write(ledger, replace(jury, attack="none"), 0.0, {**said, "poisoned": 0.0, "confidence": 0.75})
    return Results(tmp_path)


def test_verdicts_are_counted_where_the_attack_takes(results: Results) -> None:
    found = list(verdicts(results))
    assert len(found) == 5 and {one.by for one in found} == {"jury"}
    row = counts(found).set_index("data").loc["all"]
    assert row.to_dict() == {
        "false alarms": "0 of 1",
        "found": "2 of 3",
        "right class": "1 of 2",
        "rate": "1 of 2",
        "found of the others": "1 of 1",
    }
    assert missed(found) == ["badnets at 10.0% on ecg5000 (of which its model is free)"]


def test_a_margin_is_that_of_the_record_or_what_an_old_confidence_was_made_of(results: Results) -> None:
    old = [round(one.margin, 3) for one in verdicts(results)]
    assert sorted(old) == [0.375, 0.875, 1.82, 1.9, 1.9]
    said = {"poisoned": 1.0, "right": 1.0, "confidence": 0.99, "margin": 7.5}
    folder = results.ledger.folder
    write(Ledger(folder), replace(PLAIN, defense="jury", seed=9), 0.0, said)
    assert max(one.margin for one in verdicts(Results(folder))) == 7.5


def runs(data: str, poisoned: bool, margins: list[float]) -> list[Judged]:
    """Verdicts that are found from a margin of 1 on."""
    return [
        Judged("jury", data, "x at 10.0%", "takes" if poisoned else "rare", poisoned, m >= 1, True, m, 1.0, False)
        for m in margins
    ]


def test_a_calibration_is_what_the_runs_were_drawn_from() -> None:
    drawn, random = Calibration(0.2, 8.0, 0.8), np.random.default_rng(0)
    margins = random.uniform(0, 1.5, 4000)
    poisoned = random.random(4000) < [drawn.chance(float(m)) for m in margins]
    found = runs("a", True, list(margins[poisoned])) + runs("a", False, list(margins[~poisoned]))
    share = poisoned.mean() / (1 - poisoned.mean())  # of equal weight: as if half of the sets were poisoned
    fitted = calibrate(found)
    for margin in (0.2, 0.6, 0.8, 1.0, 1.4):
        odds = drawn.chance(margin) / (1 - drawn.chance(margin)) / share
        assert fitted.chance(margin) == pytest.approx(odds / (1 + odds), abs=0.04)


def test_a_calibration_takes_both_sorts_and_counts_attacks_that_take() -> None:
    with pytest.raises(ValueError, match="on clean and on poisoned sets"):
        calibrate(runs("a", True, [1.5]))
    found = runs("a", True, [1.4, 1.6]) + runs("a", False, [0.2, 0.4])
    weak = [one._replace(takes="attack did not take", margin=0.0, said=False) for one in found[:2]]
    assert calibrate([*found, *weak]) == calibrate(found) and told([*found, *weak]) == told(found)
    assert calibrate(found).slope <= 20, "runs that a margin parts without fail say nothing of its steepness"


def test_a_data_set_does_not_calibrate_its_own_confidence() -> None:
    clear = runs("clear", True, [1.9, 1.8, 2.0]) + runs("clear", False, [0.1, 0.2, 0.1])
    hidden = runs("hidden", True, [0.1, 0.1, 0.2]) + runs("hidden", False, [0.1, 0.2, 0.2])
    found = {one.high: one for one in told(clear + hidden)}
    assert found[1.0].n - found[1.0].true == 3, "what hides was told with the confidence that the clear ones teach"
    assert found[0.7].n == found[0.7].true == 3, "and clean sets are a guess to who knows the hidden ones only"
    few = told(runs("a", True, [2.0]) + runs("a", False, [0.1, 2.0, 2.0, 2.0]))
    assert [(one.true, one.n, one.even) for one in few if one.n == 4] == [(1, 4, pytest.approx(1 / (1 + 3 / 4)))]


def test_the_confidence_that_users_get_is_what_the_ledger_gives() -> None:
    found = list(verdicts(Results(Path(__file__).parents[2] / "results")))
    for by, stated in (("jury", HEARD), ("witnesses", UNHEARD)):
        fitted = calibrate([one for one in found if one.by == by])
        apart = max(abs(stated.chance(m / 50) - fitted.chance(m / 50)) for m in range(100))
        assert apart < 0.03, f"the ledger has grown: put {fitted} in its place"
    rows = confidences([one for one in found if one.by == "jury"])
    assert list(rows) == ["confidence", "mean", "true", "true at even odds"] and len(rows) >= 3
