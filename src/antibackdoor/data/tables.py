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
from antibackdoor.data.labels import TEST_NAMES
from antibackdoor.data.series import Missing, from_cases
from antibackdoor.data.text import NO_CHANNEL, numbers, rows_of
from antibackdoor.errors import InputError, LeftOut, visible
from antibackdoor.limits import MAX_CHANNELS, MAX_STEPS, MAX_TEXT, ROW_COST, refuse_beyond_memory, refuse_special

NAMED = ("id", "label", "split")
"""Columns that hold no values: their names, without regard to case."""
UNKNOWN = "?"
"""The label of all series of a table without labels."""
LOOK = 4096
"""Rows after which what they take of the memory is looked at."""


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
        values = {k: names[k] for k in range(len(names)) if low[k] not in NAMED and low[k] not in NO_CHANNEL}
        return cls(len(names), at, values, tuple(name for name in names if name and name.casefold() in NO_CHANNEL))

    def repeat(self, found: dict[str, _Series]) -> bool:
        """Whether a series has several rows."""
        return any(len(one.values) > len(self.values) for one in found.values())

    def add(self, found: dict[str, _Series], row: Sequence[str], unnamed: str, comma: bool) -> None:
        """One row, to the series of its id; ValueError that says what is wrong with it."""
        if len(row) != self.width:
            raise ValueError(f"it has {len(row):,} cells, the first line {self.width:,}")
        told = {name: row[k].strip() for name, k in self.at.items()}
        name, label, split = told.get("id", unnamed), told.get("label", UNKNOWN), told.get("split") or "train"
        if not name or not label:
            raise ValueError(f"it has no {'label' if name else 'id'}")
        if split != "train" and split not in TEST_NAMES:
            raise ValueError(f"it has the split {split!r}; known: train, {', '.join(TEST_NAMES)}")
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
    """Whether the first line of a CSV file has a column `label` or `id`."""
    refuse_special(path, MAX_TEXT)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            _, header = next(rows_of(file)[1], (1, []))
            return not {"id", "label"}.isdisjoint(_Columns.of(header).at)
    except (OSError, ValueError, csv.Error):
        return False


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
    if not train:
        raise InputError(f"{path} holds no training series.")
    parts = [part for part in (train, held) if part]
    channels = 1
    if columns.repeat(train) or theirs.repeat(held):
        channels = len(columns.values)
        if list(theirs.values.values()) != list(columns.values.values()):
            raise InputError(f"{test} has other channels than {path}; both need the same, in the same order.")
    if channels > MAX_CHANNELS:
        raise InputError(f"{path} has {channels:,} channels, more than {MAX_CHANNELS:,}.")
    with np.errstate(over="ignore"):  # infinite values are refused with all that is refused in series
        cases = [[np.array(one.values).reshape(-1, channels).T for one in part.values()] for part in parts]
    labels = [[one.label for one in part.values()] for part in parts]
    tested = (cases[1], labels[1]) if held else ()
    return from_cases(
        cases[0], labels[0], *tested, missing=missing, where=str(path), ids=[list(part) for part in parts]
    )


def _read(path: Path, unlabeled: bool) -> tuple[_Columns, dict[str, _Series]]:
    """The columns of a file, and its series by id, or by the number of the row."""
    refuse_special(path, MAX_TEXT)
    found, taken = dict[str, _Series](), 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            comma, rows = rows_of(file)
            columns = _Columns.of(next(rows, (1, []))[1])
            if "label" not in columns.at and not unlabeled:
                raise ValueError(
                    "its first line needs the column label, beside path (of files) or beside values (of series)"
                )
            if not 1 <= len(columns.values) <= MAX_STEPS:
                raise ValueError(f"it has {len(columns.values):,} columns of values; 1 to {MAX_STEPS:,} can be read")
            for count, (place, row) in enumerate(rows):
                try:
                    columns.add(found, row, str(count), comma)
                except ValueError as error:
                    raise ValueError(f"line {place}: {error}") from None
                taken += 4 * len(columns.values)
                if count % LOOK == 0:
                    refuse_beyond_memory(path, taken + ROW_COST * len(found))
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
