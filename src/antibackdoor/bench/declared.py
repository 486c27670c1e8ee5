"""Tables and figures that a grid file declares: a grid's cells, what the ledger has of them, and what was published.

A `[[table]]` of a grid file:

- `id`, `title`: for links and headings; `note`: text below.
- `rows`, `columns`: axes ("data", "model", "attack", "rate", "defense"); a place for every pair that the grid has.
- `measures`: names of `MEASURES`, or tables with `name`, `path` (into the record), `percent` (true), `metric` and
  `published` (the printed table's metric and parts of its setting).
- `printed`: files of published figures, beside the grid file. `where`: takes part of the grid only; ""
  stands for places that lack an axis.
- `compare`: { AXIS = LABEL, as = "difference" or "ratio" }: everything but that label is shown relative to it.

A `[[figure]]`: `id`, `title`, `printed` (what the paper showed, in words), `panels` (like measures; a path with `*`
gives a curve over epochs, `stage` takes one training stage), `series` (axes that tell lines apart), `x` (its label),
`where`. Without `*`, x is the entry's own `x`.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from antibackdoor.bench.grid import NEEDS_GPU, Grid, Place
from antibackdoor.bench.ledger import Ledger, Record, checked, read_ledger
from antibackdoor.bench.tables import Format, detection_table, gate, render, table, undefended_as
from antibackdoor.errors import InputError, unknown

MEASURES: dict[str, dict[str, Any]] = {
    "ASR": {"path": "measures.attack_success_rate"},
    "CA": {"path": "measures.clean_accuracy"},
    "excess ASR": {"path": "measures.excess_attack_success_rate"},
    "RA": {"path": "measures.recovery_accuracy"},
    "seconds": {"path": "cost.seconds", "percent": False},
    "parameters": {"path": "cost.parameters", "percent": False},
}
NOT_RUN = "not run"
CSV_NAMES = {"data": "dataset", "model": "model", "attack": "attack", "defense": "defense"}


@dataclass(frozen=True)
class Measure:
    """One number of a record. published: parts of the printed `setting` that belong to it."""

    name: str
    path: str
    metric: str
    percent: bool = True
    published: frozenset[str] = frozenset()
    stage: str | None = None


@dataclass
class Figure:
    """One place of a table: `values` by seed out of `wanted` seeds, in the measure's unit, and what was printed."""

    row: tuple[Any, ...]
    column: tuple[Any, ...]
    measure: str
    attack: str
    wanted: int
    values: dict[int, float] = field(default_factory=dict)
    published: float | None = None
    status: str = ""
    gate: str = ""

    @property
    def mean(self) -> float | None:
        """Over the seeds there are."""
        return statistics.mean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds, of two at least."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self) -> str:
        """`mean ± sd ×n [published]`, or why there is none."""
        return self.own() + ("" if self.published is None else f" [{self.published:g}]")

    def own(self) -> str:
        """Without what was published."""
        if self.mean is None:
            return self.status
        spread = f" ± {number(self.deviation)}" if self.deviation is not None else ""
        return f"{number(self.mean)}{spread} ×{len(self.values)}"


def number(value: float) -> str:
    """One decimal; large counts as they are."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


class Results:
    """A ledger as tables need it: records by name, and the undefended ones by what they attack."""

    def __init__(self, folder: Path):
        self.ledger, self._undefended = Ledger(folder), dict[str, list[Record]]()
        self.records = checked(read_ledger(folder))
        for record in self.records.values():
            if record["cell"]["defense"] == "none" and not record["cell"].get("trace"):
                self._undefended.setdefault(_attacked(record["cell"]), []).append(record)

    def of(self, place: Place) -> Record | None:
        """The record of a place's cell."""
        name = _name(place)
        return None if name is None else self.records.get(name)

    def gate(self, place: Place) -> str:
        """Whether the attack of this place's cell takes without a defense, over all seeds there are."""
        return gate([], place.cell.attack) if _name(place) is None else self.gate_of(place.cell.resolved())

    def gate_of(self, cell: Record) -> str:
        """The same of a record's cell."""
        return gate(undefended_as(cell, self._undefended.get(_attacked(cell), [])), cell["attack"])

    def missing(self, place: Place, grid: Grid) -> str:
        """Why there is no record of a place."""
        if place.excluded:
            return place.excluded
        name = _name(place)
        if name is not None and self.ledger.error(name) is not None:
            return "failed"
        return NEEDS_GPU if grid.needs_gpu else NOT_RUN


def _name(place: Place) -> str | None:
    """The name of a place's cell; None for a method or setting that this version does not have: it was never run."""
    try:
        return place.cell.name()
    except InputError:
        return None


def _attacked(cell: Mapping[str, Any]) -> str:
    names = ("data", "train_size", "attack", "attack_options", "model", "epochs", "batch_size")
    return str([cell.get(name) for name in names])


