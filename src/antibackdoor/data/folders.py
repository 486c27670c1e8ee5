"""Data -> a folder of class folders with one PNG a sample, under names that no stranger chose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

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


def folder_names(classes: Sequence[str]) -> list[str]:
    """Class names as folder names, different even where letter case does not count."""
    names: list[str] = []
    for number, name in enumerate(classes):
        safe, taken = safe_name(name), {other.casefold() for other in names}
        names.append(f"{safe}-{number}" if safe.casefold() in taken else safe)
    return names


def safe_name(text: str) -> str:
    """Text from whoever made the data as a plain file name: no separators, no leading dot, not long."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[-60:] or "_"
