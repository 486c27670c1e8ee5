"""Numbers in text files that people and loggers write: what parts their columns, and what stands for a number."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import TextIO

from antibackdoor.limits import MAX_LINE

NO_CHANNEL = {"", "index", "time", "timestamp", "datetime", "date"}
"""Columns that say when, and not what: their names, without regard to case."""
NO_VALUE = {"", "na", "n/a", "null", "?"}
"""What stands where a value is missing, beside NaN."""


def rows_of(file: TextIO) -> tuple[bool, Iterator[tuple[int, list[str]]]]:
    """Whether a comma is a decimal point, and the rows that hold anything, with their places, counted from 1.

    Columns are separated by tabs, semicolons, commas or blanks: the first of these that the first line holds. Where
    semicolons part them, a comma is a decimal point. Raises ValueError for a line that is too long.
    """
    first = next((line for line in _lines(file) if line.strip()), "")
    file.seek(0)
    mark = next((mark for mark in "\t;," if mark in first), None)
    lines = _lines(file)
    rows = csv.reader(lines, delimiter=mark) if mark else (line.split() for line in lines)
    return mark == ";", ((place, row) for place, row in enumerate(rows, 1) if any(row))


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


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"a line has more than {MAX_LINE:,} characters")
        yield line
