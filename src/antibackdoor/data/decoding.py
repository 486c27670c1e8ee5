"""Encoded images, wherever they lie -> Data: decoded in threads, piece by piece, all to RGB of one size."""

from __future__ import annotations

import os
import re
import threading
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from antibackdoor.data.core import Data, Rows, Spec, Splits, taken
from antibackdoor.data.packed import Block, Pack, rows_in_block
from antibackdoor.errors import InputError, leave_out

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP")
MAX_PIXELS = 64 * 2**20
LARGE, _ONE_AT_A_TIME = 4 * 2**20, threading.Lock()
"""Images of more pixels are decoded one by one: every thread with one in its hands would take half a GiB."""
MAX_SCANS = 100
"""Scans of a JPEG; honest ones have some 10, each goes over all pixels, and a scan of no change takes 12 bytes."""
MAX_SIDE = 64
LOW_BITS = 2**12
"""Images of 16 bits whose values all stay below would keep 4 bits at most, and are black to whoever reads them so."""
CHUNK, CHUNK_BYTES = 4096, 2**26
"""Images that are handed to the threads at a time, and bytes of them that may be held meanwhile."""
Size: TypeAlias = int | tuple[int, int] | None
"""That images are resized to: a side, (width, height), or the most common one."""

R = TypeVar("R")


class Encoded(NamedTuple):
    """One image. open: gives its bytes as a file, or raises what is wrong with it; held: bytes in memory until then."""

    open: Callable[[], IO[bytes]]
    held: int = 0


class Split(ABC):
    """The encoded images of one split, as many as `ids`. unreadable: how a sentence that counts some goes on."""

    ids: Sequence[str]
    unreadable: str

    @abstractmethod
    def state(self) -> Iterator[object]:
        """What the decoded images depend on: names, sizes and times of the files."""

    @abstractmethod
    def encoded(self) -> Iterator[Encoded]:
        """All images, in the order of the ids; can be called again."""

    @abstractmethod
    def numbered(self, rows: list[int], classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
        """Labels of these rows in 0..K-1, and the K class names; classes: the training set's, for a test set."""


def read_images(
    splits: Sequence[Split], where: Path, image_size: Size, skip_unreadable: bool, memory_map: bool | None
) -> Splits:
    """The training set and, if there is a second split, the test set; all images become RGB of one size.

    image_size: that size; None: the training set's most common one, each side capped at 64 pixels. memory_map: see
    `Pack`. Raises InputError for images that cannot be read (all counted, the first five named) unless skipped.
    """
    asked = box_of(image_size)
    pack = Pack(where, chain([asked], *(split.state() for split in splits)), memory_map)
    if pack.old is not None:
        size, read, bad = pack.saved()
    else:
        size = asked or _common_size(splits[0])
        # All splits are decoded before anything is refused, so that one sentence can count all that is wrong.
        decoded = [_decode_all(split, where, size, pack, number) for number, split in enumerate(splits)]
        read, bad = [x for x, _ in decoded], [found for _, found in decoded]
        pack.done(size, read, bad)
    reasons = [f"{split.ids[row]}: {found[row]}" for split, found in zip(splits, bad, strict=True) for row in found]
    total = sum(len(split.ids) for split in splits)
    leave_out(reasons, total, splits[0].unreadable.format(where), skip=skip_unreadable)
    data: list[Data] = []
    for split, x, found in zip(splits, read, bad, strict=True):
        keep = [row for row in range(len(split.ids)) if row not in found]
        if not keep:
            raise InputError(f"{where} holds no image that can be read.")
        y, classes = split.numbered(keep, data[0].spec.classes if data else None)
        spec = Spec("image", (3, size[1], size[0]), tuple(classes))
        data.append(Data(taken(x, torch.tensor(keep)) if found else x, y, spec, [split.ids[row] for row in keep]))
    return Splits(*data)


def box_of(size: Size) -> tuple[int, int] | None:
    """`(width, height)`; InputError for sides that no image has."""
    if size is None:
        return None
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 1:
        raise InputError(f"image_size={size} is not a number of pixels; give 1 or more.")
    return width, height


def _common_size(split: Split) -> tuple[int, int]:
    """The most common (width, height), each side capped; images that cannot be opened are reported when decoded."""
    counts: Counter[tuple[int, int]] = Counter()
    for chunk in _chunks(split.encoded(), CHUNK):
        counts.update(found for found in in_threads(_size, chunk) if found)
    width, height = max(counts, key=lambda found: (counts[found], found), default=(MAX_SIDE, MAX_SIDE))
    return min(width, MAX_SIDE), min(height, MAX_SIDE)


def _size(encoded: Encoded) -> tuple[int, int] | None:
    try:
        with encoded.open() as file, Image.open(file, formats=FORMATS) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:
        return None


def _decode_all(
    split: Split, where: Path, size: tuple[int, int], pack: Pack, number: int
) -> tuple[Rows, dict[int, str]]:
    """Pixels `(n, 3, H, W)` uint8 of all images, and what is wrong with those that cannot be read, by row."""
    shape, bad = (3, size[1], size[0]), dict[int, str]()
    with pack.writer(number, shape) as writer:
        writer.expect(len(split.ids), where)
        for chunk in _chunks(split.encoded(), min(CHUNK, rows_in_block(shape))):
            block = np.zeros((len(chunk), *shape), dtype=np.uint8)
            reasons = in_threads(partial(_decode, size), block, chunk)
            bad.update((row, reason) for row, reason in enumerate(reasons, writer.count) if reason)
            writer.add(block)
        return writer.rows(), bad


def _decode(size: tuple[int, int], pixels: Block, encoded: Encoded) -> str | None:
    """Put one image into its row `(3, H, W)`; what is wrong with it, if anything."""
    try:
        with encoded.open() as file:
            pixels[:] = decode_image(file.read(), size).transpose(2, 0, 1)
    except FileNotFoundError:
        return "no such file"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        return str(error).split("<_io")[0].strip(" '") or type(error).__name__
    return None


def _chunks(images: Iterator[Encoded], size: int) -> Iterator[list[Encoded]]:
    """Lists of at most `size` images; a list ends earlier where it holds more than `CHUNK_BYTES`."""
    chunk, held = list[Encoded](), 0
    for image in images:
        chunk.append(image)
        held += image.held
        if len(chunk) == size or held > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def in_threads(function: Callable[..., R], *items: Iterable[object]) -> list[R]:
    """Map in a thread pool (decoders release the interpreter lock), in order, with decoders' own warnings silenced.

    Every item waits in a queue of its own making: hand over a million in pieces.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 2)) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(function, *items))


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
