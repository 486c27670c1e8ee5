"""Image files -> Data: a folder of class folders, or a CSV manifest."""

from __future__ import annotations

import csv
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from antibackdoor.data.copies import stamp
from antibackdoor.data.core import Data, Rows, Spec, Splits, taken
from antibackdoor.data.labels import TEST_NAMES, number
from antibackdoor.data.packed import Block, Pack, rows_in_block
from antibackdoor.errors import InputError, LeftOut, visible
from antibackdoor.limits import MAX_TEXT, containment, read_bytes, refuse_special

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP")
MAX_PIXELS = 64 * 2**20
LARGE, _ONE_AT_A_TIME = 4 * 2**20, threading.Lock()
"""Images of more pixels are decoded one by one: every thread with one in its hands would take half a GiB."""
MAX_SCANS = 100
"""Scans of a JPEG; honest ones have some 10, each goes over all pixels, and a scan of no change takes 12 bytes."""
MAX_SIDE = 64
MAX_DEPTH = 64
LOW_BITS = 2**12
"""Images of 16 bits whose values all stay below would keep 4 bits at most, and are black to whoever reads them so."""
FILES = 4096
"""Files that are handed to the threads at a time."""
Size: TypeAlias = int | tuple[int, int] | None
"""That images are resized to: a side, (width, height), or the most common one."""
CLUTTER = {"thumbs.db", "desktop.ini"}

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Listing:
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
        """What the decoded images depend on: names, sizes and times of the files."""
        for row, name in enumerate(self.ids):
            try:
                yield name, self.names[row] == "", stamp(self.path(row))
            except (OSError, ValueError):  # ValueError: a NUL in a name
                yield name, None


def box_of(size: Size) -> tuple[int, int] | None:
    """`(width, height)`; InputError for sides that no image has."""
    if size is None:
        return None
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 1:
        raise InputError(f"image_size={size} is not a number of pixels; give 1 or more.")
    return width, height


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
    train = _list_folder(root, root / "train" if split else root)
    held = None
    if test is not None:
        held = _list_folder(test, test)
    elif split and (names := [name for name in TEST_NAMES if name in inside]):
        held = _list_folder(root, root / names[0])
        for name in names[1:]:
            warnings.warn(
                visible(f"{root / name} is not read: the test set is {root / names[0]}."), LeftOut, stacklevel=4
            )
    return _read_splits(train, held, root, image_size, skip_unreadable, memory_map)


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
    return _read_splits(train, held if held.ids else None, path, image_size, skip_unreadable, memory_map)


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
    data = _read_all([listing], path, size, skip_unreadable, memory_map=False)[0]
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


def _read_splits(
    train: Listing,
    test: Listing | None,
    where: Path,
    image_size: Size,
    skip: bool,
    memory_map: bool | None,
) -> Splits:
    if not train.ids:
        raise InputError(f"{where} lists no training images.")
    listings = [train] if test is None or not test.ids else [train, test]
    return Splits(*_read_all(listings, where, box_of(image_size), skip, memory_map))


def _read_all(
    listings: Sequence[Listing], where: Path, size: tuple[int, int] | None, skip: bool, memory_map: bool | None
) -> list[Data]:
    pack = Pack(where, chain([size], *(listing.state() for listing in listings)), memory_map)
    if pack.old is not None:
        box, read, bad = pack.saved()
    else:
        box = size or _common_size(listings[0])
        # All splits are decoded before anything is refused, so that one sentence can count all that is wrong.
        decoded = [_decode_all(listing, where, box, pack, split) for split, listing in enumerate(listings)]
        read, bad = [x for x, _ in decoded], [found for _, found in decoded]
        pack.done(box, read, bad)
    failures = [
        f"{listing.ids[row]}: {found[row]}" for listing, found in zip(listings, bad, strict=True) for row in found
    ]
    if failures:
        listed = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
        total = sum(len(listing.ids) for listing in listings)
        sentence = f"{len(failures)} of {total} files in {where} cannot be read as images ({listed})"
        if not skip:
            raise InputError(f"{sentence}; mend or remove them, or leave them out with --skip-unreadable.")
        warnings.warn(visible(f"{sentence}; they are left out."), LeftOut, stacklevel=4)
    data: list[Data] = []
    for listing, x, found in zip(listings, read, bad, strict=True):
        keep = [i for i in range(len(x)) if i not in found]
        if not keep:
            raise InputError(f"{where} holds no image that can be read.")
        ids, names = ([part[i] for i in keep] if found else part for part in (listing.ids, listing.names))
        y, classes = number(names, ids, data[0].spec.classes if data else None)
        spec = Spec("image", (3, box[1], box[0]), tuple(classes))
        data.append(Data(taken(x, torch.tensor(keep)) if found else x, y, spec, ids))
    return data


