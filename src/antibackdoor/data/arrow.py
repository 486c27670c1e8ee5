"""Parquet and Arrow files, and the folders that Hugging Face `datasets` writes, -> Splits.

Read with pyarrow alone: `datasets` can run a data set's own scripts and unpickle caches, a table of bytes cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from antibackdoor.data.core import Splits
from antibackdoor.data.series import Missing
from antibackdoor.data.stream import Encoded, Labels, Size, found_in, images, series
from antibackdoor.errors import InputError
from antibackdoor.files import read_json
from antibackdoor.limits import MAX_SAMPLE, inside, refuse_beyond_memory

if TYPE_CHECKING:
    import pyarrow as pa

EXTENSIONS = (".parquet", ".arrow")
LABELS = ("label", "labels", "fine_label", "target", "class", "y")
SAMPLES = ("image", "img", "series", "x", "values", "input_values", "data")
TRAIN, TEST = re.compile(r"(^|[^a-z])train([^a-z]|$)"), re.compile(r"(^|[^a-z])(test|validation|valid|val)([^a-z]|$)")
MAX_GROUP = 2 * 2**30
"""Bytes of one row group of a parquet file, unpacked; that much must fit into memory."""
ROW_BYTES, BATCH_BYTES = 4, 2**29
"""Bytes of a file that a row takes at least, so that a repeated one costs something; bytes to read at a time."""


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
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: install it with  pip install 'antibackdoor[hf]'") from None
    first, second = _files(path)
    if test is not None:
        own, other = _files(test)
        second = other or own
    if not first:
        raise InputError(f"{path} holds no training set; its files are all named as test sets.")
    parts = [_Part(first, path)] + ([_Part(second, test or path)] if second else [])
    if len({part.column.image for part in parts}) > 1:
        raise InputError(f"{path}: one of training and test set holds images, the other series.")
    if parts[0].column.image:
        if image_size is not None and image_size == 0:
            raise InputError("image_size=0 is not a number of pixels; give 1 or more.")
        encoded = [Encoded(part.encoded, part.labels, part.files) for part in parts]
        held = encoded[1] if second else None
        return images(encoded[0], held, path, image_size, skip_unreadable=skip, memory_map=memory_map)
    if memory_map:
        raise InputError(f"{path} holds series, which can be memory-mapped from an .npz file only.")
    if image_size is not None:
        raise InputError(f"{path} holds series; image_size is for images.")
    cases = [list(part.cases()) for part in parts]
    ids = [[str(row) for row in range(len(part))] for part in cases]
    return series(cases, ids, [part.labels() for part in parts], str(path), missing)


@dataclass(frozen=True)
class _Column:
    name: str
    image: bool


class _Part:
    """The tables of one split; every pass reads them anew, in pieces."""

    def __init__(self, files: Sequence[Path], where: Path):
        self.files, self.where = files, where
        with _reading(files[0]):
            schema = _schema(files[0])
            features = _features(schema)
            self.label, self.classes = _label_column(schema, features, where)
            self.column = _sample_column(schema, features, self.label, where)

    def encoded(self) -> Iterator[tuple[str, bytes]]:
        """Row number and encoded image of every row."""
        for row, value in enumerate(self._values(self.column.name)):
            inner = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(inner, bytes):
                raise InputError(
                    f"{self.where}: row {row} of column {self.column.name!r} holds no image itself (a path, or "
                    "nothing); write the data set with its `save_to_disk`, which puts them in."
                )
            if len(inner) > MAX_SAMPLE:
                raise InputError(f"{self.where}: row {row} holds {len(inner):,} bytes; at most 64 MiB are read.")
            yield str(row), inner

    def cases(self) -> Iterator[npt.NDArray[Any]]:
        """The series of every row."""
        for row, value in enumerate(self._values(self.column.name)):
            try:
                yield np.array(value, dtype=np.float64)
            except (TypeError, ValueError):
                raise InputError(
                    f"{self.where}: row {row} of column {self.column.name!r} is no series: lists of numbers are "
                    "needed, all channels of one length."
                ) from None

    def labels(self) -> Labels:
        """The labels of every row."""
        given: list[str | int] = []
        for row, value in enumerate(self._values(self.label)):
            if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
                raise InputError(f"{self.where}: row {row} of column {self.label!r} holds no label: {value!r}.")
            given.append(value)
        return Labels(given, self.classes)

    def _values(self, column: str) -> Iterator[Any]:
        for file in self.files:
            with _reading(file):
                for batch in _batches(file, column):
                    refuse_beyond_memory(f"{file}: some rows of {column!r}", 2 * batch.nbytes)
                    batch.validate(full=True)  # offsets in a file may lie, and would be followed out of it
                    # One by one: a value that a dictionary holds once may stand in every row.
                    yield from (value.as_py() for value in batch.column(0))


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
        return train, next((found[n] for n in ("test", "validation", "valid", "val") if n in found), [])
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
    files = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
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
        return _open_arrow(source).schema


def _batches(file: Path, column: str) -> Iterator[pa.RecordBatch]:
    """One column in pieces of a few hundred rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as table:
            rows = _check_parquet(file, table.metadata)
            yield from table.iter_batches(batch_size=rows, columns=[column], use_threads=False)
        return
    with pa.memory_map(str(file)) as source:
        reader = _open_arrow(source)
        count = getattr(reader, "num_record_batches", None)
        for batch in reader if count is None else (reader.get_batch(k) for k in range(count)):
            yield pa.RecordBatch.from_arrays([batch.column(batch.schema.get_field_index(column))], [column])


