"""A grid: a TOML file of blocks, each the cross product of its lists, turned into cells and their places in tables."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from antibackdoor.bench.cell import Cell
from antibackdoor.errors import InputError, unknown
from antibackdoor.limits import read_toml
from antibackdoor.options import build

LISTS = {
    "data": "data",
    "models": "model",
    "attacks": "attack",
    "rates": "rate",
    "defenses": "defense",
    "seeds": "seed",
}
"""Keys of a block that hold lists, and the axis that each fills."""
SINGLE = (
    "train_size",
    "epochs",
    "batch_size",
    "clean_share",
    "trace",
    "attack_options",
    "defense_options",
    "detectors",
)
"""Keys of a block that hold one value for all its cells."""
OPTIONS = ("attack_options", "defense_options")
"""Those of them that are tables."""
ENTRY = ("name", "label", "options", "published", "x")
"""Keys of an entry of a list that is more than a name."""
MOST_CELLS = 100_000
"""Of one block: a few lists too many multiply beyond what any machine could run."""
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Place:
    """One place of a grid: a cell, and what tables and figures call it.

    axes: label of each axis ("data", "model", "attack", "rate", "defense", "seed"). published: what the entries say
    about the printed table's `setting`, as "key=value". x: the place on a figure's axis. excluded: why it is not run.
    """

    cell: Cell
    axes: dict[str, Any]
    published: frozenset[str] = frozenset()
    x: float | None = None
    excluded: str = ""


@dataclass(frozen=True)
class Grid:
    """What a grid file says under one profile. `tables` and `figures` are its declarations, as they stand there."""

    path: Path
    profile: str
    places: list[Place]
    needs_gpu: bool = False
    description: str = ""
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)

    def cells(self, only: str = "") -> list[Cell]:
        """The cells to run, in order, without doubles; those in whose name the regular expression `only` is found.

        Raises InputError for methods and options that do not exist, and where no cell has such a name.
        """
        try:
            wanted = re.compile(only)
        except re.error as error:
            raise InputError(f"--only takes a regular expression, and {only!r} is none: {error}.") from None
        cells = {place.cell.name(): place.cell for place in self.places if not place.excluded}
        chosen = [cell for name, cell in cells.items() if wanted.search(name)]
        if only and not chosen:
            raise InputError(f"no cell of {self.path} has {only!r} in its name; --plan lists them.")
        return chosen

    def excluded(self) -> dict[str, str]:
        """Names of the cells that are left out, and why."""
        return {place.cell.name(): place.excluded for place in self.places if place.excluded}


def read_grid(path: Path, profile: str | None = None) -> Grid:
    """Read a grid file under one of its profiles (the first, where none is named).

    `[[cells]]`: the lists `data`, `models`, `attacks`, `rates`, `defenses`, `seeds`; an entry is a name or a table with
    `name`, `options`, `label`, `published`, `x`. For all its cells `train_size`, `epochs`, `batch_size`,
    `clean_share`, `trace`, `attack_options`, `defense_options`, `detectors`. `[cells.PROFILE]` overrides the block's
    keys in that profile.
    `[profile.NAME]`: defaults of every block, `description`, `needs_gpu`.
    `[[override]]`: `where`, `set`, and `profile` where it holds in one only. `[[exclude]]`: `where`, `reason`.
    `[[table]]`, `[[figure]]`: see `antibackdoor.bench.declared`. Raises InputError for anything else.
    """
    try:
        grid = read_toml(path, f"{path} is not a grid")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except OSError as error:
        raise InputError(f"{path} is not a grid: {error}.") from None
    _known(grid, ("cells", "profile", "override", "exclude", "table", "figure"), str(path))
    profiles, blocks = grid.get("profile", {}), grid.get("cells")
    if not isinstance(blocks, list) or not isinstance(profiles, dict):
        raise InputError(f"{path} is not a grid: it must consist of [[cells]] blocks.")
    for key in ("override", "exclude", "table", "figure"):
        if not isinstance(grid.get(key, []), list) or not all(isinstance(entry, dict) for entry in grid.get(key, [])):
            raise InputError(f"{path}: {key} must be a table of keys and values, written [[{key}]].")
    if profile is not None and profile not in profiles:
        raise unknown(f"profile of {path}", profile, profiles)
    profile = profile or next(iter(profiles), "")
    chosen = profiles.get(profile, {})
    _known(chosen, (*LISTS, *SINGLE, "description", "needs_gpu"), f"{path}, profile {profile}")
    defaults = {key: value for key, value in chosen.items() if key not in {"description", "needs_gpu"}}
    rules = {
        kind: [rule for rule in grid.get(kind, []) if _rule(rule, second, f"{path}, {kind}", profiles, profile)]
        for kind, second in (("override", "set"), ("exclude", "reason"))
    }
    places = []
    for number, block in enumerate(blocks, 1):
        where = f"{path}, block {number}"
        _known(block, (*LISTS, *SINGLE, *profiles), where)
        special = block.get(profile, {})
        _known(special, (*LISTS, *SINGLE), f"{where}, profile {profile}")
        own = {key: value for key, value in block.items() if key not in profiles}
        places += _block({**defaults, **own, **special}, rules, where)
    needs_gpu = bool(chosen.get("needs_gpu", False))
    description = str(chosen.get("description", ""))
    return Grid(path, profile, places, needs_gpu, description, grid.get("table", []), grid.get("figure", []))


def _known(table: Any, keys: Iterable[str], where: str) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table of keys and values.")
    for key in table:
        if key not in keys:
            raise unknown(f"key of {where}", key, keys)


def _tables(table: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Whether the values of these keys, where they are there, are tables themselves."""
    for key in keys:
        if not isinstance(table.get(key, {}), dict):
            raise InputError(f"{where}: {key} must be a table of keys and values.")


