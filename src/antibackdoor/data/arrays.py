"""`.npz` files <-> Splits, in memory or read from disk as needed."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from antibackdoor.data.copies import keep_rows
from antibackdoor.data.core import Data, Rows, Spec, Splits
from antibackdoor.data.npy import Array, Header, open_member, read_member
from antibackdoor.data.series import Missing, bounds, clean
from antibackdoor.errors import InputError
from antibackdoor.files import atomically
from antibackdoor.limits import MAX_CLASSES, refuse_beyond_memory, refuse_bomb, refuse_rows, refuse_special

CHUNK = 4096
MAX_NUMBERED = 10_000
"""Classes of a set that does not name them."""
LISTS = {
    "y": ("iu", "one integer for each sample (number the classes 0..K-1)"),
    "ids": ("Uiu", "one name, text or a whole number, for each sample"),
    "lengths": ("iu", "one integer for each sample"),
    "classes": ("Uiu", "a list of different names, one for each label"),
}
"""Arrays of one axis beside the samples: their types, as numpy abbreviates them, and what they are."""


def load_npz(path: Path, *, test: Path | None = None, missing: Missing = "refuse", memory_map: bool = False) -> Splits:
    """An `.npz` with x_train, y_train[, x_test, y_test], or x, y; and, where wanted, classes, lengths, ids.

    Images are uint8 `(n, H, W, 1 or 3)` and become `(n, C, H, W)`; series are float32 or float64 `(n, C, T)` or
    `(n, T)`, shorter ones with a NaN tail or with `lengths_train`, `lengths_test`, and become float32 with a zero tail.
    Labels are integers 0..K-1; without `classes` the classes are named "0".."K-1". Pickled objects are never read.
    test: another `.npz` to take the test set from (its test part if it has one, else its only part).
    memory_map: copy the samples once to the cache folder, unpacked and cleaned, and read them from there.
    Raises InputError for anything that does not fit.
    """
    train = _Part(path, ("train", ""), missing, memory_map)
    held = _Part(test, ("test", "", "train"), missing, memory_map) if test else None
    if held is None and train.has("x_test"):
        held = _Part(path, ("test",), missing, memory_map)
    first = train.read(None)
    if held is None:
        return Splits(first)
    second = held.read(first.spec)
    if (first.lengths is None) != (second.lengths is None):
        first, second = _with_lengths(first), _with_lengths(second)
    return Splits(first, second)


def load_samples_npz(path: Path, missing: Missing = "refuse") -> tuple[Data, bool]:
    """The samples of an `.npz` (its test part if it has one, else its only part), and whether they have labels."""
    part = _Part(path, ("test", "", "train"), missing, memory_map=False, labeled=False)
    return part.read(None), part.labeled


NO_MIRROR = "no_mirror"
"""An array of this name, whatever it holds, says that training must not mirror the images."""


def write_npz(path: Path, splits: Splits) -> None:
    """Write such a file atomically, ids and value range kept: reading it again gives the same fingerprints."""
    _write(path, {"train": splits.train, "test": splits.test})


def write_part(path: Path, data: Data) -> None:
    """Write one set atomically, as x, y, ids and so on."""
    _write(path, {"": data})


def _write(path: Path, parts: Mapping[str, Data | None]) -> None:
    members: dict[str, Array] = {}
    for suffix, data in parts.items():
        if data is None:
            continue
        spec, key = data.spec, partial(_Part._key, suffix=suffix)
        members["classes"] = np.asarray(spec.classes, dtype=np.str_)
        if not spec.mirror:
            members[NO_MIRROR] = np.array(True)
        if spec.kind == "series":
            members["value_range"] = np.array([spec.low, spec.high])
        x = torch.cat([data.x[rows].cpu() for rows in data.chunks()]).numpy() if len(data) else np.empty(data.x.shape)
        members[key("x")] = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if spec.kind == "image" else x
        members[key("y")] = data.y.cpu().numpy()
        members[key("ids")] = np.asarray(data.ids, dtype=np.str_)
        if data.lengths is not None:
            members[key("lengths")] = data.lengths.cpu().numpy()

    def write(part: Path) -> None:
        with part.open("wb") as file:  # given a path, savez would append .npz to it
            np.savez(file, allow_pickle=False, **members)

    atomically(path, write)


@dataclass(frozen=True)
class _Raw:
    """An array as the file holds it, to be read from its first row to its last: `blocks()`, a few MB at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[Array]]

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def step(self) -> int:
        """Rows in a block."""
        return _step(self.shape, self.dtype)


