"""Image files -> Data: a folder of class folders, or a CSV manifest."""

from __future__ import annotations

import csv
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import torch
from torch import Tensor

from antibackdoor.data.copies import stamp
from antibackdoor.data.core import Splits
from antibackdoor.data.decoding import EXTENSIONS, Encoded, Size, Split, read_images
from antibackdoor.data.labels import TEST_NAMES, number
from antibackdoor.errors import InputError, LeftOut, visible
from antibackdoor.limits import MAX_SAMPLE, MAX_TEXT, containment, refuse_special

MAX_DEPTH = 64
CLUTTER = {"thumbs.db", "desktop.ini"}


@dataclass
class Listing(Split):
    """Files that are to be read: the folder they lie in, their paths below it (the ids), their class names."""

    unreadable = "files in {} cannot be read as images"
    root: Path
    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, label: str) -> None:
        """One more file; a million of them share the names of their few classes."""
        self.ids.append(name)
        self.names.append(sys.intern(label))

    def path(self, row: int) -> Path:
        """Of one file."""
        return self.root / self.ids[row]

    def state(self) -> Iterator[object]:
        """What the decoded images depend on: names, sizes and times of the files."""
        for row, name in enumerate(self.ids):
            try:
                yield name, self.names[row] == "", stamp(self.path(row))
            except (OSError, ValueError):  # ValueError: a NUL in a name
                yield name, None

    def encoded(self) -> Iterator[Encoded]:
        """The files, each to be opened in the thread that decodes it."""
        return (Encoded(partial(self._open, row)) for row in range(len(self.ids)))

    def _open(self, row: int) -> IO[bytes]:
        path = self.path(row)
        if not self.names[row]:
            raise ValueError("it is in no class folder")
        if path.suffix.lower() not in EXTENSIONS:
            raise ValueError("not an image file by its name")
        refuse_special(path, MAX_SAMPLE)
        return path.open("rb")

    def numbered(self, rows: list[int], classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
        """A class is there where an image of it can be read."""
        return number([self.names[row] for row in rows], [self.ids[row] for row in rows], classes)


def load_folder(
    root: Path,
    *,
    test: Path | None = None,
    image_size: Size = None,
    skip_unreadable: bool = False,
    memory_map: bool | None = False,
) -> Splits:
    """A folder of class folders, or one that holds a folder of them called `train` and one of `TEST_NAMES`.

    Classes are the folder names in plain text order; ids are paths relative to the folder. All images become RGB of one
    size: `image_size` squared (or a width and a height) or, if None, the training set's most common size with each side
    capped at 64 pixels. memory_map: see `Pack`.
    Raises InputError for files that are no readable images (all counted, the first five named) unless
    `skip_unreadable`, for links that lead out of the folder, and where a folder whose name begins with "train" holds
    folders that another one has, too, which is called otherwise: splits would be read as classes.
    """
    inside = _folders(root)
    trains = [name for name in sorted(inside) if name.lower().startswith("train") and has_class_folders(root / name)]
    split = trains == ["train"] and inside <= {"train", *TEST_NAMES}
    if trains and not split:
        alike = [name for name in sorted(inside - {trains[0]}) if _folders(root / name) & _folders(root / trains[0])]
        if alike or inside == {trains[0]}:
            beside = f"so does {root / alike[0]}" if alike else "it lies alone"
            raise InputError(
                f"{root / trains[0]} holds folders as a training set does, and {beside}: call them 'train' and 'test', "
                "or give the training set alone (and the other with --test)."
            )
    splits = [_list_folder(root, root / "train" if split else root)]
    if test is not None:
        splits.append(_list_folder(test, test))
    elif split and (names := [name for name in TEST_NAMES if name in inside]):
        splits.append(_list_folder(root, root / names[0]))
        for name in names[1:]:
            warnings.warn(
                visible(f"{root / name} is not read: the test set is {root / names[0]}."), LeftOut, stacklevel=4
            )
    return read_images(splits, root, image_size, skip_unreadable, memory_map)


def load_manifest(
    path: Path,
    *,
    test: Path | None = None,
    image_size: Size = None,
    skip_unreadable: bool = False,
    memory_map: bool | None = False,
) -> Splits:
    """A CSV file with the columns path, label and, optionally, split (train, or one of `TEST_NAMES`).

    Paths are relative to the CSV's folder and must stay inside of it; they are the ids. Sizes, classes, errors and
    memory_map as for `load_folder`.
    """
    train, held = _list_manifest(path)
    if test is not None:
        first, second = _list_manifest(test)
        held = second if second.ids else first
    if not train.ids:
        raise InputError(f"{path} lists no training images.")
    splits = [train, held] if held.ids else [train]
    return read_images(splits, path, image_size, skip_unreadable, memory_map)


def has_class_folders(path: Path) -> bool:
    """Whether a folder's images lie in folders of their own, and not side by side."""
    return bool(_folders(path))


def _folders(path: Path) -> set[str]:
    return {entry.name for entry in _visible(path) if entry.is_dir()}


def load_unlabeled(path: Path, size: tuple[int, int], *, skip_unreadable: bool = False) -> tuple[Tensor, list[str]]:
    """Images without labels, from one folder or one file: `(n, 3, H, W)` uint8 of `size` (width, height), and ids.

    Raises InputError for files that are no readable images, unless `skip_unreadable`.
    """
    files = list(_walk(path, path.resolve())) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no images.")
    listing = Listing(path if path.is_dir() else path.parent, [file.name for file in files], ["?"] * len(files))
    data = read_images([listing], path, size, skip_unreadable, memory_map=False).train
    return data.x[torch.arange(len(data))], list(data.ids)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without hidden files and what desktops leave behind."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}.") from None
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in CLUTTER]