def _common_size(listing: Listing) -> tuple[int, int]:
    """The most common (width, height), each side capped; files that cannot be opened are reported when decoded."""

    def size(row: int) -> tuple[int, int] | None:
        try:
            refuse_special(listing.path(row))
            with Image.open(listing.path(row), formats=FORMATS) as image:
                return image.size
        except MemoryError:
            raise
        except Exception:
            return None

    counts: Counter[tuple[int, int]] = Counter()
    for rows in pieces(len(listing.ids), FILES):
        counts.update(found for found in in_threads(size, rows) if found)
    width, height = max(counts, key=lambda found: (counts[found], found), default=(MAX_SIDE, MAX_SIDE))
    return min(width, MAX_SIDE), min(height, MAX_SIDE)


def _decode_all(
    listing: Listing, where: Path, size: tuple[int, int], pack: Pack, split: int
) -> tuple[Rows, dict[int, str]]:
    """Pixels `(n, 3, H, W)` uint8 of all files, and what is wrong with those that cannot be read, by row."""
    shape, bad = (3, size[1], size[0]), dict[int, str]()
    with pack.writer(split, shape) as writer:
        writer.expect(len(listing.ids), where)
        for rows in pieces(len(listing.ids), min(FILES, rows_in_block(shape))):
            block = np.zeros((len(rows), *shape), dtype=np.uint8)
            reasons = in_threads(partial(_decode_file, listing, size, block, rows.start), rows)
            bad.update((row, reason) for row, reason in zip(rows, reasons, strict=True) if reason)
            writer.add(block)
        return writer.rows(), bad


def _decode_file(listing: Listing, size: tuple[int, int], block: Block, first: int, row: int) -> str | None:
    """Put one file into its row of the block, which begins with the row `first`; what is wrong with it, if anything."""
    path = listing.path(row)
    if not listing.names[row]:
        return "it is in no class folder"
    if path.suffix.lower() not in EXTENSIONS:
        return "not an image file by its name"
    try:
        block[row - first] = decode_image(read_bytes(path), size).transpose(2, 0, 1)
    except FileNotFoundError:
        return "no such file"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        return str(error).split("<_io")[0].strip(" '") or type(error).__name__
    return None


def decode_image(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    """One image file's bytes -> RGB `(H, W, 3)` uint8 of `size` (width, height); raises on damaged or huge files.

    EXIF orientation is not applied: the field's training pipelines do not, and turning some images would make a set
    differ from what others measured on it. Transparency is dropped.
    """
    image = Image.open(BytesIO(encoded), formats=FORMATS)
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS}")
    scans = _scans(encoded) if encoded.startswith(b"\xff\xd8") else 1
    if scans > MAX_SCANS or scans * pixels > 6 * MAX_PIXELS:
        raise ValueError(f"{scans} scans of {image.width}x{image.height} pixels are more than any honest JPEG has")
    with _ONE_AT_A_TIME if pixels > LARGE else nullcontext():
        return _decoded(image, encoded, size)


MARKER = re.compile(rb"\xff+([\x01-\xfe])")
ALONE = frozenset(bytes([code]) for code in (0x01, *range(0xD0, 0xD9)))
"""Markers of a JPEG without a length: nothing follows them."""


def _scans(encoded: bytes) -> int:
    """How many times a JPEG goes over its pixels: its segments, walked up to its end, one by one."""
    place = scans = 0
    while (found := MARKER.search(encoded, place)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        place = found.end()
        if found[1] not in ALONE:
            place += int.from_bytes(encoded[place : place + 2], "big")
    return scans


def _decoded(image: Image.Image, encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    if image.format == "PNG":  # the one format with checksums; decoding skips them, and verifying spends the object
        image.verify()
        image = Image.open(BytesIO(encoded), formats=FORMATS)
    if image.mode.startswith("I"):  # 16 bits: convert() would clip them to 255
        deep = np.asarray(image)
        if 0 < deep.max() < LOW_BITS:
            raise ValueError(f"of 16 bits it uses values up to {deep.max()} only; scale it to 65535, or save 8 bits")
        rgb = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return np.asarray(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BILINEAR))


def pieces(n: int, size: int) -> Iterator[range]:
    """Row numbers 0..n-1 in pieces."""
    return (range(start, min(n, start + size)) for start in range(0, n, size))


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map in a thread pool (decoders release the interpreter lock), in order, with decoders' own warnings silenced.

    Every item waits in a queue of its own making: hand over a million in pieces.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 2)) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(function, items))
