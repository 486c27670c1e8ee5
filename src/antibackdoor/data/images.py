"""Image files -> Data: a folder of class folders, or a CSV manifest."""

from __future__ import annotations

import csv
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from antibackdoor.data.core import Data, Spec, Splits
from antibackdoor.data.labels import number
from antibackdoor.errors import InputError, visible
from antibackdoor.limits import MAX_TEXT, containment, read_bytes, refuse_beyond_memory, refuse_special

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP")
MAX_PIXELS = 64 * 2**20
LARGE, _ONE_AT_A_TIME = 4 * 2**20, threading.Lock()
"""Images of more pixels are decoded one by one: every thread with one in its hands would take half a GiB."""
MAX_SIDE = 64
MAX_DEPTH = 64
TEST_NAMES = ("test", "val", "valid")
CLUTTER = {"thumbs.db", "desktop.ini"}

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Listing:
    """Files that are to be read: their paths, their stable names, their class names."""

    paths: list[Path] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, path: Path, name: str, label: str) -> None:
        """One more file."""
        self.paths.append(path)
        self.ids.append(name)
        self.names.append(label)


def load_folder(
    root: Path,
    *,
    test: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    skip_unreadable: bool = False,
) -> Splits:
    """A folder of class folders, or one that holds `train` and `test` (or `val`, `valid`) folders of them.

    Classes are the folder names in plain text order; ids are paths relative to the folder. All images become RGB of one
    size: `image_size` squared (or a width and a height) or, if None, the training set's most common size with each side
    capped at 64 pixels.
    Raises InputError for files that are no readable images (all counted, the first five named) unless
    `skip_unreadable`, and for links that lead out of the folder.
    """
    inside = {entry.name for entry in _visible(root) if entry.is_dir()}
    split = "train" in inside and inside <= {"train", *TEST_NAMES} and any(e.is_dir() for e in _visible(root / "train"))
    train = _list_folder(root, root / "train" if split else root)
    held = None
    if test is not None:
        held = _list_folder(test, test)
    elif split and (name := next((name for name in TEST_NAMES if name in inside), None)):
        held = _list_folder(root, root / name)
    return _read_splits(train, held, root, image_size, skip_unreadable)


def load_manifest(
    path: Path,
    *,
    test: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    skip_unreadable: bool = False,
) -> Splits:
    """A CSV file with the columns path, label and, optionally, split (train, test, val or valid).

    Paths are relative to the CSV's folder and must stay inside of it; they are the ids. Sizes, classes and errors as
    for `load_folder`.
    """
    train, held = _list_manifest(path)
    if test is not None:
        first, second = _list_manifest(test)
        held = second if second.paths else first
    return _read_splits(train, held if held.paths else None, path, image_size, skip_unreadable)


def has_class_folders(path: Path) -> bool:
    """Whether a folder's images lie in folders of their own, and not side by side."""
    return any(entry.is_dir() for entry in _visible(path))


def load_unlabeled(path: Path, size: tuple[int, int], *, skip_unreadable: bool = False) -> tuple[Tensor, list[str]]:
    """Images without labels, from one folder or one file: `(n, 3, H, W)` uint8 of `size` (width, height), and ids.

    Raises InputError for files that are no readable images, unless `skip_unreadable`.
    """
    files = list(_walk(path, path.resolve())) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no images.")
    listing = Listing(files, [file.name for file in files], ["?"] * len(files))
    data = _read_all([listing], path, size, skip_unreadable)[0]
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
    found, resolved = Listing(), root.resolve()
    above, depth = len(root.parts), len(folder.parts)
    for path in _walk(folder, resolved):
        label = path.parts[depth] if len(path.parts) > depth + 1 else ""
        found.add(path, "/".join(path.parts[above:]), label)
    if not any(found.names):
        raise InputError(f"{folder} holds no class folders with images: give each class a folder of its own.")
    return found


def _list_manifest(path: Path) -> tuple[Listing, Listing]:
    """The training and the test files that a CSV manifest names."""
    folder, train, test, seen = path.parent, Listing(), Listing(), set()
    contained = containment(folder)
    refuse_special(path, MAX_TEXT)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = set(rows.fieldnames or ())
            if not {"path", "label"} <= columns:
                raise InputError(
                    f"{path} needs a header line with the columns path and label; "
                    f"it has {', '.join(sorted(columns)) or 'none'}."
                )
            for row in rows:
                where, given = f"{path} line {rows.line_num}", row["path"] or ""
                split = (row["split"] or "") if "split" in columns else "train"
                if not given or not row["label"]:
                    raise InputError(f"{where} has no path or no label.")
                if split != "train" and split not in TEST_NAMES:
                    raise InputError(f"{where} has the split {split!r}; known: train, {', '.join(TEST_NAMES)}.")
                name = PurePosixPath(given)
                if name.is_absolute() or ".." in name.parts or not contained(folder / name):
                    raise InputError(f"{where}: {given!r} leads out of {folder}; paths must stay inside of it.")
                if name in seen:
                    raise InputError(f"{where} names {given!r} a second time; a file can be listed only once.")
                seen.add(name)
                (train if split == "train" else test).add(folder / name, str(name), row["label"])
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # ValueError: bytes that are no text, and NUL in a name
        raise InputError(f"cannot read {path} as a CSV file: {error}.") from None
    if not train.paths and not test.paths:
        raise InputError(f"{path} lists no images.")
    return train, test


