"""Rows that are not one tensor in memory; each can be gathered like a tensor."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antibackdoor.data.core import Rows

RESIDENT = 2**26
"""Bytes of a mapped file that a process holds on to at a time."""
AROUND = 2**20
"""Bytes that the system maps around the one that is asked for: a whole block of its cache, of up to some MiB."""


class MemoryMap:
    """Rows of a file on disk, read when asked for; `order` permutes axes (NHWC on disk -> NCHW).

    What was read stays in the system's cache of files, but this process lets go of it every `RESIDENT` bytes, so that
    its memory does not grow with the set.
    """

    def __init__(self, array: np.ndarray, order: tuple[int, ...] | None = None):
        self._source = array, order
        self.array = array if order is None else array.transpose(order)
        self.dtype = torch.from_numpy(np.empty(0, self.array.dtype)).dtype
        self._map: mmap.mmap | None = getattr(array, "_mmap", None)
        self._touched = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process of the run: the place in the file in place of what stands there."""
        array, order = self._source
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.filename is not None:
            return _mapped, (str(array.filename), array.dtype.str, array.offset, array.shape, order)
        return MemoryMap, (array, order)

    @property
    def shape(self) -> Sequence[int]:
        """`(n, ...)`."""
        return self.array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Tensor) -> Tensor:
        # Fancy indexing copies, so the caller never holds a view into the file.
        found = np.ascontiguousarray(self.array[rows.cpu().numpy()])
        self._touched += found.nbytes + len(found) * AROUND
        if self._map is not None and self._touched > RESIDENT and sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return torch.from_numpy(found)


def _mapped(file: str, dtype: str, offset: int, shape: tuple[int, ...], order: tuple[int, ...] | None) -> MemoryMap:
    return MemoryMap(np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape), order)


@dataclass(frozen=True)
class View:
    """The rows `rows` of `source`."""

    source: Rows
    rows: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """`(n, ...)`."""
        return (len(self.rows), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the source."""
        return self.source.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.source[self.rows[rows.to(self.rows.device)]]


class Overlay:
    """`source` with the rows `rows` (sorted, unique) replaced by `values`; the source is not copied and not changed."""

    def __init__(self, source: Rows, rows: Tensor, values: Tensor):
        self.source, self.values = source, values
        self._place = torch.full((len(source),), -1, dtype=torch.int64)
        self._place[rows] = torch.arange(len(rows))

    @property
    def shape(self) -> Sequence[int]:
        """Of the source."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the source."""
        return self.source.dtype

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: Tensor) -> Tensor:
        place = self._place[rows.cpu()]
        out = self.source[rows]
        replaced = place >= 0
        out[replaced.to(out.device)] = self.values[place[replaced]].to(out.device)
        return out
