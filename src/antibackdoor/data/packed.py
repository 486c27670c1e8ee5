"""Images decoded once: into memory, or, where they would fill it, into a file from which rows are read as needed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from antibackdoor.data.copies import can_keep, copies_of, keep_only
from antibackdoor.data.core import Rows
from antibackdoor.data.rows import FileRows
from antibackdoor.errors import InputError
from antibackdoor.files import atomically, read_json, write_json
from antibackdoor.limits import memory, refuse_beyond_memory

VERSION = 1
"""Of what is written; another way of decoding gets another number, so that old files are not taken for new ones."""
SHARE = 0.25
"""Of the memory that decoded images may fill before they are written to disk."""
BLOCK = 2**25
"""Bytes that are decoded at a time."""

Block = npt.NDArray[np.uint8]


def rows_in_block(shape: tuple[int, ...]) -> int:
    """How many samples of this shape are decoded at a time."""
    return max(1, BLOCK // int(np.prod(shape)))


class Contents(BaseModel):
    """`pack.json`. size: (width, height); counts: images of each split; bad: what is wrong with some rows of each."""

    model_config = ConfigDict(extra="forbid")

    size: tuple[PositiveInt, PositiveInt]
    counts: list[PositiveInt]
    bad: list[dict[NonNegativeInt, str]]

    def fits(self, folder: Path) -> bool:
        """Whether the files beside it are what it says."""
        bins = {f"{split}.bin": count * 3 * self.size[0] * self.size[1] for split, count in enumerate(self.counts)}
        there = {path.name: path.lstat() for path in folder.glob("*.bin")}
        return (
            {name: found.st_size for name, found in there.items() if stat.S_ISREG(found.st_mode)} == bins
            and len(self.bad) == len(self.counts)
            and all(row < count for count, rows in zip(self.counts, self.bad, strict=True) for row in rows)
        )


class Pack:
    """Where the decoded images of one set go, split by split.

    where: the folder or file that the images come from; key: everything that they depend on. memory_map: True writes
    them to disk, False keeps them in memory, None writes them once they fill a quarter of the memory.
    A set that was written before is not decoded again: `old` is what `done` was told of it, None where nothing, or
    nothing whole, is there.
    """

    def __init__(self, where: Path, key: Iterable[object], memory_map: bool | None):
        self.folder: Path | None = None
        self.old: Contents | None = None
        self.limit = float("inf") if memory_map is not True else -1.0
        if memory_map is False:
            return
        if memory_map is None:
            there = memory()
            if there is None or not can_keep():
                return
            self.limit = SHARE * there
        self.folder = copies_of(where, chain([VERSION], key))
        with suppress(InputError, ValidationError):  # it is missing or damaged
            old = Contents.model_validate(read_json(self.folder / "pack.json"))
            self.old = old if old.fits(self.folder) else None

    def saved(self) -> tuple[tuple[int, int], list[Rows], list[dict[int, str]]]:
        """What was written before: the size, the rows of each split, and what is wrong with some of them."""
        assert self.folder is not None and self.old is not None
        width, height = self.old.size
        parts: list[Rows] = []
        for split, count in enumerate(self.old.counts):
            file, shape = self.folder / f"{split}.bin", (count, 3, height, width)
            parts.append(FileRows(file, shape, np.uint8))
        return (width, height), parts, self.old.bad

    def writer(self, split: int, shape: tuple[int, ...]) -> Writer:
        """Takes the decoded images of a split, `(k, C, H, W)` at a time; shape: of one sample."""
        return Writer(None if self.folder is None else self.folder / f"{split}.bin", shape, self.limit)

    def done(self, size: tuple[int, int], rows: Sequence[Rows], bad: Sequence[dict[int, str]]) -> None:
        """All splits were decoded; kept, where one of them is on disk, for the next time.

        size: (width, height); bad: what is wrong with some rows of each split.
        """
        if self.folder is None or not any(isinstance(part, FileRows) for part in rows):
            return
        for split, part in enumerate(rows):
            if isinstance(part, Tensor):  # small beside the one that was written
                if not len(part):
                    return  # refused by the caller
                atomically(self.folder / f"{split}.bin", part.numpy().tofile)
        keep_only(self.folder)
        told = Contents(size=size, counts=[len(part) for part in rows], bad=list(bad))
        write_json(self.folder / "pack.json", told.model_dump())


class Writer:
    """Collects blocks in memory and, beyond `limit` bytes, in `file`; nothing is left behind where it fails."""

    def __init__(self, file: Path | None, shape: tuple[int, ...], limit: float):
        self.file, self.shape, self.limit = file, shape, limit
        self.blocks: list[Block] = []
        self.count = self.size = 0
        self.out: IO[bytes] | None = None
        self.part = None if file is None else file.with_name(f".{file.name}.{os.getpid()}.part")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.out is not None:
            self.out.close()
        if self.part is not None:
            self.part.unlink(missing_ok=True)

    def expect(self, rows: int, what: object) -> None:
        """Refuse, before they are made, this many more rows than fit into the memory; to disk they go in blocks."""
        bytes_of = int(np.prod(self.shape))
        if self.part is None:
            refuse_beyond_memory(what, self.size + rows * bytes_of)
        else:
            refuse_beyond_memory(what, min(rows, rows_in_block(self.shape)) * bytes_of)

    def add(self, block: Block) -> None:
        """The next rows."""
        self.count, self.size = self.count + len(block), self.size + block.nbytes
        with self._writing():
            if self.out is None and self.part is not None and self.size > self.limit:
                self.part.parent.mkdir(parents=True, exist_ok=True)
                self.part.unlink(missing_ok=True)
                self.out = self.part.open("xb")
                while self.blocks:
                    self.out.write(self.blocks.pop(0).data)
            if self.out is None:
                self.blocks.append(block)
            else:
                self.out.write(np.ascontiguousarray(block).data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write decoded images to {self.file}: {error.strerror or error}; free space, name another "
                "place in $ANTIBACKDOOR_CACHE, or load without memory mapping."
            ) from None

    def rows(self) -> Rows:
        """All of them."""
        if self.out is not None:
            assert self.part is not None and self.file is not None
            with self._writing():
                self.out.flush()
                os.fsync(self.out.fileno())
                self.out.close()
                self.part.replace(self.file)
            return FileRows(self.file, (self.count, *self.shape), np.uint8)
        whole = np.empty((self.count, *self.shape), dtype=np.uint8)
        end = self.count
        while self.blocks:  # each is let go once it is copied, so there is never a second copy of the set
            block = self.blocks.pop()
            whole[end - len(block) : end] = block
            end -= len(block)
        return torch.from_numpy(whole)
