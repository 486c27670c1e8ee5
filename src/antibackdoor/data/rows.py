"""Rows that are not one tensor in memory; each can be gathered like a tensor."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antibackdoor.data.core import Rows
from antibackdoor.errors import InputError


class FileRows:
    """Rows of a file of bare numbers, `shape` of `dtype`, read when asked for; `order` permutes axes (NHWC -> NCHW).

    Read, not mapped: the memory of the process stays that of one batch, and a file that is cut short or a drive that
    fails is told in a sentence, where the system would end a process that had it mapped.
    Raises InputError where the file does not hold that many bytes, and where it cannot be read.
    """

    def __init__(self, file: Path, shape: Sequence[int], dtype: npt.DTypeLike, order: Sequence[int] | None = None):
        self._given = file, tuple(shape), np.dtype(dtype), order
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self._one = threading.Lock()
        with self._reading():
            self._file = file.open("rb", buffering=0)
            wanted, there = math.prod(shape) * np.dtype(dtype).itemsize, os.fstat(self._file.fileno()).st_size
        if there != wanted:
            raise InputError(f"{file} holds {there:,} bytes, not {wanted:,}; remove it, and it is made again.")

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process of the run: the place in the file in place of what stands there."""
        return FileRows, self._given

    @property
    def shape(self) -> Sequence[int]:
        """`(n, ...)`."""
        _, shape, _, order = self._given
        return shape if order is None else tuple(shape[axis] for axis in order)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        _, shape, dtype, order = self._given
        numbers = rows.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"row {numbers.min()} or {numbers.max()} of {len(self)}")
        found = np.empty((len(numbers), *shape[1:]), dtype)
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)  # of runs of neighbors, which are read at once
        with self._reading():
            for start, end in zip(starts, np.append(starts, len(numbers))[1:], strict=True):
                self._read(found[start:end], int(numbers[start]))
        return torch.from_numpy(found if order is None else np.ascontiguousarray(found.transpose(order)))

    def _read(self, out: npt.NDArray[Any], row: int) -> None:
        """Fill `out` with what stands from `row` on."""
        left, place = out.data.cast("B"), row * out[:1].nbytes
        while left:
            count = self._read_some(left, place)
            if not count:
                raise OSError(0, "it was cut short while it was read")
            left, place = left[count:], place + count

    def _read_some(self, out: memoryview, place: int) -> int:
        """As much as comes at once; the file's own position is shared by threads and by forked processes."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], place)
        with self._one:
            self._file.seek(place)
            return self._file.readinto(out) or 0

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot read {self._given[0]}: {error.strerror or error}.") from None


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
