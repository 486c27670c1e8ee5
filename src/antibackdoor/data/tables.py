"""A table of series (.csv with a column `label`) -> Data: a row each, or rows of the same `id` its time steps."""

from __future__ import annotations

import csv
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from antibackdoor.data.core import Splits
from antibackdoor.data.labels import UNKNOWN, wrong_split
from antibackdoor.data.series import Missing, class_names, from_cases
from antibackdoor.data.text import NO_CHANNEL, header_of, numbers, opened
from antibackdoor.errors import InputError, LeftOut, visible
from antibackdoor.limits import MAX_CHANNELS, MAX_STEPS, ROW_COST, refuse_beyond_memory

NAMED = ("id", "label", "split")
"""Columns that hold no values: their names, without regard to case."""
LOOK = 2**26
"""Bytes after which what they take of the memory is looked at."""


@dataclass(frozen=True)
class _Series:
    """Those of one id: its label, its part of the set, and the values of its rows, one after the other."""

    label: str
    split: str
    values: array[float] = field(default_factory=lambda: array("f"))


@dataclass(frozen=True)
class _Columns:
    """Where things stand in a row. at: of those in `NAMED`; values: of the others, by name; left_out: no channels."""

    width: int
    at: dict[str, int]
    values: dict[int, str]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, header: Sequence[str]) -> _Columns:
        """From the first line; ValueError where a name stands twice."""
        names = [name.strip() for name in header]
        low = [name.casefold() for name in names]
        at = {name: low.index(name) for name in NAMED if name in low}
        twice = next((name for name in at if low.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"it has the column {twice} twice; one is needed")
        values = {k: names[k] for k in range(len(names)) if low[k] not in NAMED and not NO_CHANNEL.fullmatch(low[k])}
        return cls(len(names), at, values, tuple(name for name in names if name and NO_CHANNEL.fullmatch(name)))

    def channels(self, found: dict[str, _Series], path: Path) -> int:
        """One where each row is a series, else the columns. InputError where only the fewer ids stand in several rows.

        One id that stands twice by mistake would else make channels of what are time steps.
        """
        rows = {name: len(one.values) // len(self.values) for name, one in found.items()}
        several = [name for name in rows if rows[name] > 1]
        if several and 2 * len(several) <= len(rows):
            raise InputError(
                f"{path}: the id {several[0]!r} stands in {rows[several[0]]} rows, most others in one; where each "
                "row is a series it needs an id of its own."
            )
        if several and len(self.values) > MAX_CHANNELS:
            raise InputError(f"{path} has {len(self.values):,} channels, more than {MAX_CHANNELS:,}.")
        return len(self.values) if several else 1

    def add(self, found: dict[str, _Series], row: Sequence[str], unnamed: str, comma: bool, unlabeled: bool) -> None:
        """One row, to the series of its id; ValueError that says what is wrong with it."""
        if len(row) != self.width:
            raise ValueError(f"it has {len(row):,} cells, the first line {self.width:,}")
        told = {name: row[k].strip() for name, k in self.at.items()}
        name, label, split = told.get("id", unnamed), told.get("label", UNKNOWN), told.get("split") or "train"
        label = label or UNKNOWN * unlabeled
        if not name or not label:
            raise ValueError(f"it has no {'label' if name else 'id'}")
        if wrong := wrong_split(split):
            raise ValueError(f"it {wrong.rstrip('.')}")
        one = found.setdefault(name, _Series(label, split))
        if (one.label, one.split) != (label, split):
            raise ValueError(f"the series {name!r} has another label or split here than before")
        try:
            one.values.extend(numbers([row[k] for k in self.values], comma))
        except ValueError as error:
            raise ValueError(
                f"{error}, as all but {', '.join(NAMED)} have to be (a list of files has a column path)"
            ) from None


def is_table(path: Path) -> bool:
    """Whether the first row of a CSV file names a column `label` or `id`."""
    return not {"id", "label"}.isdisjoint(header_of(path))


def load_table(path: Path, *, test: Path | None = None, missing: Missing = "refuse", unlabeled: bool = False) -> Splits:
    """A CSV file with a column `label` and, if wanted, `id` and `split` (train, or one of `TEST_NAMES`).

    Where ids stand in several rows, these are the time steps of a series, in the order of the file, and the other
    columns are its channels. Else each row is a series of one channel, and the other columns are its time steps; of
    shorter ones the last cells are empty. Columns in `NO_CHANNEL` are left out. test: another such file, of which the
    test series count, or all if there are none. unlabeled: `label` may be missing.
    Raises InputError that names the line, and for gaps as `from_cases` does.
    """
    columns, found = _read(path, unlabeled)
    train = {name: one for name, one in found.items() if one.split == "train"}
    held = {name: one for name, one in found.items() if one.split != "train"}
    theirs = columns
    if test is not None:
        theirs, more = _read(test, unlabeled)
        held = {name: one for name, one in more.items() if one.split != "train"} or more
    elif unlabeled and not train:
        train, held = held, {}
    if not train:
        raise InputError(f"{path} holds no training series.")
    channels = columns.channels(train, path)
    if channels == 1:
        theirs.channels(held, test or path)
    ours, others = list(columns.values.values()), list(theirs.values.values())
    if ours != others and (channels > 1 or sorted(ours) == sorted(others)):
        raise InputError(f"{test} has other columns than {path}; both need the same, in the same order.")
    with np.errstate(over="ignore"):  # infinite values are refused with all that is refused in series
        cases = [[np.array(one.values).reshape(-1, channels).T for one in part.values()] for part in (train, held)]
    names = class_names([one.label for part in (train, held) for one in part.values()], path)
    more_cases = (cases[1], names[len(train) :]) if held else ()
    ids = [list(part) for part in (train, held)]
    return from_cases(cases[0], names[: len(train)], *more_cases, missing=missing, where=str(path), ids=ids)


def _read(path: Path, unlabeled: bool) -> tuple[_Columns, dict[str, _Series]]:
    """The columns of a file, and its series by id, or by the number of the row."""
    found, taken, seen = dict[str, _Series](), 0, 0
    try:
        with opened(path) as (comma, rows):
            columns = _Columns.of(next(rows, (1, []))[1])
            if "label" not in columns.at and not unlabeled:
                raise ValueError(
                    "its first line needs the column label, beside path (of files) or beside values (of series)"
                )
            if not 1 <= len(columns.values) <= MAX_STEPS:
                raise ValueError(f"it has {len(columns.values):,} columns of values; 1 to {MAX_STEPS:,} can be read")
            for count, (line, row) in enumerate(rows):
                try:
                    columns.add(found, row, str(count), comma, unlabeled)
                except ValueError as error:
                    raise ValueError(f"line {line}: {error}") from None
                taken += 4 * len(columns.values) + ROW_COST
                if taken - seen > LOOK:
                    seen = taken
                    refuse_beyond_memory(path, taken)
            refuse_beyond_memory(path, taken)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {path} as a table of series: {error}.") from None
    if columns.left_out:
        told = ", ".join(columns.left_out)
        warnings.warn(
            visible(f"{path}: columns called {told} are not read: they hold no values."), LeftOut, stacklevel=4
        )
    return columns, found
