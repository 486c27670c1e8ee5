"""Images decoded once: into memory, or, where they would fill it, into a file from which rows are read as needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antibackdoor.data.core import Rows
from antibackdoor.data.mapped import cache_place, can_keep, keep_only
from antibackdoor.data.rows import MemoryMap
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


class Pack:
    """Where the decoded images of one set go, split by split.

    where: the folder or file that the images come from; key: everything that they depend on. memory_map: True writes
    them to disk, False keeps them in memory, None writes them once they fill a quarter of the memory.
    A set that was written before is not decoded again: `old` is what `done` was told of it.
    """

    def __init__(self, where: Path, key: Iterable[object], memory_map: bool | None):
        self.folder: Path | None = None
        self.old: Any = None
        self.limit = float("inf") if memory_map is not True else -1.0
        if memory_map is False:
            return
        if memory_map is None:
            there = memory()
            if there is None or not can_keep(where):
                return
            self.limit = SHARE * there
        digest = hashlib.sha256(repr(VERSION).encode())
        for part in key:
            digest.update(repr(part).encode("utf-8", "surrogatepass"))
        self.folder = cache_place(where) / digest.hexdigest()[:16]
        if (self.folder / "pack.json").exists():
            self.old = read_json(self.folder / "pack.json")

    def saved(self) -> tuple[tuple[int, int], list[Rows], list[dict[int, str]]]:
        """What was written before: the size, the rows of each split, and what is wrong with some of them."""
        assert self.folder is not None
        old, width, height = self.old, int(self.old["size"][0]), int(self.old["size"][1])
        bad = [{int(row): str(reason) for row, reason in found.items()} for found in old["bad"]]
        parts: list[Rows] = []
        for split, count in enumerate(old["counts"]):
            file, shape = self.folder / f"{split}.bin", (int(count), 3, height, width)
            try:
                parts.append(MemoryMap(np.memmap(file, dtype=np.uint8, mode="r", shape=shape)))
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read the decoded images in {file} ({error}); delete {self.folder}.") from None
        return (width, height), parts, bad

    def writer(self, split: int, shape: tuple[int, ...]) -> Writer:
        """Takes the decoded images of a split, `(k, C, H, W)` at a time; shape: of one sample."""
        return Writer(None if self.folder is None else self.folder / f"{split}.bin", shape, self.limit)

    def done(self, size: tuple[int, int], rows: Sequence[Rows], bad: Sequence[dict[int, str]]) -> None:
        """All splits were decoded; kept, where one of them is on disk, for the next time.

        size: (width, height); bad: what is wrong with some rows of each split.
        """
        if self.folder is None or not any(isinstance(part, MemoryMap) for part in rows):
            return
        for split, part in enumerate(rows):
            if isinstance(part, Tensor):  # small beside the one that was written
                if not len(part):
                    return  # refused by the caller; an empty file cannot be mapped
                atomically(self.folder / f"{split}.bin", part.numpy().tofile)
        keep_only(self.folder)
        write_json(self.folder / "pack.json", {"size": list(size), "counts": [len(p) for p in rows], "bad": list(bad)})


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
        try:
            if self.out is None and self.part is not None and self.size > self.limit:
                self.part.parent.mkdir(parents=True, exist_ok=True)
                self.out = self.part.open("wb")
                while self.blocks:
                    self.out.write(self.blocks.pop(0).data)
            if self.out is None:
                self.blocks.append(block)
            else:
                self.out.write(np.ascontiguousarray(block).data)
        except OSError as error:
            raise InputError(
                f"cannot write decoded images to {self.file}: {error.strerror or error}; free space, name another "
                "place in $ANTIBACKDOOR_CACHE, or load without memory mapping."
            ) from None

    def rows(self) -> Rows:
        """All of them."""
        if self.out is not None:
            assert self.part is not None and self.file is not None
            self.out.close()
            self.part.replace(self.file)
            return MemoryMap(np.memmap(self.file, dtype=np.uint8, mode="r", shape=(self.count, *self.shape)))
        whole = np.empty((self.count, *self.shape), dtype=np.uint8)
        end = self.count
        while self.blocks:  # each is let go once it is copied, so there is never a second copy of the set
            block = self.blocks.pop()
            whole[end - len(block) : end] = block
            end -= len(block)
        return torch.from_numpy(whole)
