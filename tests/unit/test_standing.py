"""Defenses against each other, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from antibackdoor.bench.declared import Results
from antibackdoor.bench.grid import Grid, read_grid
from antibackdoor.bench.ledger import Ledger
from antibackdoor.bench.standing import standing, stands

GRID = """
[[cells]]
data = ["digits", "ecg5000"]
attacks = ["none", "badnets", "blend"]
defenses = ["none", "abl", "e2abl"]
models = ["resnet18-w16"]
seeds = [0, 1]
"""
NAMES = ("clean_accuracy", "excess_attack_success_rate", "attack_success_rate")
MEASURED = {  # data, attack, defense, seed: clean accuracy, excess and whole attack success rate
    ("digits", "none", "none", 0): (0.9, None, None),
    ("digits", "badnets", "none", 0): (0.9, 0.97, 0.99),
    ("digits", "badnets", "none", 1): (0.8, 0.99, 1.0),
    ("digits", "blend", "none", 0): (0.9, 0.4, 0.5),  # does not take
    ("ecg5000", "badnets", "none", 0): (0.7, 0.96, 0.98),
    ("digits", "none", "e2abl", 0): (0.88, None, None),
    ("digits", "badnets", "e2abl", 0): (0.89, 0.01, 0.02),
    ("digits", "badnets", "e2abl", 1): (0.82, -0.02, 0.0),
    ("digits", "blend", "e2abl", 0): (0.1, 0.9, 0.9),
    ("ecg5000", "badnets", "abl", 0): (0.6, 0.5, 0.51),
    ("ecg5000", "badnets", "abl", 1): (0.6, 0.5, 0.51),  # nothing to compare with
}


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    (tmp_path / "grid.toml").write_text(GRID)
    return read_grid(tmp_path / "grid.toml")


@pytest.fixture
def results(grid: Grid, tmp_path: Path) -> Results:
    ledger = Ledger(tmp_path / "ledger")
    for place in grid.places:
        key = tuple(place.axes[name] for name in ("data", "attack", "defense", "seed"))
        if key in MEASURED:
            named = zip(NAMES, MEASURED[key], strict=True)
            measures = {name: {"value": value} for name, value in named if value is not None}
            ledger.write(place.cell.name(), {"cell": place.cell.resolved(), "measures": measures})
    return Results(tmp_path / "ledger")


def test_each_cell_stands_beside_the_undefended_one(grid: Grid, results: Results) -> None:
    found = [one for one in stands(grid, results) if one.defense != "none"]
    told = [(one.defense, one.kind, one.excess, round(one.lost, 6)) for one in found]
    assert told == [
        ("abl", "series", 50.0, 10.0),
        ("e2abl", "image", None, 2.0),
        ("e2abl", "image", 1.0, 1.0),
        ("e2abl", "image", -2.0, -2.0),
    ]


def test_a_row_a_defense(grid: Grid, results: Results) -> None:
    rows = standing(list(stands(grid, results))).set_index("defense")
    assert list(rows.index) == ["none", "abl", "e2abl"]
    assert rows.loc["e2abl"].to_dict() == {
        "attacked sets": "2",
        "mean excess ASR": "-0.5",
        "worst excess ASR": "1.0",
        "CA lost on them": "-0.5",
        "clean sets": "1",
        "CA lost on clean sets": "2.0",
    }
    assert rows.loc["abl", "clean sets"] == "0" and rows.loc["abl", "CA lost on clean sets"] == ""