def _read_splits(
    train: Listing, test: Listing | None, where: Path, image_size: int | tuple[int, int] | None, skip: bool
) -> Splits:
    if not train.paths:
        raise InputError(f"{where} lists no training images.")
    if isinstance(image_size, int) and image_size < 1:
        raise InputError(f"image_size={image_size} is not a number of pixels; give 1 or more.")
    listings = [train] if test is None or not test.paths else [train, test]
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    return Splits(*_read_all(listings, where, image_size or _common_size(train.paths), skip))


def _read_all(listings: Sequence[Listing], where: Path, size: tuple[int, int], skip: bool) -> list[Data]:
    refuse_beyond_memory(where, 3 * size[0] * size[1] * sum(len(listing.paths) for listing in listings))
    # All splits are decoded before anything is refused, so that one sentence can count all that is wrong.
    read = [_decode_all(listing, size) for listing in listings]
    failures = [failure for _, bad in read for failure in bad.values()]
    if failures:
        listed = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
        total = sum(len(listing.paths) for listing in listings)
        sentence = f"{len(failures)} of {total} files in {where} cannot be read as images ({listed})"
        if not skip:
            raise InputError(f"{sentence}; mend or remove them, or leave them out with --skip-unreadable.")
        warnings.warn(visible(f"{sentence}; they are left out."), UserWarning, stacklevel=4)
    data: list[Data] = []
    for listing, (x, bad) in zip(listings, read, strict=True):
        keep = [i for i in range(len(x)) if i not in bad]
        if not keep:
            raise InputError(f"{where} holds no image that can be read.")
        ids, names = [listing.ids[i] for i in keep], [listing.names[i] for i in keep]
        y, classes = number(names, ids, data[0].spec.classes if data else None)
        spec = Spec("image", (3, size[1], size[0]), tuple(classes))
        data.append(Data(x[torch.tensor(keep)] if bad else x, y, spec, ids))
    return data


def _common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """The most common (width, height), each side capped; files that cannot be opened are reported when decoded."""

    def size(path: Path) -> tuple[int, int] | None:
        try:
            refuse_special(path)
            with Image.open(path, formats=FORMATS) as image:
                return image.size
        except Exception:
            return None

    counts = Counter(found for found in in_threads(size, paths) if found)
    width, height = max(counts, key=lambda found: (counts[found], found), default=(MAX_SIDE, MAX_SIDE))
    return min(width, MAX_SIDE), min(height, MAX_SIDE)


def _decode_all(listing: Listing, size: tuple[int, int]) -> tuple[Tensor, dict[int, str]]:
    """Pixels `(n, 3, H, W)` uint8 of all files, and what is wrong with those that cannot be read, by row."""
    x = torch.zeros((len(listing.paths), 3, size[1], size[0]), dtype=torch.uint8)
    out = x.numpy()

    def decode(row: int) -> str | None:
        path = listing.paths[row]
        if not listing.names[row]:
            return "it is in no class folder"
        if path.suffix.lower() not in EXTENSIONS:
            return "not an image file by its name"
        try:
            out[row] = decode_image(read_bytes(path), size).transpose(2, 0, 1)
        except FileNotFoundError:
            return "no such file"
        except Exception as error:  # decoders raise whatever they like on damaged files
            return str(error).split("<_io")[0].strip(" '") or type(error).__name__
        return None

    reasons = in_threads(decode, range(len(x)))
    return x, {row: f"{listing.ids[row]}: {reason}" for row, reason in enumerate(reasons) if reason}


def decode_image(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    """One image file's bytes -> RGB `(H, W, 3)` uint8 of `size` (width, height); raises on damaged or huge files.

    EXIF orientation is not applied: the field's training pipelines do not, and turning some images would make a set
    differ from what others measured on it. Transparency is dropped.
    """
    image = Image.open(BytesIO(encoded), formats=FORMATS)
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS}")
    with _ONE_AT_A_TIME if pixels > LARGE else nullcontext():
        return _decoded(image, encoded, size)


def _decoded(image: Image.Image, encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    if image.format == "PNG":  # the one format with checksums; decoding skips them, and verifying spends the object
        image.verify()
        image = Image.open(BytesIO(encoded), formats=FORMATS)
    if image.mode.startswith("I"):  # 16 bits: convert() would clip them to 255
        rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return np.asarray(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BILINEAR))


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map in a thread pool (decoders release the interpreter lock), in order, with decoders' own warnings silenced."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 2)) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(function, items))
