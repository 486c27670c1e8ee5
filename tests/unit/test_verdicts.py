"""Counting verdicts, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.declared import Results
from antibackdoor.bench.ledger import Ledger
from antibackdoor.bench.verdicts import confidences, counts, missed, reliability, verdicts

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


def test_a_confidence_is_held_against_what_was_true(results: Results) -> None:
    found = list(verdicts(results))
    assert confidences(found).to_dict("records") == [
        {"confidence": "0% to 60%", "mean": "55%", "true": "0 of 1"},
        {"confidence": "70% to 80%", "mean": "75%", "true": "1 of 1"},
        {"confidence": "90% to 100%", "mean": "93%", "true": "2 of 2"},
    ]
    assert reliability(found) == [(55, 0.0), (75, 100.0), (93, 100.0)]
