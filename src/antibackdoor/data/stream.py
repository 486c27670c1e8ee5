"""Samples that come one after the other out of a container (a table, a tar archive, a data set object) -> Data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antibackdoor.data.copies import stamp
from antibackdoor.data.core import Data, Splits
from antibackdoor.data.decoding import Encoded, Size, Split, read_images
from antibackdoor.data.labels import TEST_NAMES, number
from antibackdoor.data.series import Missing, from_cases, refuse_image_options
from antibackdoor.errors import InputError
from antibackdoor.limits import inside

PLACES = ("data", "train", *TEST_NAMES)


@dataclass(frozen=True)
class Labels:
    """Labels as a container gives them: names, or numbers with the names they stand for."""

    given: Sequence[str | int]
    names: Sequence[str] | None = None


class Container(Split):
    """One split in the files of a container: encoded images or series; every pass reads them anew.

    Ids and labels are known before any sample is read.
    """

    unreadable = "images in {} cannot be read"
    files: Sequence[Path]
    labels: Labels
    image: bool

    @abstractmethod
    def images(self) -> Iterator[bytes]:
        """All images as they are encoded."""

    @abstractmethod
    def cases(self) -> Iterator[npt.NDArray[Any]]:
        """All series, `(T,)` or `(C, T)`."""

    def state(self) -> Iterator[object]:
        """Names, sizes and times of the files."""
        for file in self.files:
            yield str(file), stamp(file)

    def encoded(self) -> Iterator[Encoded]:
        """The images, held in memory from here on."""
        return (Encoded(partial(BytesIO, image), len(image)) for image in self.images())

    def numbered(self, rows: list[int], classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
        """The container tells the classes, whichever images of it can be read."""
        y, names = numbered(self.labels, self.ids, classes)
        return y[torch.tensor(rows)], names


def read_container(
    splits: Sequence[Container], where: Path, image_size: Size, missing: Missing, skip: bool, memory_map: bool | None
) -> Splits:
    """Splits of images, as a folder of image files gives them, or of series; training part first, test part if any."""
    if len({split.image for split in splits}) > 1:
        raise InputError(f"{where}: one of training and test set holds images, the other series.")
    if splits[0].image:
        return read_images(splits, where, image_size, skip, memory_map)
    refuse_image_options(where, image_size, memory_map)
    cases = [list(split.cases()) for split in splits]
    return series(cases, [split.ids for split in splits], [split.labels for split in splits], str(where), missing)


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
    read = from_cases(shaped[0], placeholder[0], test, placeholder[-1], missing=missing, where=where, ids=ids)
    data: list[Data] = []
    for part, names, own in zip((read.train, read.test), ids, labels, strict=False):
        assert part is not None
        y, classes = numbered(own, names, data[0].spec.classes if data else None)
        data.append(replace(part, y=y, spec=replace(part.spec, classes=tuple(classes))))
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


def found_in(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """Files with these endings in a folder and in folders of it that hold data or splits; links must not lead out."""
    for place in (folder, *(folder / name for name in PLACES)):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix.lower() in endings and file.is_file():
                yield inside(file, folder)