def _rule(rule: Any, second: str, where: str, profiles: Mapping[str, Any], profile: str) -> bool:
    """Whether an override or exclusion is well-formed and holds in this profile."""
    extra = ("needs_gpu",) if second == "reason" else ()
    _known(rule, ("where", second, "profile", *extra), where)
    _known(rule.get("where"), LISTS.values(), f"{where}, where")
    if second not in rule and not rule.get("needs_gpu"):
        raise InputError(f"{where}: every entry needs `where` and `{second}`.")
    if second == "set":
        _known(rule["set"], ("model", *SINGLE), f"{where}, set")
        _tables(rule["set"], OPTIONS, f"{where}, set")
    if rule.get("profile", profile) != profile and rule["profile"] not in profiles:
        raise unknown(f"profile of {where}", rule["profile"], profiles)
    return bool(rule.get("profile", profile) == profile)


def _block(block: dict[str, Any], rules: dict[str, list[dict[str, Any]]], where: str) -> list[Place]:
    lists: dict[str, list[dict[str, Any]]] = {}
    for key, axis in LISTS.items():
        if key not in block:
            continue
        if not isinstance(block[key], list) or not block[key]:
            raise InputError(f"{where}: {key} must be a list with at least one entry.")
        lists[axis] = [_entry(value, f"{where}, {key}") for value in block[key]]
    if math.prod(map(len, lists.values())) > MOST_CELLS:
        raise InputError(f"{where} makes more than {MOST_CELLS:,} cells; cut it into several grids.")
    _tables(block, OPTIONS, where)
    shared = {key: value for key, value in block.items() if key in SINGLE}
    return [
        _place(shared, dict(zip(lists, chosen, strict=True)), rules, where)
        for chosen in itertools.product(*lists.values())
    ]


def _entry(value: Any, where: str) -> dict[str, Any]:
    """An entry of a list with all its keys: a name alone is its own label."""
    entry = value if isinstance(value, dict) else {"name": value}
    _known(entry, ENTRY, where)
    if not isinstance(entry.get("name"), str | int | float):
        raise InputError(f"{where}: an entry needs a `name`.")
    _tables(entry, ("options",), where)
    printed = entry.get("published", [])
    printed = [printed] if isinstance(printed, str) else printed
    if not isinstance(printed, list) or not all(isinstance(setting, str) for setting in printed):
        raise InputError(f"{where}: `published` must be text, or a list of texts.")
    return {"label": entry["name"], "options": {}, "x": None, **entry, "published": printed}


def _place(
    shared: dict[str, Any],
    chosen: dict[str, dict[str, Any]],
    rules: dict[str, list[dict[str, Any]]],
    where: str,
) -> Place:
    axes = {axis: entry["label"] for axis, entry in chosen.items()}
    names = {axis: entry["name"] for axis, entry in chosen.items()}
    settings = {**shared, **{axis: name for axis, name in names.items() if axis != "rate"}}
    for axis in ("attack", "defense"):
        own = chosen.get(axis, {}).get("options", {})
        settings[f"{axis}_options"] = {**shared.get(f"{axis}_options", {}), **own}
    if "rate" in names:
        settings["attack_options"]["rate"] = names["rate"]
    for rule in rules["override"]:
        if _matches(rule["where"], axes, names):
            for key, value in rule["set"].items():
                settings[key] = {**settings.get(key, {}), **value} if key in OPTIONS else value
    excluded = ""
    for rule in rules["exclude"]:
        if _matches(rule["where"], axes, names):
            excluded = NEEDS_GPU if rule.get("needs_gpu") else f"excluded: {rule['reason']}"
            break
    cell = build(Cell, settings, where)
    printed = frozenset(setting for entry in chosen.values() for setting in entry["published"])
    places = [entry["x"] for entry in chosen.values() if entry["x"] is not None]
    axes = {"data": cell.data, "model": cell.model, "attack": cell.attack, "defense": cell.defense, "seed": cell.seed,
            **axes}  # fmt: skip
    return Place(cell, axes, printed, places[0] if places else None, excluded)


def _matches(where: Mapping[str, Any], axes: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether every condition holds of the entry's name or its label."""
    for axis, wanted in where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if names.get(axis) not in allowed and axes.get(axis) not in allowed:
            return False
    return True
