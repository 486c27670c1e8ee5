"""Data -> a folder of class folders with one PNG a sample, under names that no stranger chose."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path, PurePath

import torch
from PIL import Image

from antibackdoor.data.core import Data


def write_class_folders(data: Data, root: Path, part: str, folders: Sequence[str]) -> list[str]:
    """One PNG a sample in `root/part/CLASS/`; returns the names that they get when the folder is read.

    folders: the folder name of each class, from `folder_names`; part: "train", "test" or "" for no such folder.
    """
    names = []
    start = f"{part}/" if part else ""
    for name in {folders[k] for k in data.y.unique().tolist()}:
        (root / part / name).mkdir(parents=True)
    for row, (label, sample_id) in enumerate(zip(data.y.tolist(), data.ids, strict=True)):
        # The row number keeps names apart and in order; it says nothing about the poison.
        names.append(f"{start}{folders[label]}/{row:06d}-{safe_name(Path(sample_id).stem)}.png")
        write_png(data, row, root / names[-1])
    return names


def write_png(data: Data, row: int, path: Path) -> None:
    """One image of a set as a file."""
    pixels = data.x[torch.tensor([row])][0].permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)


class Names:
    """Names given out in one folder: different for every file system, be it one where letter case does not count."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.numbers: dict[str, Iterator[int]] = {}

    def give(self, name: str, number: int) -> str:
        """This name where it is free, else `name-number`, or with the next number that is free."""
        given, path = name, PurePath(name)
        while _key(given) in self.taken:
            # Each number is tried once for a name, so that many names that are alike take no longer than others.
            following = self.numbers.setdefault(_key(name), count(number))
            given = f"{path.stem}-{next(following)}{path.suffix}"
        self.taken.add(_key(given))
        return given


def _key(name: str) -> str:
    """What names have in common that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folder_names(classes: Sequence[str]) -> list[str]:
    """Class names as folder names, all different."""
    names = Names()
    return [names.give(safe_name(name), number) for number, name in enumerate(classes)]


def safe_name(text: str) -> str:
    """Text from whoever made the data as a plain file name: no separators, no leading dot, not long.

    Letters and digits of all scripts stay; 60 of them take 240 bytes at most.
    """
    return re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", text))[-60:] or "_"
