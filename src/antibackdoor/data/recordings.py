"""Recordings, one a file (.csv, .tsv, .txt or .npy) -> Data: what loggers and sensors leave behind."""

from __future__ import annotations

import csv
import warnings
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from antibackdoor.data.core import Splits
from antibackdoor.data.file_lists import FileList
from antibackdoor.data.npy import read_array
from antibackdoor.data.series import Floats, Missing, from_cases
from antibackdoor.data.text import NO_CHANNEL, number, numbers, opened
from antibackdoor.errors import InputError, LeftOut, leave_out, visible
from antibackdoor.limits import MAX_CHANNELS, ROW_COST, refuse_beyond_memory

EXTENSIONS = (".csv", ".tsv", ".txt", ".npy")


@dataclass(frozen=True)
class Recording:
    """One file. channels: their names, or numbers; values: `(C, T)` float32, NaN where missing.

    left_out: columns that are no channels.
    """

    channels: tuple[str, ...]
    values: Floats
    left_out: tuple[str, ...] = ()


def read_recording(path: Path) -> Recording:
    """A `.npy` of `(length,)` or `(channels, length)`, or a text: a line a time step, a column a channel.

    Columns are parted as `opened` says. A first line that is not all numbers names them, and those in `NO_CHANNEL` are
    left out. One line of numbers alone is one channel. Raises ValueError, and OSError, that say what is wrong.
    """
    with np.errstate(over="ignore"):  # infinite values are refused with all that is refused in series
        if path.suffix.lower() == ".npy":
            values = read_array(path.read_bytes())
            if values.ndim not in (1, 2) or values.dtype.kind not in "fiu" or 0 in values.shape:
                raise ValueError(
                    "numbers of shape (length,) or (channels, length) are needed, "
                    f"got {values.dtype} of shape {values.shape}"
                )
            values = np.atleast_2d(values)
            _refuse_channels(len(values))
            return Recording(_numbered(len(values)), values.astype(np.float32))
        return _read_text(path)


def _read_text(path: Path) -> Recording:
    values, keep, header, count, width = array("f"), list[int](), list[str](), 0, 0
    with opened(path) as (comma, rows):
        for place, row in rows:
            if not width:
                header, width = _header(row), len(row)
                keep = [k for k in range(width) if not header or not NO_CHANNEL.fullmatch(header[k])]
                if not keep:
                    raise ValueError(f"none of its columns ({', '.join(header)[:200]}) is a channel")
                if header:
                    continue
            if len(row) != width:
                raise ValueError(f"line {place} has another number of values ({len(row):,}) than the first ({width:,})")
            try:
                values.extend(numbers([row[k] for k in keep], comma))
            except ValueError as error:
                raise ValueError(f"line {place}: {error}") from None
            count += 1
    if not count:
        raise ValueError("it holds no values")
    if count == 1 and not header:
        keep, count = [0], len(keep)
    _refuse_channels(len(keep))
    names = tuple(header[k] for k in keep) if header else _numbered(len(keep))
    left_out = tuple(name for name in header if name and NO_CHANNEL.fullmatch(name))
    return Recording(names, np.array(values, np.float32).reshape(count, len(keep)).T, left_out)


def _header(row: Sequence[str]) -> list[str]:
    """The names of the columns, if a first line holds them: words, or what pandas calls columns without a name.

    Without an index beside them these look like values, but three that count from 0 hardly are.
    """
    index = row[0] == ""
    counted = (index or len(row) > 2) and list(row[index:]) == list(map(str, range(len(row) - index)))
    return [name.strip() for name in row] if counted or not all(map(_is_number, row)) else []


@cache
def _numbered(channels: int) -> tuple[str, ...]:
    return tuple(map(str, range(channels)))


def _refuse_channels(count: int) -> None:
    if count > MAX_CHANNELS:
        raise ValueError(f"it has {count:,} channels, more than {MAX_CHANNELS:,}")


def _is_number(text: str) -> bool:
    try:
        number(text, comma=True)
    except ValueError:
        return False
    return True


def load_recordings(
    lists: Sequence[FileList], where: Path, *, missing: Missing = "refuse", skip_unreadable: bool = False
) -> Splits:
    """The training set and, if there are two lists, the test set; padded to the longest recording of both.

    Raises InputError for files that are no recordings, or have other channels than most (all counted, the
    first five named), unless `skip_unreadable`, and for gaps as `from_cases` does.
    """
    read, kept = _read(lists, where, skip_unreadable)
    names = [[files.names[row] for row in rows] for files, rows in zip(lists, kept, strict=True)]
    ids = [[files.ids[row] for row in rows] for files, rows in zip(lists, kept, strict=True)]
    more = (read[1], names[1]) if len(read) > 1 else ()
    return from_cases(read[0], names[0], *more, missing=missing, where=str(where), ids=ids)


def _read(lists: Sequence[FileList], where: Path, skip: bool) -> tuple[list[list[Floats]], list[list[int]]]:
    """The recordings of each list, and their row numbers in it."""
    found, bad, there = list[tuple[int, int, Recording]](), list[str](), 0
    known = dict[tuple[str, ...], tuple[str, ...]]()  # the names of channels are the same in most, and kept once
    for part, files in enumerate(lists):
        for row, name in enumerate(files.ids):
            try:
                one = read_recording(files.readable(row, EXTENSIONS, "a recording"))
            except FileNotFoundError:
                bad.append(f"{name}: no such file")
            except (OSError, ValueError, csv.Error) as error:
                bad.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0][:200].rstrip('.')}")
            else:
                if one.channels not in known:
                    there += ROW_COST * len(one.channels)
                one = replace(one, channels=known.setdefault(one.channels, one.channels))
                found.append((part, row, one))
                there += one.values.nbytes
                refuse_beyond_memory(where, there)
    channels = Counter(one.channels for _, _, one in found)
    usual = max(channels, key=lambda names: channels[names], default=())
    read, kept = [list[Floats]() for _ in lists], [list[int]() for _ in lists]
    for part, row, one in found:
        if one.channels == usual:
            read[part].append(one.values)
            kept[part].append(row)
        else:
            told = f"it has the channels {_few(one.channels)}, where others have {_few(usual)}"
            bad.append(f"{lists[part].ids[row]}: {told}")
    total = sum(len(files.ids) for files in lists)
    leave_out(bad, total, f"files in {where} cannot be read as recordings", skip=skip)
    if not all(kept):
        raise InputError(f"{where} holds no recording that can be read.")
    left_out = {name for _, _, one in found for name in one.left_out}
    if left_out:
        told = ", ".join(sorted(left_out))
        warnings.warn(
            visible(f"{where}: columns called {told} are not read: they are no channels."), LeftOut, stacklevel=4
        )
    return read, kept


def _few(channels: Sequence[str]) -> str:
    return ", ".join(channels[:5]) + (", ..." if len(channels) > 5 else "")
