"""Samples that come one after the other out of a container (a table, a tar archive, a data set object) -> Data."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from antibackdoor.data.copies import stamp
from antibackdoor.data.core import Data, Rows, Spec, Splits
from antibackdoor.data.images import FORMATS, MAX_SIDE, Size, box_of, decode_image, in_threads
from antibackdoor.data.labels import TEST_NAMES, number
from antibackdoor.data.packed import Block, Pack
from antibackdoor.data.series import Missing, from_cases
from antibackdoor.errors import InputError, LeftOut, visible
from antibackdoor.limits import inside

CHUNK = 256
"""Encoded images in memory at a time."""
CHUNK_BYTES = 256 * 2**20
"""Bytes of encoded images in memory at a time."""
PLACES = ("data", "train", *TEST_NAMES)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Labels:
    """Labels as a container gives them: names, or numbers with the names they stand for."""

    given: Sequence[str | int]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Encoded:
    """Encoded images of one split; `read` can be called again. labels: known only once all was read; files: to read."""

    read: Callable[[], Iterator[tuple[str, bytes]]]
    labels: Callable[[], Labels]
    files: Sequence[Path]

    def state(self) -> Iterator[object]:
        """What the decoded images depend on: names, sizes and times of the files."""
        for file in self.files:
            yield str(file), stamp(file)


def images(
    train: Encoded,
    test: Encoded | None,
    where: Path,
    size: Size,
    *,
    skip_unreadable: bool = False,
    memory_map: bool | None = False,
) -> Splits:
    """Splits of encoded images, decoded in pieces; all become RGB of one size, as a folder of image files does.

    memory_map: see `Pack`. What was written before is read anew for its names and labels, but not decoded.
    """
    splits = [part for part in (train, test) if part is not None]
    asked = box_of(size)
    pack = Pack(where, chain([asked], *(part.state() for part in splits)), memory_map)
    if pack.old is not None:
        box, read, bad = pack.saved()
        ids = [[name for name, _ in part.read()] for part in splits]
    else:
        box = asked or _common_size(train.read())
        decoded = [_decode(part.read(), box, pack, split) for split, part in enumerate(splits)]
        read, bad = [x for x, _, _ in decoded], [found for _, _, found in decoded]
        ids = [names for _, names, _ in decoded]
        pack.done(box, read, bad)
    reasons = [f"{names[row]}: {found[row]}" for names, found in zip(ids, bad, strict=True) for row in found]
    if reasons:
        listed = "; ".join(reasons[:5]) + ("; ..." if len(reasons) > 5 else "")
        sentence = f"{len(reasons)} of {sum(map(len, ids))} images in {where} cannot be read ({listed})"
        if not skip_unreadable:
            raise InputError(f"{sentence}; mend or remove them, or leave them out with --skip-unreadable.")
        warnings.warn(visible(f"{sentence}; they are left out."), LeftOut, stacklevel=4)
    data: list[Data] = []
    for part, x, names, found in zip(splits, read, ids, bad, strict=True):
        y, classes = numbered(part.labels(), names, data[0].spec.classes if data else None)
        whole = Data(x, y, Spec("image", (3, box[1], box[0]), tuple(classes)), names)
        keep = torch.ones(len(names), dtype=torch.bool)
        keep[torch.tensor(list(found), dtype=torch.int64)] = False
        data.append(whole.take(keep.nonzero().squeeze(1)) if found else whole)
        if not len(data[-1]):
            raise InputError(f"{where} holds no image that can be read.")
    return Splits(*data)


def series(
    cases: Sequence[Sequence[npt.NDArray[Any]]],
    ids: Sequence[Sequence[str]],
    labels: Sequence[Labels],
    where: str,
    missing: Missing,
) -> Splits:
    """Splits of series `(T,)` or `(C, T)`, of equal length or not; training part first, test part second if any."""
    shaped = [[_as_series(case, name, where) for case, name in zip(*part, strict=True)]
              for part in zip(cases, ids, strict=True)]  # fmt: skip
    if not shaped[0]:
        raise InputError(f"{where} holds no samples.")
    placeholder = [["0"] * len(part) for part in shaped]
    test = shaped[1] if len(shaped) > 1 else None
    read = from_cases(shaped[0], placeholder[0], test, placeholder[-1], missing=missing, where=where)
    data: list[Data] = []
    for part, names, own in zip((read.train, read.test), ids, labels, strict=False):
        assert part is not None
        y, classes = numbered(own, names, data[0].spec.classes if data else None)
        data.append(replace(part, y=y, ids=list(names), spec=replace(part.spec, classes=tuple(classes))))
    return Splits(*data)


def numbered(labels: Labels, ids: Sequence[str], classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Labels `(n,)` in 0..K-1 and the class names; the container's own numbers are kept where it numbers 0..K-1.

    classes: the training set's, for a test set. Its numbers count them, unless each is the name of one.
    """
    names, texts = labels.names, [str(label) for label in labels.given]
    if all(isinstance(label, int) for label in labels.given):
        beyond = next((row for row, label in enumerate(labels.given) if not -(2**63) <= int(label) < 2**63), None)
        if beyond is not None:
            raise InputError(f"sample {ids[beyond]!r} has a label beyond 63 bits; number the classes 0..K-1.")
        numbers = np.array(labels.given, dtype=np.int64)
        distinct = np.unique(numbers).tolist()
        if names is None and classes is None and distinct == list(range(len(distinct))):
            names = [str(k) for k in distinct]
        if names is None and classes is not None and not set(texts) <= set(classes):
            names = classes
        if names is not None:
            outside = (numbers < 0) | (numbers >= len(names))
            if outside.any():
                first = int(outside.argmax())
                raise InputError(f"sample {ids[first]!r} has label {numbers[first]}, outside 0..{len(names) - 1}.")
            if len(set(names)) != len(names):
                raise InputError("two classes have the same name.")
            if classes is None or list(names) == list(classes):
                return torch.from_numpy(numbers), list(names)
            texts = [names[k] for k in numbers.tolist()]
    if classes is None:
        return number(texts, ids)
    y, order = number(texts, ids, sorted(classes))
    return torch.tensor([list(classes).index(name) for name in order])[y], list(classes)