def figures_of(grid: Grid, spec: Mapping[str, Any], results: Results) -> list[Figure]:
    """All places of a declared table, in the order of the grid."""
    rows, columns = list(spec["rows"]), list(spec.get("columns", []))
    measures = [_measure(entry) for entry in spec["measures"]]
    compare = dict(spec.get("compare", {}))
    kind = compare.pop("as", "difference")
    places = [place for place in grid.places if _inside(place, spec.get("where", {}))]
    groups: dict[tuple[tuple[Any, ...], tuple[Any, ...]], list[Place]] = {}
    for place in places:
        key = (tuple(place.axes.get(axis, "") for axis in rows), tuple(place.axes.get(axis, "") for axis in columns))
        groups.setdefault(key, []).append(place)
    figures = []
    for key, members in groups.items():
        seeds = [place.cell.seed for place in members]
        if len(set(seeds)) != len(seeds):
            raise InputError(
                f"{grid.path}, table {spec.get('id')}: its rows and columns do not tell cells of {key} apart."
            )
        base = _base(members, places, compare)
        figures += [_figure(grid, spec, measure, members, base, kind, results, key) for measure in measures]
    return figures


def _figure(
    grid: Grid,
    spec: Mapping[str, Any],
    measure: Measure,
    members: list[Place],
    base: dict[int, Place] | None,
    kind: str,
    results: Results,
    key: tuple[tuple[Any, ...], tuple[Any, ...]],
) -> Figure:
    first = members[0]
    wanted = sum(not place.excluded for place in members)
    figure = Figure(*key, measure.name, first.cell.attack, wanted, gate=results.gate(first))
    for place in members:
        value = _value(results.of(place), measure)
        if base is not None and value is not None:
            other = _value(results.of(base[place.cell.seed]), measure) if place.cell.seed in base else None
            if other is None or (kind == "ratio" and other == 0):
                figure.status = "nothing to compare with"
                continue
            value = value - other if kind == "difference" else value / other
        if value is not None:
            figure.values[place.cell.seed] = value
    if not figure.values and not figure.status:
        done = [results.of(place) for place in members]
        figure.status = "not measured" if any(done) else results.missing(first, grid)
    metric = f"delta_{measure.metric}" if base is not None and kind == "difference" else measure.metric
    figure.published = _printed(grid, spec, first, measure, metric)
    return figure


def _base(members: list[Place], places: list[Place], compare: Mapping[str, Any]) -> dict[int, Place] | None:
    """The places by seed that these are compared with; None where they are shown as they are."""
    if not compare or all(members[0].axes.get(axis) == label for axis, label in compare.items()):
        return None
    wanted = {**members[0].axes, **compare}
    return {
        place.cell.seed: place
        for place in places
        if all(place.axes.get(axis) == label for axis, label in wanted.items() if axis != "seed")
    }


def _measure(entry: Any) -> Measure:
    if isinstance(entry, str):
        if entry not in MEASURES:
            raise unknown("measure", entry, MEASURES)
        entry = {"name": entry, **MEASURES[entry]}
    printed = entry.get("published", [])
    printed = [printed] if isinstance(printed, str) else printed
    return Measure(
        entry["name"],
        entry["path"],
        entry.get("metric", entry["name"]),
        entry.get("percent", True),
        frozenset(printed),
        entry.get("stage"),
    )


def _value(record: Record | None, measure: Measure) -> float | None:
    found: Any = record
    for part in measure.path.split("."):
        if isinstance(found, list) and part.lstrip("-").isdigit():
            index = int(part)
            found = found[index] if -len(found) <= index < len(found) else None
        else:
            found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, dict):
        found = found.get("value")
    return None if found is None else float(found) * (100 if measure.percent else 1)


def _inside(place: Place, where: Mapping[str, Any]) -> bool:
    return all(place.axes.get(axis, "") in (ok if isinstance(ok, list) else [ok]) for axis, ok in where.items())


