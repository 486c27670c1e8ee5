"""Grids, cells and tables."""

from pathlib import Path
from typing import Any

import pytest

from antibackdoor.bench.cell import Cell, run_cell
from antibackdoor.bench.grid import read_grid
from antibackdoor.bench.ledger import detection_table, markdown, read_ledger, run_cells, table
from antibackdoor.errors import InputError

GRID = """
[[cells]]
data = ["digits"]
train_size = 120
attacks = ["badnets"]
attack_options = { rate = 0.2 }
defenses = ["none", "e2abl"]
models = ["resnet18-w4"]
epochs = 1
seeds = [0]
[[cells]]
data = ["digits"]
train_size = 120
attacks = ["none"]
defenses = ["none"]
models = ["resnet18-w4"]
epochs = 1
seeds = [0, 0]
"""
FAST = {
    "e2abl": {"warm_up.epochs": 1, "warm_up.min_steps": 0, "main.min_steps": 0},
    "none": {"recipe.min_steps": 0},
}


def grid(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_grid_is_the_product_of_its_lists_without_doubles(tmp_path: Path) -> None:
    cells = read_grid(grid(tmp_path, GRID))
    assert [(c.attack, c.defense, c.seed) for c in cells] == [
        ("badnets", "none", 0),
        ("badnets", "e2abl", 0),
        ("none", "none", 0),
    ]
    assert cells[0].attack_options == {"rate": 0.2} and cells[0].train_size == 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must consist of"),
        ("[[cells]]\nattaks = ['badnets']", "did you mean 'attacks'"),
        ("[[cells]]\nseeds = []", "at least one"),
        ("[[cells", "not a grid"),
        ("[[cells]]\nepochs = 'many'", "epochs"),
    ],
)
def test_a_bad_grid_is_told_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_grid(grid(tmp_path, text))


def test_the_name_of_a_cell_follows_its_settings() -> None:
    one, same, other = Cell(defense="e2abl"), Cell(defense="e2abl", seed=0), Cell(defense="e2abl", seed=1)
    explicit = Cell(defense="e2abl", defense_options={"recovery_rate": 0.01})
    assert one.name() == same.name() == explicit.name() != other.name()


def test_cells_run_once_and_a_broken_one_does_not_stop_the_rest(tmp_path: Path) -> None:
    cells = [Cell(**{**vars(cell), "defense_options": FAST[cell.defense]}) for cell in read_grid(grid(tmp_path, GRID))]
    cells.insert(1, Cell(data="digits", attack="badnets", attack_options={"target": 99}))
    ledger, told = tmp_path / "ledger", []

    def run() -> int:
        return run_cells(cells, ledger, stages=tmp_path / "stages", device="cpu", tell=told.append)

    assert run() == 1
    assert any("99" in line for line in told)
    assert len(list(ledger.glob("*.error.json"))) == 1
    before = {path.name: path.read_bytes() for path in ledger.glob("*.json") if "error" not in path.name}
    assert set(before) == {f"{cell.name()}.json" for cell in cells if cell.attack_options.get("target") != 99}
    told.clear()
    assert run() == 1 and len(told) == 2  # only the broken one is tried again
    assert before == {name: (ledger / name).read_bytes() for name in before}

    records = read_ledger(ledger)
    rows = table(records)
    assert rows[["attack", "n"]].to_numpy().tolist() == [["badnets", 1], ["badnets", 1], ["none", 1]]
    assert rows["gate"].tolist()[2] == "" and set(rows["gate"].tolist()[:2]) <= {"takes", "attack did not take"}
    found = detection_table(records)
    assert len(found) == 1 and found["recall isolated set"].tolist()[0]
    assert markdown(rows).count("\n") == 2 + len(rows)


def test_a_cell_may_judge_detectors_too(tmp_path: Path) -> None:
    block = GRID[: GRID.index("[[cells]]", 5)].replace('"none", "e2abl"', '"none"')
    plain = read_grid(grid(tmp_path, block))[0]
    detecting = read_grid(grid(tmp_path, block + 'detectors = ["loss", "loss_drop"]'))[0]
    assert plain.name() != detecting.name() and "detectors" not in plain.resolved()
    assert set(detecting.resolved()["detectors"]) == {"loss", "loss_drop"}  # with their settings: part of the hash
    fast = Cell(**{**vars(detecting), "defense_options": FAST["none"]})
    found = run_cell(fast, folder=tmp_path, device="cpu")["measures"]["detectors"]
    assert found["loss"]["steps"] == 0 < found["loss_drop"]["steps"]
    assert found["loss"]["precision_at"]["0.1"]["n"] == 12 and 0 <= found["loss"]["auroc"]["value"] <= 1
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        read_grid(grid(tmp_path, block + 'detectors = ["entropi"]'))


def record(defense: str, seed: int, rate: float) -> dict[str, Any]:
    cell = {"data": "d", "train_size": None, "model": "m", "attack": "badnets", "attack_options": {}, "seed": seed}
    measures = {"clean_accuracy": {"value": 0.5 + seed / 10}, "attack_success_rate": {"value": rate}}
    return {"cell": {**cell, "defense": defense, "defense_changes": {}}, "measures": measures, "cost": {"seconds": 1.0}}


@pytest.mark.parametrize(("undefended", "gate"), [(0.96, "takes"), (0.94, "attack did not take")])
def test_a_row_is_worth_what_its_attack_does_without_a_defense(undefended: float, gate: str) -> None:
    rows = table([record("e2abl", 0, 0.1), record("e2abl", 1, 0.3), record("none", 0, undefended)])
    assert rows["gate"].tolist() == [gate, gate]
    assert rows["CA"].tolist() == ["55.0 ± 7.1", "50.0"] and rows["ASR"].tolist()[0] == "20.0 ± 14.1"
    assert table([record("e2abl", 0, 0.1)])["gate"].tolist() == ["no undefended cell"]
