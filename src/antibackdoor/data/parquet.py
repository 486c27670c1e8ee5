"""What a parquet file declares, page by page, read without unpacking any.

The footer tells the rows, each page in front of it how many values it holds and how large it is unpacked. Ten bytes can
tell of two billion; whoever unpacks them first counts them afterwards.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antibackdoor.errors import InputError

MAGIC, WIDTH, DEPTH = b"PAR1", 8, 16
"""Bytes at both ends; bytes that a value takes at most where it is of a fixed size; structs in each other."""
PAGES = {0: 5, 2: 7, 3: 8}
"""Kind of a page (data, dictionary, data of version 2) -> the field of its header that counts its values."""

LENIENT = re.compile(rb"parquet-mr", re.IGNORECASE)
STRICT = re.compile(rb"parquet-mr version (1\.2\.9|1\.[3-9]|1\.[1-9]\d|[2-9])", re.IGNORECASE)
"""For files of old versions, pyarrow reads on behind the end that a column declares."""


@dataclass(frozen=True)
class Declared:
    """Rows, bytes of all pages unpacked (a value as one of 8 bytes at least), and of those of the largest row group."""

    rows: int
    unpacked: int
    largest: int


def declared(path: Path) -> Declared:
    """What the file says of itself; InputError where it cannot be understood."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _declared(content)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: it is no parquet file, or damaged ({error}).") from None


def _declared(content: mmap.mmap) -> Declared:
    size = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - size
    if content[-4:] != MAGIC or start < len(MAGIC):
        raise ValueError("its end is missing")
    footer = _Compact(content, start, len(content) - 8).struct()
    if LENIENT.search(footer.get(6) or b"") and not STRICT.search(footer[6]):
        raise ValueError("parquet-mr before 1.2.9 wrote it, whose pages may lie outside of their columns")
    groups = []
    for group in footer.get(4, []):
        chunks = [chunk[3] for chunk in group[1]]
        groups.append(sum(_chunk(content, chunk) for chunk in chunks))
    rows = max(footer[3], sum(group[3] for group in footer.get(4, [])))
    return Declared(rows, sum(groups), max(groups, default=0))


def _chunk(content: mmap.mmap, told: dict[int, Any]) -> int:
    """Bytes of a column's pages, as each declares them."""
    place = min(told[9], told.get(11) or told[9])
    end, unpacked = place + told[7], 0
    if not 0 <= place <= end <= len(content):
        raise ValueError("a column lies outside of it")
    while place < end:
        reader = _Compact(content, place, end)
        header = reader.struct()
        values = header[PAGES[header[1]]][1] if header[1] in PAGES else 0
        if min(header[2], header[3], values) < 0:
            raise ValueError("a page of less than nothing")
        unpacked += max(header[2], WIDTH * values)
        place = reader.place + header[3]
    return unpacked


class _Compact:
    """Reads one struct of Thrift's compact protocol as field number -> value; `place` is then behind it."""

    def __init__(self, content: mmap.mmap, place: int, end: int):
        self.content, self.place, self.end = content, place, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Its fields."""
        found, number = dict[int, Any](), 0
        if depth > DEPTH:
            raise ValueError("it is nested too deeply")
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            found[number] = (head & 15 == 1) if head & 15 in (1, 2) else self._value(head & 15, depth)
        return found

    def _byte(self) -> int:
        if self.place >= self.end:
            raise ValueError("it ends too early")
        self.place += 1
        return self.content[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value, shift = value | (byte & 127) << shift, shift + 7
            if shift > 63:
                raise ValueError("a number without an end")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # in a list, a truth value is a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            if count > self.end - self.place:
                raise ValueError("a list that is longer than the file")
            return [self._value(head & 15, depth) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a field of an unknown kind")

    def _bytes(self, size: int) -> bytes:
        if size > self.end - self.place:
            raise ValueError("it ends too early")
        self.place += size
        return self.content[self.place - size : self.place]