def _step(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return max(1, min(CHUNK, 2**25 // max(1, math.prod(shape[1:]) * dtype.itemsize)))


class _Part:
    """One split of one file; without labels, where there need be none, all are 0."""

    def __init__(
        self, path: Path, suffixes: Sequence[str], missing: Missing, memory_map: bool, *, labeled: bool = True
    ):
        refuse_special(path)
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is not an .npz file (a zip of arrays, as numpy.savez writes it).")
        self.path, self.missing, self.memory_map = path, missing, memory_map
        with _reading(path), zipfile.ZipFile(path) as archive:
            refuse_bomb(path)
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}
        needed = ("x", "y") if labeled else ("x",)
        found = [suffix for suffix in suffixes if all(self.has(self._key(name, suffix)) for name in needed)]
        if not found:
            wanted = "x_train and y_train, or x and y" if labeled else "x, x_test or x_train"
            raise InputError(
                f"{path} needs the arrays {wanted}; it holds {', '.join(sorted(self.names)) or 'nothing'}."
            )
        self.suffix = found[0]
        self.labeled = self.has(self.key("y"))
        used = (*map(self.key, ("x", "y", "ids", "lengths")), "classes", "value_range")
        self.headers = {name: self._header(name) for name in used if self.has(name)}
        self._check()

    @staticmethod
    def _key(name: str, suffix: str) -> str:
        return f"{name}_{suffix}" if suffix else name

    def has(self, name: str) -> bool:
        return name in self.names

    def key(self, name: str) -> str:
        return self._key(name, self.suffix)

    def _header(self, name: str) -> Header:
        with _reading(self.path, name), open_member(self.path, name) as (header, _):
            return header

    def _check(self) -> None:
        """Whether the arrays fit together by what they declare; nothing is made of them before."""
        x, where = self.headers[self.key("x")], f"{self.path}: {self.key('x')}"
        if not x.shape:
            raise InputError(f"{where} is a single number, not one sample for each label.")
        for name, (kinds, wanted) in LISTS.items():
            key = name if name == "classes" else self.key(name)
            if (told := self.headers.get(key)) is None:
                continue
            if told.dtype.kind not in kinds or len(told.shape) != 1:
                raise InputError(f"{self.path}: {key} must be {wanted}; got {told.dtype} of shape {told.shape}.")
            if name == "classes" and told.rows > MAX_CLASSES:
                raise InputError(f"{self.path}: {told.rows:,} classes are more than the {MAX_CLASSES:,} there may be.")
            if name != "classes" and told.rows != x.rows:
                raise InputError(f"{where} holds {x.rows:,} samples, but {key} has {told.rows:,}; give one for each.")
        refuse_rows(self.path, x.rows, self.path.stat().st_size)
        if not self.memory_map or x.columns_first:
            refuse_beyond_memory(where, x.nbytes // (2 if x.dtype.itemsize == 8 else 1))

    def load(self, name: str) -> Array:
        """One array, in memory."""
        with _reading(self.path, name):
            return read_member(self.path, name)

    def optional(self, name: str) -> Array | None:
        """This split's array of that name, where there is one."""
        return self.load(self.key(name)) if self.has(self.key(name)) else None

    def read(self, train: Spec | None) -> Data:
        """This split; `train` is the training set's spec when this is a test set."""
        y = self._labels()
        classes = self._classes(y, train)
        given = self.optional("ids")
        if self.labeled and not self.has("classes"):
            y = self._numbered(y, classes)
        ids = [str(row) for row in range(len(y))] if given is None else [str(name) for name in given]
        if len(set(ids)) != len(ids):
            raise InputError(f"{self.path}: {self.key('ids')} names some samples twice; ids must differ.")
        raw, where = self._raw(), f"{self.path}: {self.key('x')}"
        labels = torch.from_numpy(y)
        if raw.dtype == np.uint8:
            _check_images(raw, where)
            if self.memory_map:
                x: Rows = keep_rows(self.path, self.key("x"), raw.shape, raw.dtype, raw.blocks, order=(0, 3, 1, 2))
            else:  # turned block by block, so that there is never a second copy of the set
                whole = np.empty((len(raw), raw.shape[3], *raw.shape[1:3]), dtype=np.uint8)
                for rows, block in zip(range(0, len(raw), raw.step), raw.blocks(), strict=True):
                    whole[rows : rows + raw.step] = block.transpose(0, 3, 1, 2)
                x = torch.from_numpy(whole)
            return Data(x, labels, Spec("image", tuple(x.shape[1:]), classes, mirror=not self.has(NO_MIRROR)), ids)
        x, lengths = self._series(raw, ids, where)
        low, high = self._range(x, where) if train is None else (train.low, train.high)
        spec = Spec("series", tuple(x.shape[1:]), classes, low, high)
        return Data(x, labels, spec, ids, None if lengths is None else torch.from_numpy(lengths))

    def _labels(self) -> npt.NDArray[np.int64]:
        if not self.labeled:
            return np.zeros(self.headers[self.key("x")].rows, dtype=np.int64)
        return self.load(self.key("y")).astype(np.int64)

    def _classes(self, y: npt.NDArray[np.int64], train: Spec | None) -> tuple[str, ...]:
        if not self.has("classes"):
            if train is not None:
                return train.classes
            if y.min(initial=0) < 0 or y.max(initial=-1) >= MAX_NUMBERED:
                wrong = int(y.min() if y.min() < 0 else y.max())
                raise InputError(f"{self.path}: a label is {wrong}; number the classes 0..K-1 or add `classes`.")
            return tuple(map(str, np.unique(y).tolist()))  # labels 1..K, or with gaps, are K classes all the same
        names = tuple(map(str, self.load("classes").tolist()))
        if len(set(names)) != len(names):
            raise InputError(f"{self.path}: classes must be a list of different names, one for each label.")
        return names

    def _numbered(self, y: npt.NDArray[np.int64], classes: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """Labels as places among classes that are named by numbers; as they are where these have other names."""
        if not all(name.isdecimal() and len(name) < 19 for name in classes):  # 64 bits hold no more digits
            return y
        known = np.array([int(name) for name in classes], dtype=np.int64)
        lost = y[~np.isin(y, known)]
        if len(lost):
            raise InputError(
                f"{self.path}: {self.key('y')} has the label {lost[0]}, which the training set does not have; leave "
                "its samples out, or add some to the training set."
            )
        order = known.argsort()
        places: npt.NDArray[np.int64] = order[np.searchsorted(known, y, sorter=order)]
        return places

    def _raw(self) -> _Raw:
        """The samples as the file holds them; columns first, they have to be read as a whole."""
        told = self.headers[self.key("x")]
        return _Raw(told.shape, told.dtype, self._turned if told.columns_first else self._stream)

    def _turned(self) -> Iterator[Array]:
        array = self.load(self.key("x"))
        step = _step(array.shape, array.dtype)
        return (array[start : start + step] for start in range(0, len(array), step))

    def _stream(self) -> Iterator[Array]:
        key = self.key("x")
        with _reading(self.path, key), open_member(self.path, key) as (told, file):
            shape, dtype, step = told.shape, told.dtype, _step(told.shape, told.dtype)
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                want = rows * math.prod(shape[1:]) * dtype.itemsize
                if len(content := file.read(want)) != want:
                    raise ValueError(f"it ends before row {start + rows}")
                yield np.frombuffer(content, dtype=dtype).reshape(rows, *shape[1:])
            file.read(1)  # only at its end the archive compares its checksum

    def _series(self, raw: _Raw, ids: Sequence[str], where: str) -> tuple[Rows, npt.NDArray[np.int64] | None]:
        """Clean series `(n, C, T)` and their lengths (None where all are of full length and none were given)."""
        if raw.dtype not in (np.float32, np.float64) or len(raw.shape) not in (2, 3) or 0 in raw.shape[1:]:
            raise InputError(
                f"{where} must be images, uint8 (n, height, width, 1 or 3), or series, float32 (n, channels, length); "
                f"got {raw.dtype} of shape {raw.shape}."
            )
        shape = raw.shape if len(raw.shape) == 3 else (len(raw), 1, raw.shape[1])
        given = self.optional("lengths")

        def cleaned() -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
            for start, block in zip(range(0, len(raw), raw.step), raw.blocks(), strict=True):
                rows = slice(start, start + raw.step)
                known = None if given is None else given[rows].astype(np.int64)
                yield clean(block.reshape(-1, *shape[1:]), known, ids[rows], self.missing, where)

        if self.memory_map:  # two copies, either of which may be there already
            name = f"{self.key('x')}-{self.missing}"
            x: Rows = keep_rows(self.path, name, shape, np.float32, lambda: (cases for cases, _ in cleaned()))
            kept = keep_rows(self.path, f"{name}-lengths", shape[:1], np.int64, lambda: (ends for _, ends in cleaned()))
            ends = kept[torch.arange(len(raw))].numpy()
        else:
            whole, ends = np.empty(shape, dtype=np.float32), np.empty(len(raw), dtype=np.int64)
            for start, (cases, block_ends) in zip(range(0, len(raw), raw.step), cleaned(), strict=True):
                whole[start : start + raw.step], ends[start : start + raw.step] = cases, block_ends
            x = torch.from_numpy(whole)
        return x, None if given is None and (ends == shape[2]).all() else ends

    def _range(self, x: Rows, where: str) -> tuple[float, float]:
        low, high = bounds(x)
        if not self.has("value_range"):
            return low, high
        kept = self.load("value_range")
        if kept.shape != (2,) or kept.dtype.kind != "f" or not (kept[0] <= low <= high <= kept[1]):
            raise InputError(f"{self.path}: value_range must be two numbers that enclose {where}: {low:g}..{high:g}.")
        return float(kept[0]), float(kept[1])


def _check_images(raw: _Raw, where: str) -> None:
    if len(raw.shape) == 4 and raw.shape[3] in (1, 3) and 0 not in raw.shape[1:]:
        return
    hint = "; move the channels last" if len(raw.shape) == 4 and raw.shape[1] in (1, 3) else ""
    raise InputError(f"{where}: images must be of shape (n, height, width, 1 or 3), got {raw.shape}{hint}.")


def _with_lengths(data: Data) -> Data:
    if data.lengths is not None:
        return data
    return replace(data, lengths=torch.full((len(data),), data.spec.shape[-1], dtype=torch.int64))


@contextmanager
def _reading(path: Path, name: str | None = None) -> Iterator[None]:
    """Whatever goes wrong inside becomes one sentence: damaged archives fail in a dozen ways."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        what = f" the array {name!r} in" if name else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read{what} {path}: {reason}.") from None