def _check_parquet(file: Path, told: pa.FileMetaData) -> int:
    """Refuse a table that declares more than any honest one; returns how many of its rows to read at a time.

    A value that a row group stores once may stand in each of its rows, so the rows read at a time may not be worth more
    than so many whole groups. Nothing is asked of single columns: pyarrow ends the process where theirs are damaged.
    """
    if told.num_rows > file.stat().st_size // ROW_BYTES:
        raise InputError(f"{file} declares {told.num_rows:,} rows in {file.stat().st_size:,} bytes; it is a bomb.")
    largest = max((told.row_group(number).total_byte_size for number in range(told.num_row_groups)), default=1)
    if not 0 <= largest <= MAX_GROUP:
        raise InputError(f"{file}: a row group of {largest:,} bytes is too large; write it in smaller ones.")
    return max(1, min(256, BATCH_BYTES // max(largest, 1)))


def _open_arrow(source: pa.NativeFile) -> Any:
    """`datasets` writes the streaming format, other tools the file format."""
    import pyarrow as pa

    magic = source.read(6)
    source.seek(0)
    return pa.ipc.open_file(source) if magic == b"ARROW1" else pa.ipc.open_stream(source)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` noted about the columns."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def _label_column(schema: pa.Schema, features: dict[str, Any], where: Path) -> tuple[str, list[str] | None]:
    declared = [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    found = [n for n in LABELS if n in declared] or declared or [n for n in LABELS if n in schema.names]
    if not found or (len(found) > 1 and found[0] not in LABELS):
        raise InputError(
            f"{where} needs one column of labels, called label; its columns are {', '.join(schema.names) or 'none'}."
        )
    names = features.get(found[0], {}).get("names")
    return found[0], [str(name) for name in names] if isinstance(names, list) else None


def _sample_column(schema: pa.Schema, features: dict[str, Any], label: str, where: Path) -> _Column:
    import pyarrow as pa

    found: list[_Column] = []
    for field in schema:
        kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        encoded = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if field.name == label:
            continue
        if encoded or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
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
        kind, depth = kind.value_type, depth + 1
    return depth in (1, 2) and (pa.types.is_floating(kind) or pa.types.is_integer(kind))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever pyarrow says about a damaged file becomes one sentence."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file} does not exist.") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"cannot read {file}: {reason}.") from None
