"""Parquet and Arrow files, and the folders that Hugging Face `datasets` writes, -> Splits.

Read with pyarrow alone: `datasets` can run a data set's own scripts and unpickle caches, a table of bytes cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from antibackdoor.data.core import Splits
from antibackdoor.data.decoding import Size
from antibackdoor.data.ipc import at_stream, unpacked
from antibackdoor.data.labels import TEST_NAMES
from antibackdoor.data.parquet import declared
from antibackdoor.data.series import Missing
from antibackdoor.data.stream import Container, Labels, found_in, read_container
from antibackdoor.errors import InputError, require
from antibackdoor.files import read_json
from antibackdoor.limits import MAX_NAME, MAX_SAMPLE, inside, refuse_beyond_memory, refuse_growth, refuse_rows

if TYPE_CHECKING:
    import pyarrow as pa

EXTENSIONS = (".parquet", ".arrow")
LABELS = ("label", "labels", "fine_label", "target", "class", "y")
SAMPLES = ("image", "img", "series", "x", "values", "input_values", "data")
TRAIN, TEST = (re.compile(rf"(^|[^a-z])({names})([^a-z]|$)") for names in ("train", "|".join(TEST_NAMES)))
MAX_GROUP = 2 * 2**30
"""Bytes of one row group of a parquet file, unpacked; that much must fit into memory."""
BATCH_BYTES = 2**28
"""Bytes to read at a time."""


def is_arrow_folder(path: Path) -> bool:
    """Whether a folder holds what `datasets` saves, or parquet or arrow files, itself or in its folders."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    return next(found_in(path, EXTENSIONS), None) is not None


def load_arrow(
    path: Path,
    *,
    test: Path | None = None,
    image_size: Size = None,
    missing: Missing = "refuse",
    skip: bool = False,
    memory_map: bool | None = False,
) -> Splits:
    """A parquet or arrow file, a folder of them, or what `save_to_disk` of a Hugging Face data set wrote.

    Splits go by the names of files and folders (train, test, validation); without any, all is the training set.
    The label column is the `ClassLabel` one, or one called label, labels, fine_label, target, class or y; the samples
    are in the one column of encoded images, or of lists of numbers `(length,)` or `(channels, length)`. Labels keep the
    numbers and names of a `ClassLabel`; ids are row numbers within the split.
    Raises InputError for what cannot be read, and for columns that are neither or not alone.
    """
    require(f"reading {path} needs pyarrow: install it with  pip install 'antibackdoor[hf]'", "pyarrow")
    first, second = _files(path)
    if test is not None:
        own, other = _files(test)
        second = other or own
    if not first:
        raise InputError(f"{path} holds no training set; its files are all named as test sets.")
    parts = [_Part(first, path)] + ([_Part(second, test or path)] if second else [])
    return read_container(parts, path, image_size, missing, skip, memory_map)


@dataclass(frozen=True)
class _Column:
    name: str
    image: bool