def _as_series(case: npt.NDArray[Any], name: str, where: str) -> npt.NDArray[np.float64]:
    if case.ndim not in (1, 2) or case.dtype.kind not in "fiu" or 0 in case.shape:
        raise InputError(
            f"{where}: sample {name!r} is no series: numbers of shape (length,) or (channels, length) are needed, "
            f"got {case.dtype} of shape {case.shape}."
        )
    return np.atleast_2d(case).astype(np.float64)


def _common_size(records: Iterator[tuple[str, bytes]]) -> tuple[int, int]:
    """The most common (width, height), each side capped as for image files."""
    counts: Counter[tuple[int, int]] = Counter()
    for _, encoded in records:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(BytesIO(encoded), formats=FORMATS) as image:
                    counts[image.size] += 1
        except MemoryError:
            raise
        except Exception:  # reported when it is decoded
            continue
    width, height = max(counts, key=lambda found: (counts[found], found), default=(MAX_SIDE, MAX_SIDE))
    return min(width, MAX_SIDE), min(height, MAX_SIDE)


def _decode(
    records: Iterator[tuple[str, bytes]], size: tuple[int, int], pack: Pack, split: int
) -> tuple[Rows, list[str], dict[int, str]]:
    """Pixels `(n, 3, H, W)`, ids, and what is wrong with those that cannot be read, by row."""
    shape, ids, bad = (3, size[1], size[0]), list[str](), dict[int, str]()

    def decode(record: tuple[str, bytes]) -> Block | str:
        try:
            return decode_image(record[1], size)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they like on damaged data
            return str(error).split("<_io")[0].strip() or type(error).__name__

    with pack.writer(split, shape) as writer:
        for chunk in chunks(records, CHUNK, lambda record: len(record[1])):
            writer.expect(len(chunk), f"the images up to {chunk[-1][0]!r}")
            block = np.zeros((len(chunk), *shape), dtype=np.uint8)
            for row, pixels in enumerate(in_threads(decode, chunk)):
                if isinstance(pixels, str):
                    bad[len(ids) + row] = pixels
                else:
                    block[row] = pixels.transpose(2, 0, 1)
            writer.add(block)
            ids += [name for name, _ in chunk]
        return writer.rows(), ids, bad


def found_in(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """Files with these endings in a folder and in folders of it that hold data or splits; links must not lead out."""
    for place in (folder, *(folder / name for name in PLACES)):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix.lower() in endings and file.is_file():
                yield inside(file, folder)


def chunks(items: Iterable[Item], size: int, weigh: Callable[[Item], int] = lambda _: 0) -> Iterator[list[Item]]:
    """Lists of at most `size` items; a list ends earlier where its items weigh more than `CHUNK_BYTES` together."""
    chunk, weight = list[Item](), 0
    for item in items:
        chunk.append(item)
        weight += weigh(item)
        if len(chunk) == size or weight > CHUNK_BYTES:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk
