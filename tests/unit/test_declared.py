"""Declared tables and figures, exactly; and the grids of the papers' experiments."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_bench import past

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.declared import Results, figures_of, lines_of, tables_text, tidy, wide
from antibackdoor.bench.grid import Grid, read_grid
from antibackdoor.bench.ledger import Ledger
from antibackdoor.errors import InputError
from antibackdoor.report.svg import chart

GRIDS = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.toml"))
PAPERS = [
    path
    for path in GRIDS
    if path.name.startswith(("e2abl-table", "e2abl-figure", "dlp-table", "dlp-figure")) and "gpu" not in path.stem
]
AWAITED = {
    *("trojannn", "dynamic", "label_consistent", "latent", "timetrojan_fgsm", "timetrojan_de", "tsba"),
    *("spectral_signatures", "activation_clustering"),
}
"""Names that a grid may use before the package has them; this list only ever gets shorter."""
GRID = """
[profile.cpu]
description = "small"
models = ["resnet18-w4"]
[profile.paper]
needs_gpu = true
models = ["resnet34"]
[[cells]]
data = ["digits"]
train_size = 60
epochs = 1
attacks = ["badnets", "blend", "sig"]
defenses = ["none", "e2abl",
    { name = "e2abl", label = "no control", options = { control = "nothing" }, published = "ablation=no", x = 7 }]
seeds = [0, 1]
[[exclude]]
where = { attack = "sig", defense = "no control" }
reason = "not here"
[[table]]
id = "t"
title = "A table"
rows = ["attack"]
columns = ["defense"]
measures = ["ASR"]
printed = ["printed.csv"]
where = { defense = ["e2abl", "no control"] }
compare = { defense = "e2abl", as = "difference" }
[[figure]]
id = "f"
title = "A figure"
printed = "Up."
panels = ["CA", { name = "loss", path = "history.*.loss", percent = false, stage = "main" }]
series = ["attack"]
x = "share"
where = { defense = "no control" }
"""
PRINTED = """paper,table,dataset,model,attack,defense,setting,metric,value,unit
p,1,digits,resnet34,badnets,e2abl,poison_rate=10%,ASR,1.5,%
p,1,digits,resnet34,badnets,e2abl,poison_rate=10%;ablation=no,delta_ASR,7.55,points
p,1,digits,resnet34,badnets,none,poison_rate=10%,ASR,100,%
p,1,digits,resnet34,blend,e2abl,poison_rate=10%,ASR,,%
"""
ASR = {("badnets", "none"): (0.99, 0.97), ("blend", "none"): (0.5, 0.6), ("badnets", "e2abl"): (0.02, 0.04),
       ("badnets", "no control"): (0.1, 0.2), ("blend", "e2abl"): (0.3,)}  # fmt: skip


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """A grid, and beside it a ledger with some of its cells, made up."""
    (tmp_path / "printed.csv").write_text(PRINTED, encoding="utf-8")
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    grid, ledger = read_grid(tmp_path / "grid.toml"), Ledger(tmp_path / "ledger")
    for place in grid.places:
        rates = ASR.get((place.axes["attack"], place.axes["defense"]), ())
        if place.cell.seed < len(rates):
            rate = rates[place.cell.seed]
            record = past(place.cell, 10.0)
            record["measures"] |= {"attack_success_rate": {"value": rate}, "clean_accuracy": {"value": 0.5 + rate}}
            record["history"] = [{"stage": "warm-up", "epoch": 1, "loss": 9.0}] + [
                {"stage": "main", "epoch": epoch, "loss": rate * epoch} for epoch in (1, 2)
            ]
            ledger.write(place.cell.name(), record)
    broken = next(p.cell for p in grid.places if p.axes["attack"] == "sig" and p.axes["defense"] == "e2abl")
    ledger.write_error(broken.name(), {"error": "too hot"})
    return grid


def test_a_declared_table(grid: Grid) -> None:
    (spec,), folder = grid.tables, grid.path.parent / "ledger"
    figures = figures_of(grid, spec, Results(folder))
    assert tables_text(grid, folder, "markdown") == (
        "**A table**\n\n"
        "| attack | e2abl ASR | no control ASR | undefended |\n"
        "| --- | --- | --- | --- |\n"
        "| badnets | 3.0 ± 1.4 ×2 [1.5] | 12.0 ± 5.7 ×2 [7.55] | takes |\n"
        "| blend | 30.0 ×1 | not run | attack did not take |\n"
        "| sig | failed | excluded | no undefended cell (e2abl); excluded: not here (no control) |\n"
    )
    assert tables_text(grid, folder, "csv").splitlines()[:3] == [
        "attack,defense,measure,mean,sd,n,wanted,published,difference,status,undefended",
        "badnets,e2abl,ASR,3.0,1.4142135623730951,2,2,1.5,1.5,done,takes",
        "badnets,no control,ASR,12.0,5.656854249492381,2,2,7.55,4.45,done,takes",
    ]
    counted = {(figure.row, figure.column): figure.wanted for figure in figures}
    assert counted[("sig",), ("no control",)] == 0, "what is excluded is not wanted"
    assert "3.0 $\\pm$ 1.4 $\\times$2 [1.5] & 12.0" in tables_text(grid, folder, "latex")
    assert len(wide(spec, figures)) == 3 and len(tidy(spec, figures)) == 6
    ratio = {**spec, "compare": {"defense": "none", "as": "ratio"}, "measures": ["seconds"], "where": {}}
    assert [f.text() for f in figures_of(grid, ratio, Results(folder))][:3] == ["10.0 ± 0.0 ×2", *["1.0 ± 0.0 ×2"] * 2]


def test_what_needs_a_gpu_says_so(grid: Grid) -> None:
    paper = read_grid(grid.path, "paper")
    figures = figures_of(paper, paper.tables[0], Results(grid.path.parent / "ledger"))
    assert {figure.own() for figure in figures} == {"needs a GPU", "excluded: not here"}
    assert figures[0].text() == "needs a GPU [1.5]"


def test_a_declared_figure(grid: Grid) -> None:
    lines = lines_of(grid, grid.figures[0], Results(grid.path.parent / "ledger"))
    assert lines["CA"] == [("badnets", [(7, pytest.approx(65.0))])]
    assert lines["loss"] == [("badnets", [(1, pytest.approx(0.15)), (2, pytest.approx(0.3))])]
    text = chart(lines, x_label="x < y")
    assert text.count("<g ") == 2 and "x &lt; y" in text and text == chart(lines, x_label="x < y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": ["ARS"]}, "did you mean 'ASR'"),
        ({"columns": []}, "do not tell"),
        ({"printed": ["none.csv"]}, "published figures"),
    ],
)
def test_a_wrong_declaration_is_told(grid: Grid, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        figures_of(grid, {**grid.tables[0], **change}, Results(grid.path.parent / "ledger"))


def known(cell: Cell) -> bool:
    """Whether the package has the cell's methods; what it has not must be awaited."""
    try:
        cell.name()
    except InputError as error:
        assert any(f"{name!r}" in str(error) for name in AWAITED), error
        return False
    return True


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_every_grid_names_methods_and_settings_that_exist(path: Path, profile: str) -> None:
    grid = read_grid(path, profile if path in PAPERS else None)
    assert grid.places and (path not in PAPERS or (grid.description and (grid.tables or grid.figures)))
    variants = {(p.cell.data, p.cell.model, p.cell.attack, p.cell.defense): p for p in grid.places if not p.excluded}
    assert {known(place.cell) for place in variants.values()} <= {True, False}


@pytest.mark.parametrize("path", [path for path in PAPERS if "-table" in path.name], ids=lambda path: path.stem)
def test_every_published_figure_has_its_place(path: Path, tmp_path: Path) -> None:
    """All numbers of the printed table, but for averages and what was printed for no attack, are beside ours."""
    grid = read_grid(path)
    spec = grid.tables[0]
    printed = [name for name in spec["printed"] if path.stem.replace("-", "_") in name]
    rows = (path.parent / printed[0]).read_text(encoding="utf-8").splitlines()[1:]
    wanted = [row.split(",") for row in rows]
    numbers = sorted(float(row[8]) for row in wanted if row[8] and row[4] != "average")
    figures = figures_of(grid, spec, Results(tmp_path))
    shown = sorted(figure.published for figure in figures if figure.published is not None)
    compared = spec.get("compare", {})
    if compared:  # the column that the others are compared with comes from Table I
        base = next(iter(value for key, value in compared.items() if key != "as"))
        shown = sorted(f.published for f in figures if f.published is not None and f.column != (base,))
    assert set(shown) == set(numbers) and not Counter(numbers) - Counter(shown)  # more where we have several variants
