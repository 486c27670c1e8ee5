"""Copies of data on disk from which rows are read as needed, kept in the user's own folder for such things.

Never beside the data: whoever made these could have put a copy of other content there, or a link to a folder whose
files would then be taken for outdated copies.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antibackdoor.data.rows import FileRows
from antibackdoor.errors import InputError
from antibackdoor.files import atomically, refuse_other
from antibackdoor.limits import memory, refuse_special

CACHE = "ANTIBACKDOOR_CACHE"
OURS = re.compile(r"[0-9a-f]{32}")
"""Names of folders of copies."""


def fills_memory(path: Path, share: float = 0.25) -> bool:
    """Whether the arrays of an `.npz` would take more than this share of the memory, and can be copied instead."""
    try:
        refuse_special(path)
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (ValueError, NotImplementedError, OSError, zipfile.BadZipFile):  # told when it is read
        return False
    there = memory()
    return there is not None and unpacked > share * there and can_keep()


def cache_root() -> Path:
    """Where downloads and copies go: `$ANTIBACKDOOR_CACHE`, else ~/.cache/antibackdoor."""
    chosen = os.environ.get(CACHE)
    try:
        return Path(chosen) if chosen else Path.home() / ".cache" / "antibackdoor"
    except RuntimeError:
        raise InputError(f"this account has no home folder; name a folder for copies of data in ${CACHE}.") from None


def can_keep() -> bool:
    """Whether copies can be written."""
    try:
        root = cache_root()
    except InputError:
        return False
    return os.access(next(path for path in (root, *root.parents) if path.exists()), os.W_OK)


def copies_of(path: Path, key: Iterable[object]) -> Path:
    """The folder for copies of a file or folder, found by its full path; key: everything else that they depend on.

    InputError where a link lies on the way from the cache folder to it.
    """
    folder = cache_root() / "copies" / _digest([str(path.resolve())]) / _digest(key)
    for place in (folder.parent.parent, folder.parent, folder):
        if place.is_symlink():
            raise InputError(f"{place} is a link, but copies of data are kept in plain folders only; remove it.")
    return folder


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def stamp(path: Path) -> tuple[int, int, int]:
    """What tells that a file was changed; its last part, unlike the time before it, no archive can preset."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def keep_only(folder: Path) -> None:
    """Remove its neighbors: copies of what has changed since."""
    for old in folder.parent.iterdir():
        if old != folder and OURS.fullmatch(old.name) and old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)


def _copies(path: Path) -> Path:
    """The folder for copies of this very file, made where it is not there; outdated ones are removed."""
    folder = copies_of(path, stamp(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}; name another place in ${CACHE}, or load without memory mapping."
        ) from None
    keep_only(folder)
    return folder


def keep_rows(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    blocks: Callable[[], Iterable[npt.NDArray[Any]]],
    order: tuple[int, ...] | None = None,
) -> FileRows:
    """The rows that come out of `blocks`, one block after the other, kept in a file beside other copies of `path`.

    They must follow from the file and the name alone: where a copy of this size is there, it is taken as it is.
    order: of the axes that the rows are to have.
    """
    file = _copies(path) / f"{name}.bin"
    refuse_other(file)
    if not file.exists() or file.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:

        def write(part: Path) -> None:
            with part.open("wb") as out:
                for block in blocks():
                    out.write(np.ascontiguousarray(block, dtype).data)

        atomically(file, write)
    return FileRows(file, shape, dtype, order)