@cache
def printed_rows(path: Path) -> list[dict[str, str]]:
    """A file of published figures, one number a row."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"cannot read the published figures in {path}: {error.strerror}.") from None


def _printed(grid: Grid, spec: Mapping[str, Any], place: Place, measure: Measure, metric: str) -> float | None:
    """The figure that the paper prints for this place; None where it prints none."""
    axes = {*spec["rows"], *spec.get("columns", [])}
    cell = place.cell
    wanted = {"dataset": cell.data, "attack": cell.attack, "defense": cell.defense.partition(":")[0], "metric": metric}
    if "model" in axes:
        wanted["model"] = cell.model
    settings = set(measure.published)
    for text in place.published:
        key, _, value = text.partition("=")
        if key in CSV_NAMES.values():
            wanted[key] = value
        else:
            settings.add(text)
    if "rate" in axes:
        settings.add(f"poison_rate={100 * place.axes['rate']:g}%")
    found = {
        row["value"]
        for name in spec.get("printed", [])
        for row in printed_rows(grid.path.parent / name)
        if all(row[key] == value for key, value in wanted.items()) and settings <= set(row["setting"].split(";"))
    }
    if len(found) > 1:
        raise InputError(f"{grid.path}, table {spec.get('id')}: {sorted(found)} are all printed for {place.axes}.")
    return float(value) if (value := next(iter(found), "")) else None


def wide(spec: Mapping[str, Any], figures: list[Figure]) -> pd.DataFrame:
    """One row a row of the table; a column for every column and measure, and whether the attack takes undefended."""
    columns = dict.fromkeys((figure.column, figure.measure) for figure in figures)
    headings = {key: " ".join([*map(str, key[0]), key[1]]) for key in columns}
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    gates: dict[tuple[Any, ...], dict[str, dict[str, None]]] = {}
    for figure in figures:
        row = rows.setdefault(figure.row, {**dict(zip(spec["rows"], map(str, figure.row), strict=True)),
                                           **dict.fromkeys(headings.values(), "")})  # fmt: skip
        short, _, reason = figure.text().partition("excluded: ")
        row[headings[figure.column, figure.measure]] = "excluded" if reason else short
        text = f"excluded: {reason}" if reason else figure.gate
        gates.setdefault(figure.row, {}).setdefault(text, {})[" ".join(map(str, figure.column))] = None
    for key, row in rows.items():
        told = {text: ", ".join(where) for text, where in gates[key].items() if text}
        # With the reasons for what is left out; and, where columns differ in it, with their names.
        row["undefended"] = "; ".join(told if len(told) < 2 else [f"{text} ({where})" for text, where in told.items()])
    return pd.DataFrame(list(rows.values()))


def tidy(spec: Mapping[str, Any], figures: list[Figure]) -> pd.DataFrame:
    """One row a number: axes, measure, mean, sd, n, published, difference, status."""
    names = [*spec["rows"], *spec.get("columns", [])]
    return pd.DataFrame(
        [
            {
                **dict(zip(names, (*figure.row, *figure.column), strict=True)),
                "measure": figure.measure,
                "mean": figure.mean,
                "sd": figure.deviation,
                "n": len(figure.values),
                "wanted": figure.wanted,
                "published": figure.published,
                "difference": None
                if figure.mean is None or figure.published is None
                else round(figure.mean - figure.published, 6),
                "status": figure.status or "done",
                "undefended": figure.gate,
            }
            for figure in figures
        ]
    )


def tables_text(grid: Grid | None, folder: Path, form: Format) -> str:
    """The tables that a grid declares, with titles but for CSV; those of the whole ledger where it declares none."""
    if grid is None or not grid.tables:
        records = list(checked(read_ledger(folder)).values())
        return "\n".join(render(frame, form) for frame in (table(records), detection_table(records)) if len(frame))
    results, parts = Results(folder), []
    for spec in grid.tables:
        figures = figures_of(grid, spec, results)
        text = render(tidy(spec, figures) if form == "csv" else wide(spec, figures), form)
        title = {"markdown": f"**{spec['title']}**\n\n", "latex": f"% {spec['title']}\n", "csv": ""}[form]
        parts.append(title + text)
    return "\n".join(parts)


Line = tuple[str, list[tuple[float, float]]]


def lines_of(grid: Grid, spec: Mapping[str, Any], results: Results) -> dict[str, list[Line]]:
    """The lines of a declared figure by panel: (name, points), each a mean over the seeds there are."""
    panels: dict[str, list[Line]] = {}
    places = [place for place in grid.places if _inside(place, spec.get("where", {})) and not place.excluded]
    for measure in map(_measure, spec["panels"]):
        points: dict[str, dict[float, list[float]]] = {}
        for place in places:
            name = ", ".join(str(place.axes.get(axis, "")) for axis in spec["series"])
            for x, y in _points(results.of(place), place, measure):
                points.setdefault(name, {}).setdefault(x, []).append(y)
        panels[measure.name] = [
            (name, [(x, statistics.mean(ys)) for x, ys in sorted(of.items())]) for name, of in points.items()
        ]
    return panels


def _points(record: Record | None, place: Place, measure: Measure) -> Iterable[tuple[float, float]]:
    if record is None:
        return
    before, star, after = measure.path.partition(".*.")
    if not star:
        value = _value(record, measure)
        if value is not None and place.x is not None:
            yield place.x, value
        return
    rows: Any = record
    for part in before.split("."):
        rows = rows.get(part, [])
    rows = [row for row in rows if measure.stage is None or row.get("stage") == measure.stage]
    inner = Measure(measure.name, after, measure.metric, measure.percent)
    for number, row in enumerate(rows, 1):
        value = _value(row, inner)
        if value is not None:
            yield row.get("epoch", number) if measure.stage or before != "history" else number, value
