"""Time series files (.ts, .tsv, .arff) -> Data, and what every reader of series does with gaps and unequal lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from antibackdoor.data.core import Data, Rows, Spec, Splits, pieces
from antibackdoor.data.labels import number
from antibackdoor.errors import InputError
from antibackdoor.limits import (
    MAX_HEADER,
    MAX_SAMPLE,
    MAX_STEPS,
    MAX_TEXT,
    inside,
    refuse_beyond_memory,
    refuse_growth,
    refuse_special,
)

Missing = Literal["refuse", "interpolate", "zero"]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Ints: TypeAlias = npt.NDArray[np.int64]
Cases: TypeAlias = Sequence[Floats]

EXTENSIONS = (".ts", ".tsv", ".arff")


def load_series(path: Path, *, test: Path | None = None, missing: Missing = "refuse") -> Splits:
    """A `.ts`, `.tsv` or `.arff` file, or a folder that holds NAME_TRAIN and NAME_TEST of one of these kinds.

    A file X_TRAIN.ts brings its neighbor X_TEST.ts along, unless `test` is given. Samples become float32 `(C, T)`,
    padded with zeros to the longest of both sets where lengths differ; ids are row numbers, classes the labels as text.
    missing: what to do with gaps inside of a series: refuse, interpolate (linear in each channel), or zero.
    Raises InputError for files that cannot be read, gaps (unless allowed), infinite values and unknown classes.
    """
    train_file = find_train_file(path) if path.is_dir() else path
    if test is None:
        test = _neighbor(train_file)
    elif test.is_dir():
        test = next((inside(f, test) for ext in EXTENSIONS for f in sorted(test.glob(f"*_TEST{ext}"))), test)
    train = read_file(train_file)
    return from_cases(*train, *(read_file(test) if test else ()), missing=missing, where=str(path))


def find_train_file(folder: Path) -> Path:
    """The one NAME_TRAIN file in a folder; `.ts` goes before `.tsv` and `.arff` of the same name."""
    for extension in EXTENSIONS:
        found = sorted(folder.glob(f"*_TRAIN{extension}"))
        if len(found) > 1:
            raise InputError(f"{folder} holds {len(found)} files *_TRAIN{extension}; name the one that is meant.")
        if found:
            return inside(found[0], folder)
    raise InputError(f"{folder} holds no file NAME_TRAIN.ts, .tsv or .arff.")


def _neighbor(train_file: Path) -> Path | None:
    stem = train_file.stem
    test = train_file.with_name(stem.removesuffix("_TRAIN") + "_TEST" + train_file.suffix)
    return inside(test, test.parent) if stem.endswith("_TRAIN") and test.is_file() else None


def read_file(path: Path) -> tuple[Cases, list[str]]:
    """The series `(C, T_i)` of one file, NaN where values are missing, and their class names."""
    kind, meta = path.suffix.lower(), {"targetlabel": False, "classlabel": True}
    if kind not in EXTENSIONS:
        raise InputError(f"{path} is not one of the series formats {', '.join(EXTENSIONS)}.")
    refuse_special(path, MAX_TEXT)
    try:
        if kind == ".tsv":
            return _table(path)
        try:
            from aeon.datasets import load_from_arff_file, load_from_ts_file
        except ImportError:
            raise InputError(
                f"reading {path} needs the package aeon: install it with  pip install 'antibackdoor[series]'"
            ) from None
        _check_lines(path, kind)
        if kind == ".ts":
            x, y, meta = load_from_ts_file(str(path), return_meta_data=True)
        else:
            x, y = load_from_arff_file(str(path))
        cases = [np.asarray(case, dtype=np.float64) for case in x]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the parsers raise whatever the damaged line leads to
        said = str(error).strip().partition("\n")[0]
        said = re.sub(r"^Error loading <.*?>\.? *", "", said)  # names the file, which the sentence does already
        reason = said[:200].rstrip(".") or type(error).__name__
        raise InputError(f"cannot read {path} as a {kind} file: {reason}.") from None
    if meta["targetlabel"] or not meta["classlabel"] or len(y) != len(cases):
        raise InputError(f"{path} holds no class labels (a regression target or none); labels are needed.")
    if not cases:
        raise InputError(f"{path} holds no series.")
    if any(0 in case.shape for case in cases):
        raise InputError(f"{path} holds a series without values.")
    return cases, [_class_name(label, path) for label in y.tolist()]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold anything, and their numbers."""
    with path.open(encoding="utf-8-sig") as file:
        place = 0
        while line := file.readline(MAX_SAMPLE + 1):
            place += 1
            if len(line) > MAX_SAMPLE:
                raise InputError(f"{path} line {place} has more than {MAX_SAMPLE:,} characters.")
            if line.strip():
                yield place, line