def _walk(folder: Path, root: Path, depth: int = 1) -> Iterator[Path]:
    """All files below `folder` in sorted order; `root` is where links must not lead out of."""
    if depth > MAX_DEPTH:
        raise InputError(f"{root} holds folders in each other, more than {MAX_DEPTH} deep.")
    contained = containment(root)
    for entry in _visible(folder):
        path = Path(entry.path)
        if entry.is_symlink() and not (path.is_file() and contained(path)):
            raise InputError(
                f"{path} is a link out of the data set, to a folder or to nothing; put the files themselves there."
            )
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, depth + 1)
        else:
            yield path


def _list_folder(root: Path, folder: Path) -> Listing:
    """The files of the class folders in `folder`, named relative to `root`; files beside them get the class ''."""
    found, resolved = Listing(root), root.resolve()
    above, depth = len(root.parts), len(folder.parts)
    for path in _walk(folder, resolved):
        label = path.parts[depth] if len(path.parts) > depth + 1 else ""
        found.add("/".join(path.parts[above:]), label)
    if not any(found.names):
        raise InputError(f"{folder} holds no class folders with images: give each class a folder of its own.")
    return found


def _list_manifest(path: Path) -> tuple[Listing, Listing]:
    """The training and the test files that a CSV manifest names."""
    folder = path.parent
    train, test, seen = Listing(folder), Listing(folder), set()
    contained = containment(folder)
    refuse_special(path, MAX_TEXT)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            columns = next(rows, [])
            if not {"path", "label"} <= set(columns):
                raise InputError(
                    f"{path} needs a header line with the columns path and label; "
                    f"it has {', '.join(sorted(set(columns))) or 'none'}."
                )
            at = {name: columns.index(name) for name in ("path", "label", "split") if name in columns}
            twice = next((name for name in at if columns.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path} has the column {twice} twice; one is needed.")
            for row in rows:
                if not row:
                    continue
                found = {name: row[place] if place < len(row) else "" for name, place in at.items()}
                where, given, label = f"{path} line {rows.line_num}", found["path"], found["label"].strip()
                split = found.get("split", "").strip() or "train"
                if not given or not label:
                    raise InputError(f"{where} has no path or no label.")
                if split != "train" and split not in TEST_NAMES:
                    raise InputError(f"{where} has the split {split!r}; known: train, {', '.join(TEST_NAMES)}.")
                name = PurePosixPath(given)
                if name.is_absolute() or ".." in name.parts or not contained(folder / name):
                    raise InputError(f"{where}: {given!r} leads out of {folder}; paths must stay inside of it.")
                if name in seen:
                    raise InputError(f"{where} names {given!r} a second time; a file can be listed only once.")
                seen.add(name)
                (train if split == "train" else test).add(str(name), label)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # ValueError: bytes that are no text, and NUL in a name
        raise InputError(f"cannot read {path} as a CSV file: {error}.") from None
    if not train.ids and not test.ids:
        raise InputError(f"{path} lists no images.")
    return train, test
