"""Files of samples by name, before anything in them is read: in class folders, or listed by a CSV manifest."""

from __future__ import annotations

import csv
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from antibackdoor.data.copies import stamp
from antibackdoor.data.labels import TEST_NAMES, UNKNOWN, wrong_split
from antibackdoor.data.text import header_of, opened
from antibackdoor.errors import InputError, LeftOut, visible
from antibackdoor.limits import MAX_SAMPLE, containment, refuse_beyond_memory, refuse_special

MAX_DEPTH = 64
LISTED, LOOK = 512, 4096
"""Bytes of memory that a listed file takes; after how many it is looked at."""
CLUTTER = {"thumbs.db", "desktop.ini"}


@dataclass
class FileList:
    """Files that are to be read: the folder they lie in, their paths below it (the ids), their class names."""

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
        """What samples made of the files depend on: their names, sizes and times."""
        for row, name in enumerate(self.ids):
            try:
                yield name, self.names[row] == "", stamp(self.path(row))
            except (OSError, ValueError):  # ValueError: a NUL in a name
                yield name, None

    def readable(self, row: int, endings: Sequence[str], what: str) -> Path:
        """The path of a file that may be read as `what`; ValueError that tells why not, and as for `refuse_special`."""
        path = self.path(row)
        if not self.names[row]:
            raise ValueError("it is in no class folder")
        if path.suffix.lower() not in endings:
            raise ValueError(f"not {what} by its name")
        refuse_special(path, MAX_SAMPLE)
        return path

    def any_ends_in(self, endings: Sequence[str]) -> bool:
        """Whether one of the files ends in one of these."""
        return any(name.lower().endswith(tuple(endings)) for name in self.ids)


def in_folder(root: Path, test: Path | None = None) -> list[FileList]:
    """A folder of class folders, or one that holds a folder of them called `train` and one of `TEST_NAMES`.

    Classes are the folder names; ids are paths relative to the folder. test: a folder of class folders that goes before
    what `root` holds. Returns the training files and, if there is one, the test set's.
    Raises InputError for links that lead out of the folder, and where a folder whose name begins with "train" holds
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
    return splits


def in_manifest(path: Path, test: Path | None = None) -> list[FileList]:
    """What a CSV file with the columns path, label and, optionally, split (train, or one of `TEST_NAMES`) names.

    Paths are relative to the CSV's folder and must stay inside of it; they are the ids. test: another such file.
    """
    train, held = _list_manifest(path)
    if test is not None:
        first, second = _list_manifest(test)
        held = second if second.ids else first
    if not train.ids:
        raise InputError(f"{path} lists no training samples.")
    return [train, held] if held.ids else [train]


def listed(path: Path) -> FileList:
    """What a manifest names to be predicted: its test files, or else all; labels may be missing."""
    train, held = _list_manifest(path, unlabeled=True)
    return held if held.ids else train


def unlabeled(path: Path) -> FileList:
    """All files of a folder, or one file, without classes."""
    files = list(_walk(path, path.resolve())) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no files.")
    root = path if path.is_dir() else path.parent
    return FileList(root, [file.relative_to(root).as_posix() for file in files], [UNKNOWN] * len(files))


def is_manifest(path: Path, *, unlabeled: bool = False) -> bool:
    """Whether a CSV file names other files; unlabeled: with nothing beside their paths, too."""
    columns = set(header_of(path))
    return {"path", "label"} <= columns or (unlabeled and "path" in columns and columns <= {"path", "split"})


def has_class_folders(path: Path) -> bool:
    """Whether a folder's files lie in folders of their own, and not side by side."""
    return bool(_folders(path))


def _folders(path: Path) -> set[str]:
    return {entry.name for entry in _visible(path) if entry.is_dir()}


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


def _list_folder(root: Path, folder: Path) -> FileList:
    """The files of the class folders in `folder`, named relative to `root`; files beside them get the class ''."""
    found, resolved = FileList(root), root.resolve()
    above, depth = len(root.parts), len(folder.parts)
    for path in _walk(folder, resolved):
        label = path.parts[depth] if len(path.parts) > depth + 1 else ""
        found.add("/".join(path.parts[above:]), label)
    if not any(found.names):
        raise InputError(f"{folder} holds no class folders with files: give each class a folder of its own.")
    return found


def _list_manifest(path: Path, *, unlabeled: bool = False) -> tuple[FileList, FileList]:
    """The training and the test files that a CSV manifest names; unlabeled: labels may be missing."""
    folder = path.parent
    train, test, seen = FileList(folder), FileList(folder), set()
    contained = containment(folder)
    try:
        with opened(path) as (_, rows):
            columns = [name.strip().casefold() for name in next(rows, (1, []))[1]]
            at = {name: columns.index(name) for name in ("path", "label", "split") if name in columns}
            twice = next((name for name in at if columns.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path} has the column {twice} twice; one is needed.")
            for line, row in rows:
                found = {name: row[place] if place < len(row) else "" for name, place in at.items()}
                where, given = f"{path} line {line}", found["path"]
                label = found.get("label", "").strip() or UNKNOWN * unlabeled
                split = found.get("split", "").strip() or "train"
                if not given or not label:
                    raise InputError(f"{where} has no path or no label.")
                if wrong := wrong_split(split):
                    raise InputError(f"{where} {wrong}")
                name = PurePosixPath(given)
                if name.is_absolute() or ".." in name.parts or not contained(folder / name):
                    raise InputError(f"{where}: {given!r} leads out of {folder}; paths must stay inside of it.")
                if name in seen:
                    raise InputError(f"{where} names {given!r} a second time; a file can be listed only once.")
                seen.add(name)
                if len(seen) % LOOK == 0:
                    refuse_beyond_memory(path, LISTED * len(seen))
                (train if split == "train" else test).add(str(name), label)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # ValueError: bytes that are no text, and NUL in a name
        raise InputError(f"cannot read {path} as a CSV file: {error}.") from None
    if not train.ids and not test.ids:
        raise InputError(f"{path} lists no samples.")
    return train, test