def _table(path: Path) -> tuple[Cases, list[str]]:
    """A `.tsv` file: on each line the label and then the values, all in number; NaN or nothing where one is missing."""
    cases, labels, width = list[Floats](), list[str](), 0
    for place, line in _lines(path):
        steps = line.count("\t")
        width = width or steps
        if steps != width or not 1 <= steps <= MAX_STEPS:
            raise InputError(
                f"{path} line {place} has {steps:,} values after its label; all lines need the same number, "
                f"1 to {MAX_STEPS:,}."
            )
        label, *values = line.rstrip("\r\n").split("\t")
        try:
            cases.append(np.fromiter((float(value.strip() or "nan") for value in values), np.float64, steps)[None])
        except ValueError as error:
            raise InputError(f"cannot read {path} as a .tsv file: line {place}: {error}.") from None
        labels.append(label.strip().strip('"'))
    if not cases:
        raise InputError(f"{path} holds no series.")
    return cases, class_names(labels, path)


def _check_lines(path: Path, kind: str) -> None:
    """Refuse a `.ts` or `.arff` file whose lines lead its parser to more than their characters can hold.

    It makes a matrix of the channels that a line has and of the values of the first one, fills a line of `.arff` with
    fewer values up, and a table of labels that are all as long as the longest.
    """
    data, relational, rows, longest, first = False, False, 0, 0, (0, 0)
    for place, line in _lines(path):
        if not data or (kind == ".arff" and "@" in line):
            lower = line.lower()
            if kind == ".ts" and re.match(r"\s*[^#\s]timestamps\s+true\b", lower):
                # aeon 1.x takes digits out of (time, value) pairs by a pattern that loses signs and whole numbers.
                raise InputError(
                    f"{path} holds time stamps, which cannot be read reliably; write the values without them."
                )
            relational |= "@attribute" in lower and "relational" in lower
            starts = lower.strip() == "@data" if kind == ".ts" else "@data" in lower
            data |= starts
            if kind == ".ts" and place > MAX_HEADER and not data:  # an .arff has a line for each step of its series
                raise InputError(f"{path} has no line @data among its first {MAX_HEADER:,}.")
            if starts or not data:
                continue
        between, after = (":", ":") if kind == ".ts" else ("\\n", "',") if relational else ("\\n", ",")
        values, _, label = line.rpartition(after)
        channels = values.count(between) + 1 if kind == ".ts" or relational else 1
        commas, wide = line.count(","), channels * (values.partition(between)[0].count(",") + 1)
        if kind == ".arff":
            first = first if rows else (commas, wide)
            if commas != first[0]:
                raise InputError(f"{path} line {place} has another number of values than the first line of data.")
        if max(wide, first[1]) > len(line):
            raise InputError(f"{path} line {place} declares {wide:,} values in {len(line):,} characters.")
        rows, longest = rows + 1, max(longest, len(label))
    refuse_growth(f"the labels of {path}, all as long as the longest,", 4 * rows * longest, path.stat().st_size)


def class_names(labels: Sequence[str], path: Path) -> list[str]:
    """Of labels as they stand in a table: of numbers, 1 and 1.0 are the same class. InputError where one is missing."""
    try:
        given: list[object] = [float(label) for label in labels]
    except ValueError:
        given = list(labels)
    return [_class_name(label, path) for label in given]


def _class_name(label: object, path: Path) -> str:
    """1, 1.0 and '1' are the same class in the archives, whose .tsv labels are parsed as numbers."""
    name = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()
    if name in ("", "nan"):
        raise InputError(f"{path} holds a series without a label.")
    return name


