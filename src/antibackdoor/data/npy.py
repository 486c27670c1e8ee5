"""Arrays in `.npy` files and `.npz` archives, judged by their headers before anything of the size they declare is."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from antibackdoor.limits import refuse_bomb

Array: TypeAlias = npt.NDArray[Any]
NPY: Any = np.lib.format
"""Has no types."""


@dataclass(frozen=True)
class Header:
    """What an array says of itself."""

    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype[Any]

    @property
    def rows(self) -> int:
        """Entries of the first axis; 0 for a single number."""
        return self.shape[0] if self.shape else 0

    @property
    def nbytes(self) -> int:
        """Of all its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes], there: int) -> Header:
    """The header of an array file of `there` bytes, which is left at its first value.

    ValueError where it declares more than these bytes hold (a row without values counts as one byte, so that none is
    free), and for pickled objects.
    """
    version = NPY.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format has the unknown version {version[0]}.{version[1]}")
    header = Header(*(NPY.read_array_header_1_0 if version == (1, 0) else NPY.read_array_header_2_0)(file))
    if header.dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never read; save plain arrays of numbers")
    if min(header.shape, default=0) < 0 or max(header.nbytes, header.rows) > there:
        raise ValueError(f"it declares more values than its {there:,} bytes hold")
    return header


def read_array(encoded: bytes) -> Array:
    """One `.npy` file; ValueError as for its header, and whatever numpy says of a damaged one."""
    read_header(BytesIO(encoded), len(encoded))
    return np.asarray(NPY.read_array(BytesIO(encoded), allow_pickle=False))


@contextmanager
def open_member(path: Path, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
    """The header of an array in an `.npz`, and the file at its first value."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        yield read_header(file, archive.getinfo(f"{name}.npy").file_size), file


def read_member(path: Path, name: str) -> Array:
    """One array of an `.npz`."""
    with open_member(path, name):
        pass  # its header is in order
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        return np.asarray(NPY.read_array(file, allow_pickle=False))


def read_members(path: Path) -> dict[str, Array]:
    """All arrays of an `.npz`; InputError for a bomb, and as for one array."""
    refuse_bomb(path)
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return {name: read_member(path, name) for name in sorted(names)}
