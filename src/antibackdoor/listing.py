"""What `list` shows: the registries and the catalog as plain rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from antibackdoor.attacks import ATTACKS
from antibackdoor.data.catalog import CATALOG
from antibackdoor.defenses import DEFENSES
from antibackdoor.detectors import DETECTORS
from antibackdoor.errors import unknown
from antibackdoor.models import MODELS
from antibackdoor.options import describe
from antibackdoor.registry import Registry

if TYPE_CHECKING:
    from rich.console import Console

REGISTRIES: dict[str, Registry[Any]] = {
    "attacks": ATTACKS,
    "defenses": DEFENSES,
    "detectors": DETECTORS,
    "models": MODELS,
}
Row = dict[str, Any]


def listing(what: str | None, name: str | None) -> dict[str, list[Row]]:
    """Rows by group; with a name only that one, with its options and profiles where it has any."""
    groups = [what] if what else [*REGISTRIES, "datasets"]
    if name is None:
        return {group: _rows(group) for group in groups}
    rows = {row["name"]: row for row in _rows(groups[0])}
    if name not in rows:
        raise unknown(groups[0].removesuffix("s"), name, rows)
    row = rows[name]
    if groups[0] in {"attacks", "defenses", "detectors"}:
        make = REGISTRIES[groups[0]][name].make
        row = {**row, "options": describe(make), "profiles": list(getattr(make, "profiles", {}))}
    return {groups[0]: [row]}


def print_listing(console: Console, found: dict[str, list[Row]]) -> None:
    """Tables for people."""
    for group, rows in found.items():
        shown = [column for column in ("name", "kinds", "needs") if any(row.get(column) for row in rows)]
        table = Table(title=group, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in shown:
            table.add_column(column, no_wrap=True)
        table.add_column("description")
        for row in rows:
            paper = f"\n[dim]{escape(row['paper'])}[/]" if row.get("paper") else ""
            table.add_row(*(escape(_text(row[column])) for column in shown), escape(row["description"]) + paper)
        console.print(table)
        console.print()
        if len(rows) == 1:
            _print_details(console, rows[0])


def _print_details(console: Console, row: Row) -> None:
    for key in ("source", "terms", "profiles"):
        if row.get(key):
            console.print(f"{key}: {escape(_text(row[key]))}", soft_wrap=True)
    if row.get("options"):
        table = Table(box=None, pad_edge=False)
        for column in ("--set", "type", "default", "meaning"):
            table.add_column(column, no_wrap=column == "--set")
        for option in row["options"]:
            table.add_row(*(escape(option[key]) for key in ("name", "type", "default", "help")))
        console.print(table)


def _rows(group: str) -> list[Row]:
    if group == "datasets":
        return [
            {
                "name": entry.name,
                "kinds": [entry.kind],
                "description": entry.description,
                "source": entry.source,
                "terms": entry.terms,
                "embedded": entry.embedded,
            }
            for entry in CATALOG.values()
        ]
    return [
        {
            "name": entry.name,
            "kinds": list(entry.kinds),
            "needs": sorted(getattr(entry.make, "needs", ())),
            "description": entry.description,
            "paper": entry.paper,
        }
        for entry in REGISTRIES[group]
    ]


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
