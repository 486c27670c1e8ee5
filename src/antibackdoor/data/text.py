"""Text files that people and loggers write: what parts their columns, what names them, and what stands for a number."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from antibackdoor.limits import MAX_LINE, MAX_TEXT, refuse_special

NO_CHANNEL = re.compile(r"|index|time|timestamp|datetime|date|unnamed: \d+", re.IGNORECASE)
"""Names of columns that say when, or in which row, and not what; the last is how pandas reads its own index."""
NO_VALUE = {"", "na", "n/a", "null", "?"}
"""What stands where a value is missing, beside NaN."""

Rows = Iterator[tuple[int, list[str]]]


@contextmanager
def opened(path: Path) -> Iterator[tuple[bool, Rows]]:
    """Whether a comma is a decimal point in this file, and its rows that hold anything, each with its line.

    Columns are separated by tabs, semicolons, commas or blanks: the first of these that the first row holds. Where
    semicolons part them, a comma is a decimal point. The rows raise ValueError for what is no text, and for a line that
    is too long, and csv.Error.
    """
    refuse_special(path, MAX_TEXT)
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = next((line for line in _lines(file) if line.strip()), "")
        file.seek(0)
        mark = next((mark for mark in "\t;," if mark in first), None)
        yield mark == ";", _rows(file, mark)


def header_of(path: Path) -> list[str]:
    """What stands in the first row, in lower case; nothing if it cannot be read."""
    try:
        with opened(path) as (_, rows):
            return [name.strip().casefold() for name in next(rows, (1, []))[1]]
    except (OSError, ValueError, csv.Error):
        return []


def number(text: str, comma: bool = False) -> float:
    """NaN where a value is missing; ValueError for what is no number. comma: it is a decimal point."""
    given = text.strip()
    try:
        return float("nan" if given.casefold() in NO_VALUE else given.replace(",", ".") if comma else given)
    except ValueError:
        raise ValueError(f"{given[:50]!r} is no number") from None


def numbers(cells: Sequence[str], comma: bool = False) -> list[float]:
    """As `number`, of many."""
    try:
        return list(map(float, cells))
    except ValueError:
        return [number(cell, comma) for cell in cells]


def _rows(file: TextIO, mark: str | None) -> Rows:
    if mark is None:
        yield from ((place, row) for place, line in enumerate(_lines(file), 1) if (row := line.split()))
    else:
        reader = csv.reader(_lines(file), delimiter=mark)
        yield from ((reader.line_num, row) for row in reader if any(row))


def _lines(file: TextIO) -> Iterator[str]:
    try:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"a line has more than {MAX_LINE:,} characters")
            yield line
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text; save it as UTF-8 (spreadsheets call it CSV UTF-8)") from None