def from_cases(
    train: Cases,
    train_names: Sequence[str],
    test: Cases | None = None,
    test_names: Sequence[str] = (),
    *,
    missing: Missing = "refuse",
    where: str,
    ids: Sequence[Sequence[str]] | None = None,
) -> Splits:
    """Splits of series `(C, T_i)` and class names: padded to one length, cleaned, labels numbered.

    ids: of the samples of each part; row numbers if None.
    """
    parts = [train] if test is None else [train, test]
    channels = {len(case) for cases in parts for case in cases}
    if len(channels) > 1:
        raise InputError(f"{where}: series have {sorted(channels)} channels; all must have the same number.")
    spans = [{case.shape[1] for case in cases} for cases in parts]
    if len(parts) == 2 and len(spans[0]) == len(spans[1]) == 1 and spans[0] != spans[1]:
        raise InputError(
            f"{where}: all training series have length {max(spans[0])} but all test series {max(spans[1])}; "
            "cut or resample them to one length."
        )
    longest = max(max(span) for span in spans)
    # One long series among many short ones makes all of them long; as float64 while they are cleaned.
    padded_values = sum(map(len, parts)) * longest * max(channels or {1})
    given = 8 * sum(case.size for cases in parts for case in cases)
    refuse_growth(f"{where}, padded to its longest series,", 12 * padded_values, given)
    refuse_beyond_memory(f"{where}, padded to its longest series,", 12 * padded_values)
    data: list[Data] = []
    cleaned = []
    named = [[str(row) for row in range(len(cases))] for cases in parts] if ids is None else list(map(list, ids))
    for cases, part, own in zip(parts, ("training", "test"), named, strict=False):
        padded = np.full((len(cases), *(channels or {1}), longest), np.nan)
        for row, case in enumerate(cases):
            padded[row, :, : case.shape[1]] = case
        cleaned.append((*clean(padded, None, own, missing, f"{where}, {part} set"), own))
    unequal = any((lengths < longest).any() for _, lengths, _ in cleaned)
    for (x, lengths, own), names in zip(cleaned, (train_names, test_names), strict=False):
        y, classes = number(names, own, data[0].spec.classes if data else None)
        low, high = (data[0].spec.low, data[0].spec.high) if data else bounds(torch.from_numpy(x))
        spec = Spec("series", x.shape[1:], tuple(classes), low, high)
        data.append(Data(torch.from_numpy(x), y, spec, own, torch.from_numpy(lengths) if unequal else None))
    return Splits(*data)


def refuse_image_options(where: object, image_size: object, memory_map: bool | None) -> None:
    """Refuse what can be asked of image files only."""
    if memory_map:
        raise InputError(f"{where} holds series, which can be memory-mapped from an .npz file only.")
    if image_size is not None:
        raise InputError(f"{where} holds series; image_size is for images.")


def clean(
    block: Floats, lengths: Ints | None, ids: Sequence[str], missing: Missing, where: str
) -> tuple[npt.NDArray[np.float32], Ints]:
    """Series `(n, C, T)` as they are stored: float32, zero after their lengths, without gaps; and the lengths `(n,)`.

    lengths: if None, a tail in which every channel is NaN marks the end of a series.
    Raises InputError that names the first sample with gaps (`missing="refuse"`), infinite values, or no values.
    """
    with np.errstate(over="ignore"):
        x = np.array(block, dtype=np.float32)
    steps = x.shape[2]
    gaps: npt.NDArray[np.bool_] = np.isnan(x)
    if lengths is None:
        given: npt.NDArray[np.bool_] = np.logical_not(gaps.all(axis=1))
        lengths = np.where(given.any(axis=1), steps - given[:, ::-1].argmax(axis=1), 0).astype(np.int64)
    _refuse_first((lengths < 1) | (lengths > steps), ids, where, f"has a length outside 1..{steps} or no values at all")
    tail = np.broadcast_to((np.arange(steps) >= lengths[:, None])[:, None], x.shape)
    x[tail] = 0
    gaps &= ~tail
    _refuse_first(
        np.any(np.isinf(x), axis=(1, 2)), ids, where, "holds infinite values, or values too large for float32"
    )
    if missing == "zero":
        x[gaps] = 0
    elif missing == "interpolate":
        for row, channel in np.argwhere(gaps.any(axis=2)):
            gap, line = gaps[row, channel, : lengths[row]], x[row, channel, : lengths[row]]
            if gap.all():
                raise InputError(
                    f"{where}: sample {ids[row]!r} has no value at all in channel {channel} to interpolate from; "
                    "use --missing zero or remove it."
                )
            line[gap] = np.interp(np.flatnonzero(gap), np.flatnonzero(~gap), line[~gap])
    else:
        _refuse_first(
            np.any(gaps, axis=(1, 2)),
            ids,
            where,
            "holds missing values (NaN); use --missing interpolate or --missing zero",
        )
    return x, lengths


def bounds(x: Rows) -> tuple[float, float]:
    """Smallest and largest stored value, padding included, so that every stored row lies within; read in pieces."""
    if 0 in x.shape:
        return 0.0, 1.0
    found = [torch.aminmax(x[rows]) for rows in pieces(x)]
    return float(min(low for low, _ in found)), float(max(high for _, high in found))


def _refuse_first(bad: npt.NDArray[np.bool_], ids: Sequence[str], where: str, what: str) -> None:
    if bad.any():
        more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
        raise InputError(f"{where}: sample {ids[int(bad.argmax())]!r}{more} {what}.")
