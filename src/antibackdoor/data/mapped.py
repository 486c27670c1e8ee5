"""Copies of data that can be mapped into memory, kept in a hidden folder beside them or in `$ANTIBACKDOOR_CACHE`."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from antibackdoor.errors import InputError
from antibackdoor.files import atomically
from antibackdoor.limits import memory, refuse_special

CACHE = "ANTIBACKDOOR_CACHE"


def fills_memory(path: Path, share: float = 0.25) -> bool:
    """Whether the arrays of an `.npz` would take more than this share of the memory, and can be mapped instead."""
    try:
        refuse_special(path)
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (ValueError, NotImplementedError, OSError, zipfile.BadZipFile):  # told when it is read
        return False
    there = memory()
    return there is not None and unpacked > share * there and can_keep(path)


def can_keep(path: Path) -> bool:
    """Whether copies of a file or folder can be written where they belong."""
    above = cache_place(path)
    return os.access(above if above.exists() else above.parent, os.W_OK)


def cache_place(path: Path) -> Path:
    """Where copies of a file or folder lie: `.NAME.cache` beside it or, by its full path, in `$ANTIBACKDOOR_CACHE`."""
    path = path.resolve()
    chosen = os.environ.get(CACHE)
    if not chosen:
        return path.with_name(f".{path.name}.cache")
    Path(chosen).mkdir(parents=True, exist_ok=True)
    return Path(chosen) / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def cache_folder(path: Path) -> Path:
    """Where copies of this very file lie (by size and time); outdated ones are removed."""
    stat = path.stat()
    folder = cache_place(path) / f"{stat.st_size}-{stat.st_mtime_ns}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; load without memory mapping.") from None
    keep_only(folder)
    return folder


def keep_only(folder: Path) -> None:
    """Remove its neighbors: copies of what has changed since."""
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def map_member(path: Path, name: str) -> npt.NDArray[Any]:
    """The array `name` of an `.npz`, mapped; a member is a whole .npy file, copied without passing through memory."""
    cached = cache_folder(path) / f"{name}.npy"
    if not cached.exists():
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:

            def copy(part: Path) -> None:
                with part.open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)

            atomically(cached, copy)
    return np.asanyarray(np.load(cached, mmap_mode="r", allow_pickle=False))


def map_made(
    path: Path, name: str, shape: tuple[int, ...], fill: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Float32 rows that `fill` wrote into an array of this shape, mapped, and the row lengths it returned."""
    rows_file, lengths_file = (cache_folder(path) / f"{name}{end}.npy" for end in ("", "-lengths"))
    if not (rows_file.exists() and lengths_file.exists()):
        lengths = np.zeros(0, dtype=np.int64)

        def write_rows(part: Path) -> None:
            nonlocal lengths
            out = open_memmap(part, mode="w+", dtype=np.float32, shape=shape)  # type: ignore[no-untyped-call]
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up would kill the process as it fills the map
                with part.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            lengths = fill(out)
            out.flush()

        def write_lengths(part: Path) -> None:
            with part.open("wb") as file:  # given a path, save would append .npy to it
                np.save(file, lengths, allow_pickle=False)

        atomically(rows_file, write_rows)
        atomically(lengths_file, write_lengths)
    return np.load(rows_file, mmap_mode="r", allow_pickle=False), np.load(lengths_file, allow_pickle=False)