class _Part(Container):
    """The tables of one split, read in pieces."""

    def __init__(self, files: Sequence[Path], where: Path):
        self.files, self.where = files, where
        with _reading(files[0]):
            schema = _schema(files[0])
            features = _features(schema)
            self.label, self.classes = _label_column(schema, features, where)
            self.column = _sample_column(schema, features, self.label, where)
        self.image = self.column.image
        self.labels = self._labels()  # before any sample: whatever is wrong with them costs nothing
        self.ids = [str(row) for row in range(len(self.labels.given))]

    def images(self) -> Iterator[bytes]:
        """The encoded image of every row."""
        handed, size = 0, sum(file.stat().st_size for file in self.files)
        for row, value in self._samples():
            inner = value["bytes"] if hasattr(value, "keys") and value.is_valid else value
            found = inner.as_buffer() if inner.is_valid else None
            if found is None:
                raise InputError(
                    f"{self.where}: row {row} of column {self.column.name!r} holds no image itself (a path, or "
                    "nothing); write the data set with its `save_to_disk`, which puts them in."
                )
            if found.size > MAX_SAMPLE:
                raise InputError(f"{self.where}: row {row} holds {found.size:,} bytes; at most 64 MiB are read.")
            handed += found.size
            refuse_growth(f"{self.where}, an image that is there once for each row that shows it,", handed, size)
            yield found.to_pybytes()

    def cases(self) -> Iterator[npt.NDArray[Any]]:
        """The series of every row."""
        for row, value in self._samples():
            case = _numbers(value.values) if value.is_valid else None
            if case is None:
                raise InputError(
                    f"{self.where}: row {row} of column {self.column.name!r} is no series: lists of numbers are "
                    "needed, all channels of one length."
                )
            yield case

    def _labels(self) -> Labels:
        given: list[str | int] = []
        for row, scalar in enumerate(self._values(self.label)):
            value = scalar.as_py()
            if not isinstance(value, int | str) or value == "":
                raise InputError(f"{self.where}: row {row} of column {self.label!r} holds no label: {value!r}.")
            if isinstance(value, str) and len(value) > MAX_NAME:
                raise InputError(
                    f"{self.where}: row {row} of column {self.label!r} has a name of {len(value):,} characters; "
                    f"at most {MAX_NAME:,} make sense."
                )
            given.append(value)
        return Labels(given, self.classes)

    def _samples(self) -> Iterator[tuple[str, Any]]:
        """Row number and value of every row; in a damaged file there may be more of them than labels, or fewer."""
        for row, value in zip_longest(self.ids, self._values(self.column.name)):
            if row is None or value is None:
                raise InputError(f"cannot read {self.where}: {self.label!r} and {self.column.name!r} differ in length.")
            yield row, value

    def _values(self, column: str) -> Iterator[Any]:
        for file in self.files:
            with _reading(file):
                rows = 0
                for batch in _batches(file, column):
                    rows += batch.num_rows
                    refuse_rows(file, rows, file.stat().st_size)
                    refuse_beyond_memory(f"{file}: some rows of {column!r}", 2 * batch.nbytes)
                    batch.validate(full=True)  # offsets in a file may lie, and would be followed out of it
                    # One by one: a value that a dictionary holds once may stand in every row.
                    yield from batch.column(0)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of the training set and of the test set."""
    if path.is_file():
        return [path], []
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(s, str) and re.fullmatch(r"[\w-]+", s) for s in splits):
            raise InputError(f"{path / 'dataset_dict.json'} does not name the splits.")
        found = {name: _saved(path / name, path) for name in splits}
        train = found.get("train") or (next(iter(found.values())) if len(found) == 1 else [])
        return train, next((found[n] for n in TEST_NAMES if n in found), [])
    if (path / "state.json").is_file():
        return _saved(path, path), []
    files = sorted(found_in(path, EXTENSIONS))
    names = {file: file.relative_to(path).as_posix().lower() for file in files}
    test = [file for file in files if TEST.search(names[file]) and not TRAIN.search(names[file])]
    named = [file for file in files if TRAIN.search(names[file])]
    tests = [file for file in test if re.search(r"(^|[^a-z])test([^a-z]|$)", names[file])] or test
    return named or [file for file in files if file not in test], tests


def _saved(folder: Path, root: Path) -> list[Path]:
    """The files of one split as `save_to_disk` left it, in the data set's folder `root`."""
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise InputError(f"{folder} holds a selection of other rows; call flatten_indices() before save_to_disk().")
    entries = state.get("_data_files")
    files = [e.get("filename") for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise InputError(f"{folder / 'state.json'} does not name the files of the data set.")
    return [inside(folder / str(name), root) for name in files]


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def _schema(file: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        return pq.read_schema(file)
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(at_stream(source)).schema


def _batches(file: Path, column: str) -> Iterator[pa.RecordBatch]:
    """One column in pieces of a few hundred rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as table:
            rows = _check_parquet(file)
            yield from table.iter_batches(batch_size=rows, columns=[column], use_threads=False)
        return
    with pa.memory_map(str(file)) as source:
        bytes_of = unpacked(source)
        refuse_growth(file, bytes_of, file.stat().st_size)
        refuse_beyond_memory(file, bytes_of)
        for batch in pa.ipc.open_stream(at_stream(source)):
            yield pa.RecordBatch.from_arrays([batch.column(batch.schema.get_field_index(column))], [column])


def _check_parquet(file: Path) -> int:
    """Refuse a table that declares more than any honest one; returns how many of its rows to read at a time.

    A value that a row group stores once may stand in each of its rows, so the rows read at a time may not be worth more
    than so many whole groups. pyarrow is not asked: it ends the process where what is told of a column is damaged.
    """
    told, size = declared(file), file.stat().st_size
    refuse_rows(file, told.rows, size)
    refuse_growth(file, told.unpacked, size)
    refuse_beyond_memory(file, told.unpacked)
    if told.largest > MAX_GROUP:
        raise InputError(f"{file}: a row group of {told.largest:,} bytes is too large; write it in smaller ones.")
    return max(1, min(256, BATCH_BYTES // max(told.largest, 1)))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` noted about the columns."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def _label_column(schema: pa.Schema, features: dict[str, Any], where: Path) -> tuple[str, list[str] | None]:
    import pyarrow as pa

    declared = [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    found = [n for n in LABELS if n in declared] or declared or [n for n in LABELS if n in schema.names]
    if not found or (len(found) > 1 and found[0] not in LABELS):
        raise InputError(
            f"{where} needs one column of labels, called label; its columns are {', '.join(schema.names) or 'none'}."
        )
    kind = schema.field(found[0]).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(inner) or pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise InputError(
            f"{where}: column {found[0]!r} of type {kind} holds no labels; whole numbers or names are needed."
        )
    names = features.get(found[0], {}).get("names")
    return found[0], [str(name) for name in names] if isinstance(names, list) else None


def _sample_column(schema: pa.Schema, features: dict[str, Any], label: str, where: Path) -> _Column:
    import pyarrow as pa

    found: list[_Column] = []
    for field in schema:
        kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        inside = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if field.name == label:
            continue
        if (
            pa.types.is_binary(inside)
            or pa.types.is_large_binary(inside)
            or (inside != kind and pa.types.is_null(inside))
        ):
            if features.get(field.name, {}).get("_type", "Image") == "Image":
                found.append(_Column(field.name, True))
        elif _is_series(kind):
            found.append(_Column(field.name, False))
    best = [column for name in SAMPLES for column in found if column.name == name] or found
    if not best or (len(found) > 1 and best[0].name not in SAMPLES):
        raise InputError(
            f"{where} needs one column of encoded images or of lists of numbers, called image or series; "
            f"its columns are {', '.join(f'{field.name} ({field.type})' for field in schema)[:300]}."
        )
    return best[0]


def _is_series(kind: pa.DataType) -> bool:
    """A list of numbers, or a list of such lists."""
    import pyarrow as pa

    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if pa.types.is_fixed_size_list(kind) and kind.list_size == 0:
            return False  # as many as one likes take no bytes at all
        kind, depth = kind.value_type, depth + 1
    return depth in (1, 2) and (pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _numbers(values: pa.Array) -> npt.NDArray[np.float64] | None:
    """The numbers of one series, NaN where one is missing; None where they are none, or channels differ in length."""
    import pyarrow as pa

    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)
    if not len(values) or values.null_count:
        return None
    channels = [_numbers(channel.values) for channel in values]
    alike = {None if channel is None else channel.shape for channel in channels}
    return np.stack([channel for channel in channels if channel is not None]) if len(alike) == 1 else None


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever pyarrow says about a damaged file becomes one sentence."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{file} does not exist.") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"cannot read {file}: {reason}.") from None
