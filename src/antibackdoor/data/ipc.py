"""What the messages of an arrow file declare, read without unpacking any.

Each names the buffers behind it; a compressed one begins with its size unpacked, for which pyarrow takes memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"ARROW1"
DICTIONARY = 2
"""Kind of a message whose batch lies one table deeper."""


def at_stream(source: pa.NativeFile) -> pa.NativeFile:
    """An opened file at its first message: `datasets` writes a stream, other tools a stream between two directories."""
    source.seek(0)
    source.seek(8 if source.read(6) == MAGIC else 0)
    return source


def unpacked(source: pa.NativeFile) -> int:
    """Bytes of all its buffers unpacked; ValueError where its directory tells of other batches than there are."""
    import pyarrow as pa

    source.seek(0)
    listed = pa.ipc.open_file(source).num_record_batches if source.read(6) == MAGIC else None
    total = batches = 0
    for message in pa.ipc.MessageReader.open_stream(at_stream(source)):
        if message.type in ("record batch", "dictionary"):
            batches += message.type == "record batch"
            total += sum(_sizes(message.metadata.to_pybytes(), message.body))
    if listed not in (None, batches):
        raise ValueError(f"its directory lists {listed} batches, but it holds {batches}")
    return total


def _sizes(told: bytes, body: Any) -> Iterator[int]:
    """The size of each buffer of a message: as it lies there, or as it says it is unpacked."""
    message = _Table(told, _number(told, 0, 4))
    header = message.table(2)
    batch = header.table(1) if message.small(1) == DICTIONARY else header
    packed, place = batch.at(3) is not None or b"experimental_compression" in told, batch.vector(2)  # as of 2020, too
    for entry in range(place + 4, place + 4 + 16 * _number(told, place, 4), 16):
        start, size = _number(told, entry, 8), _number(told, entry + 8, 8)
        if start + size > body.size:
            raise ValueError("a buffer lies outside of it")
        if packed and size >= 8:
            size = max(size, int.from_bytes(body[start : start + 8].to_pybytes(), "little", signed=True))
        yield size


def _number(told: bytes, place: int, width: int) -> int:
    """An unsigned number; one that lies outside raises ValueError."""
    if not 0 <= place <= len(told) - width:
        raise ValueError("a message points out of itself")
    return int.from_bytes(told[place : place + width], "little")


class _Table:
    """A table of a flatbuffer: its fields lie where the list of offsets, to which it points back, says."""

    def __init__(self, told: bytes, place: int):
        self.told, self.place = told, place
        self.offsets = place - int.from_bytes(told[place : place + 4], "little", signed=True)
        self.count = (_number(told, self.offsets, 2) - 4) // 2

    def at(self, field: int) -> int | None:
        """Where a field lies; None where it is left out."""
        offset = _number(self.told, self.offsets + 4 + 2 * field, 2) if field < self.count else 0
        return self.place + offset if offset else None

    def small(self, field: int) -> int:
        """A field of one byte."""
        place = self.at(field)
        return 0 if place is None else _number(self.told, place, 1)

    def vector(self, field: int) -> int:
        """Where a list, or a table, begins."""
        place = self.at(field)
        if place is None:
            raise ValueError("a message without its fields")
        return place + _number(self.told, place, 4)

    def table(self, field: int) -> _Table:
        """A table within this one."""
        return _Table(self.told, self.vector(field))
