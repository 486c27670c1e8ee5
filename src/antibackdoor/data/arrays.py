"""`.npz` files <-> Splits, in memory or mapped from disk."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from antibackdoor.data.core import Data, Rows, Spec, Splits
from antibackdoor.data.mapped import map_made, map_member
from antibackdoor.data.rows import MemoryMap
from antibackdoor.data.series import Missing, bounds, clean
from antibackdoor.errors import InputError
from antibackdoor.files import atomically
from antibackdoor.limits import refuse_bomb, refuse_special

Array: TypeAlias = npt.NDArray[Any]
CHUNK = 4096
NPY: Any = np.lib.format
"""Has no types."""
MAX_CLASSES = 10_000


def load_npz(path: Path, *, test: Path | None = None, missing: Missing = "refuse", memory_map: bool = False) -> Splits:
    """An `.npz` with x_train, y_train[, x_test, y_test], or x, y; and, where wanted, classes, lengths, ids.

    Images are uint8 `(n, H, W, 1 or 3)` and become `(n, C, H, W)`; series are float32 or float64 `(n, C, T)` or
    `(n, T)`, shorter ones with a NaN tail or with `lengths_train`, `lengths_test`, and become float32 with a zero tail.
    Labels are integers 0..K-1; without `classes` the classes are named "0".."K-1". Pickled objects are never read.
    test: another `.npz` to take the test set from (its test part if it has one, else its only part).
    memory_map: copy the samples once, as they are stored, to the cache folder and read them from there.
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
    mapped: Array | None = None

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

    @staticmethod
    def _key(name: str, suffix: str) -> str:
        return f"{name}_{suffix}" if suffix else name

    def has(self, name: str) -> bool:
        return name in self.names

    def key(self, name: str) -> str:
        return self._key(name, self.suffix)

    def load(self, name: str) -> Array:
        """One array, in memory."""
        with _reading(self.path, name), np.load(self.path, allow_pickle=False) as file:
            return np.asarray(file[name])

    def optional(self, name: str) -> Array | None:
        """This split's array of that name, where there is one."""
        return self.load(self.key(name)) if self.has(self.key(name)) else None

    def read(self, train: Spec | None) -> Data:
        """This split; `train` is the training set's spec when this is a test set."""
        y = self._labels()
        classes = self._classes(y, train)
        given = self.optional("ids")
        ids = [str(row) for row in range(len(y))] if given is None else [str(name) for name in given.ravel()]
        if len(set(ids)) != len(ids):
            raise InputError(f"{self.path}: {self.key('ids')} names some samples twice; ids must differ.")
        raw, where = self._raw(), f"{self.path}: {self.key('x')}"
        if len(raw) != len(y) or len(ids) != len(y):
            raise InputError(f"{where} holds {len(raw)} samples for {len(y)} labels and {len(ids)} ids.")
        labels = torch.from_numpy(y)
        if raw.dtype == np.uint8:
            _check_images(raw, where)
            if raw.mapped is not None:
                x: Rows = MemoryMap(raw.mapped, (0, 3, 1, 2))
            else:  # turned block by block, so that there is never a second copy of the set
                whole = np.empty((len(raw), raw.shape[3], *raw.shape[1:3]), dtype=np.uint8)
                for rows, block in zip(range(0, len(raw), raw.step), raw.blocks(), strict=True):
                    whole[rows : rows + raw.step] = block.transpose(0, 3, 1, 2)
                x = torch.from_numpy(whole)
            return Data(x, labels, Spec("image", tuple(x.shape[1:]), classes), ids)
        series, lengths = self._series(raw, ids, where)
        low, high = self._range(series, where) if train is None else (train.low, train.high)
        x = MemoryMap(series) if self.memory_map else torch.from_numpy(series)
        spec = Spec("series", tuple(x.shape[1:]), classes, low, high)
        return Data(x, labels, spec, ids, None if lengths is None else torch.from_numpy(lengths))

    def _labels(self) -> npt.NDArray[np.int64]:
        if not self.labeled:
            return np.zeros(len(self._raw()), dtype=np.int64)
        y = self.load(self.key("y"))
        if y.dtype.kind not in "iu" or y.ndim != 1:
            raise InputError(
                f"{self.path}: {self.key('y')} must be one integer for each sample, got {y.dtype} of shape {y.shape}; "
                "number the classes 0..K-1."
            )
        return y.astype(np.int64)

    def _classes(self, y: npt.NDArray[np.int64], train: Spec | None) -> tuple[str, ...]:
        if not self.has("classes"):
            if train is not None:
                return train.classes
            count = int(y.max(initial=-1)) + 1
            if count > MAX_CLASSES:
                raise InputError(f"{self.path}: a label is {count - 1}; number the classes 0..K-1 or add `classes`.")
            return tuple(map(str, range(count)))
        names = self.load("classes")
        if names.ndim != 1 or names.dtype.kind not in "Uiu" or len(set(names.tolist())) != len(names):
            raise InputError(f"{self.path}: classes must be a list of different names, one for each label.")
        return tuple(map(str, names.tolist()))

    def _raw(self) -> _Raw:
        """The samples as the file holds them."""
        key = self.key("x")
        if not self.memory_map:
            with _reading(self.path, key), self._open(key) as (shape, columns_first, dtype, _):
                plain = not columns_first and not dtype.hasobject and bool(shape)
            if plain:
                return _Raw(shape, dtype, self._stream)
            array = self.load(key)
        else:
            with _reading(self.path, key):
                array = map_member(self.path, key)
        if array.ndim == 0:
            raise InputError(f"{self.path}: {key} is a single number, not one sample for each label.")
        step = _step(array.shape, array.dtype)
        starts = range(0, len(array), step)
        pieces = partial(map, lambda start: array[start : start + step], starts)
        return _Raw(array.shape, array.dtype, pieces, array if self.memory_map else None)

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[tuple[int, ...], bool, np.dtype[Any], IO[bytes]]]:
        """Shape, order and type of an array, and the file at its first value."""
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            version = NPY.read_magic(file)
            read = {(1, 0): NPY.read_array_header_1_0, (2, 0): NPY.read_array_header_2_0}[version]
            shape, columns_first, dtype = read(file)
            there = archive.getinfo(f"{name}.npy").file_size
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > there:
                raise ValueError(f"it declares more values than its {there:,} bytes hold")
            yield shape, columns_first, dtype, file

    def _stream(self) -> Iterator[Array]:
        key = self.key("x")
        with _reading(self.path, key), self._open(key) as (shape, _, dtype, file):
            step = _step(shape, dtype)
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                want = rows * math.prod(shape[1:]) * dtype.itemsize
                if len(content := file.read(want)) != want:
                    raise ValueError(f"it ends before row {start + rows}")
                yield np.frombuffer(content, dtype=dtype).reshape(rows, *shape[1:])
            file.read(1)  # only at its end the archive compares its checksum

    def _series(
        self, raw: _Raw, ids: Sequence[str], where: str
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]:
        """Clean series `(n, C, T)` and their lengths (None where all are of full length and none were given)."""
        if raw.dtype not in (np.float32, np.float64) or len(raw.shape) not in (2, 3) or 0 in raw.shape[1:]:
            raise InputError(
                f"{where} must be images, uint8 (n, height, width, 1 or 3), or series, float32 (n, channels, length); "
                f"got {raw.dtype} of shape {raw.shape}."
            )
        shape = raw.shape if len(raw.shape) == 3 else (len(raw), 1, raw.shape[1])
        given = self.optional("lengths")
        if given is not None and (given.dtype.kind not in "iu" or given.shape != (len(raw),)):
            raise InputError(f"{self.path}: {self.key('lengths')} must be one integer for each of {len(raw)} samples.")

        def fill(out: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
            ends = np.zeros(len(raw), dtype=np.int64)
            for start, block in zip(range(0, len(raw), raw.step), raw.blocks(), strict=True):
                rows = slice(start, start + raw.step)
                known = None if given is None else given[rows].astype(np.int64)
                cases = block.reshape(-1, *shape[1:])
                out[rows], ends[rows] = clean(cases, known, ids[rows], self.missing, where)
            return ends

        if self.memory_map:
            x, ends = map_made(self.path, f"{self.key('x')}-{self.missing}", shape, fill)
        else:
            x = np.empty(shape, dtype=np.float32)
            ends = fill(x)
        return x, None if given is None and (ends == shape[2]).all() else ends

    def _range(self, x: npt.NDArray[np.float32], where: str) -> tuple[float, float]:
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
    except InputError:
        raise
    except Exception as error:
        if any(told in str(error) for told in ("Object arrays", "pickled (object)", "Python objects")):
            raise InputError(
                f"{path}: {name} holds pickled Python objects, which are never read; save plain arrays of numbers."
            ) from None
        what = f" the array {name!r} in" if name else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read{what} {path}: {reason}.") from None
