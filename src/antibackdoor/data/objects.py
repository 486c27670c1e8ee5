"""Any torch `Dataset` -> Splits: its samples are taken once, as they come, and kept as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from antibackdoor.data.core import Data, Spec, Splits
from antibackdoor.data.decoding import Size, box_of
from antibackdoor.data.series import Missing
from antibackdoor.data.stream import Labels, numbered, series
from antibackdoor.errors import InputError

SAMPLES = ("image", "x", "series", "data", "inputs")
LABELS = ("label", "y", "labels", "target")
PROBED = 8


def load_dataset(
    dataset: Dataset[Any], *, test: Dataset[Any] | None = None, image_size: Size = None, missing: Missing = "refuse"
) -> Splits:
    """The samples of a torch `Dataset` or `IterableDataset`: pairs (sample, label), or dicts with such keys.

    Images are PIL images, uint8 `(C, H, W)`, `(H, W, C)` or `(H, W)`, or floats `(C, H, W)` in [0, 1]; all of one size
    unless `image_size` is given. Series are floats `(C, T)` or `(T,)`, of equal length or not. Labels are whole
    numbers or names; `dataset.classes`, where there is one, names the numbers. Ids are row numbers.
    Raises InputError for samples that are neither, that differ in shape, or that change from one look to the next: a
    data set with random augmentation has no samples to name.
    """
    parts = [_Part(dataset, "training set", image_size)]
    if test is not None:
        parts.append(_Part(test, "test set", image_size))
    if len({part.image for part in parts}) > 1:
        raise InputError("one of training and test set holds images, the other series.")
    if not parts[0].image:
        if image_size is not None:
            raise InputError("the data set holds series; image_size is for images.")
        rows, ids, labels = ([getattr(part, name) for part in parts] for name in ("rows", "ids", "labels"))
        return series(rows, ids, labels, "the data set", missing)
    data: list[Data] = []
    for part in parts:
        y, classes = numbered(part.labels, part.ids, data[0].spec.classes if data else None)
        x = part.pixels()
        data.append(Data(x, y, Spec("image", tuple(x.shape[1:]), tuple(classes)), part.ids))
    return Splits(*data)


class _Part:
    """One split, read to its end."""

    def __init__(self, dataset: Dataset[Any], what: str, size: Size):
        self.what, self.box = what, box_of(size)
        self.rows: list[npt.NDArray[Any]] = []
        given: list[str | int] = []
        for row, item in enumerate(_items(dataset)):
            sample, label = _pair(item, row, what)
            self.rows.append(self._decoded(sample, row))
            given.append(_label(label, row, what))
        if not self.rows:
            raise InputError(f"the {what} holds no samples.")
        self.image = self.rows[0].dtype == np.uint8
        if any((row.dtype == np.uint8) != self.image for row in self.rows):
            raise InputError(f"the {what} holds images and series; a set must be of one kind.")
        self._check_steady(dataset)
        self.ids = [str(row) for row in range(len(self.rows))]
        names = getattr(dataset, "classes", None)
        named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        self.labels = Labels(given, list(names) if named and isinstance(names, list | tuple) else None)

    def pixels(self) -> Tensor:
        """All images `(n, C, H, W)` uint8."""
        shapes = {row.shape for row in self.rows}
        if len(shapes) > 1:
            raise InputError(
                f"the images of the {self.what} have different shapes ({', '.join(map(str, sorted(shapes)[:3]))}); "
                "resize them in the data set, or give image_size."
            )
        return torch.from_numpy(np.stack(self.rows))

    def _check_steady(self, dataset: Dataset[Any]) -> None:
        again = [_pair(item, row, self.what)[0] for row, item in enumerate(islice(_items(dataset), PROBED))]
        for row, sample in enumerate(again):
            if not np.array_equal(self._decoded(sample, row), self.rows[row], equal_nan=not self.image):
                raise InputError(
                    f"sample {row} of the {self.what} differs from one look to the next; give the data set without "
                    "random augmentation (training augments by itself)."
                )

    def _decoded(self, sample: Any, row: int) -> npt.NDArray[Any]:
        """uint8 `(C, H, W)` or float64 `(C, T)`."""
        if isinstance(sample, Image.Image):
            rgb = sample.convert("RGB")
            if self.box is not None:
                rgb = rgb.resize(self.box, Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
        array = sample.detach().cpu().numpy() if isinstance(sample, Tensor) else np.asarray(sample)
        where = f"sample {row} of the {self.what}"
        if array.dtype == np.uint8 and array.ndim == 2:
            array = array[None]
        if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
            array = array.transpose(2, 0, 1)
        if array.ndim == 3 and array.shape[0] in (1, 3) and (array.dtype == np.uint8 or array.dtype.kind == "f"):
            if array.dtype != np.uint8:
                if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
                    raise InputError(f"{where} is outside [0, 1]; give images without normalization.")
                array = np.round(array * 255).astype(np.uint8)
            return self._resized(np.ascontiguousarray(array))
        if array.ndim in (1, 2) and array.dtype.kind == "f" and array.size:
            return np.atleast_2d(array).astype(np.float64)
        raise InputError(
            f"{where} is neither an image (PIL, uint8, or float (C, H, W) in [0, 1]) nor a series (float (C, T)): "
            f"{array.dtype} of shape {array.shape}."
        )

    def _resized(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self.box is None:
            return pixels
        planes = [np.asarray(Image.fromarray(plane).resize(self.box, Image.Resampling.BILINEAR)) for plane in pixels]
        return np.stack(planes)


def _items(dataset: Dataset[Any]) -> Iterator[Any]:
    """By number where the data set has a length: iterating such a one relies on its IndexError at the end.

    InputError for what programs take for data, and that has no samples one by one: None, a table, a dictionary.
    """
    by_name = isinstance(dataset, Mapping | pd.DataFrame | pd.Series)
    if by_name or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        raise InputError(
            f"{type(dataset).__name__} is no data set: give a path, the name of a set, or a torch Dataset, "
            "whose samples are pairs (sample, label)."
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[row] for row in range(len(dataset)))
    return iter(dataset)


def _pair(item: Any, row: int, what: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        x = next((item[name] for name in SAMPLES if name in item), None)
        y = next((item[name] for name in LABELS if name in item), None)
        if x is not None and y is not None:
            return x, y
    elif isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise InputError(f"sample {row} of the {what} is no pair (sample, label), but {type(item).__name__}.")


def _label(label: Any, row: int, what: str) -> str | int:
    value = label.item() if isinstance(label, Tensor | np.ndarray | np.generic) and np.ndim(label) == 0 else label
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"the label of sample {row} of the {what} is no whole number and no name: {value!r:.60}.")
    return value
