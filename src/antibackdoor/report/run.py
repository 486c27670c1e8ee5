"""What a report reads: the files of a run folder, checked, with everything optional allowed to be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from antibackdoor.data.npy import read_members
from antibackdoor.errors import InputError
from antibackdoor.files import from_csv_cell, read_object
from antibackdoor.limits import MAX_TABLE, read_bytes, read_table

Array: TypeAlias = npt.NDArray[Any]

COLUMNS = ("id", "label", "score", "probability", "flagged", "suggested_label", "reason")
SHOWN, LISTED = 48, 300
"""Most samples a report shows one by one, and most rows it lists behind them."""


@dataclass(frozen=True)
class Suspects:
    """`suspects.csv`: three columns of every sample, and the whole rows of the first few.

    truth: whether each is poisoned, in experiments only; roles: the same by id for the first few.
    """

    score: npt.NDArray[np.float64]
    flagged: npt.NDArray[np.bool_]
    label: npt.NDArray[np.int64]
    classes: list[str]
    first: list[dict[str, str]]
    truth: npt.NDArray[np.bool_] | None = None
    roles: dict[str, str] = field(default_factory=dict)

    @property
    def cut(self) -> float | None:
        """The lowest score that was flagged."""
        return float(self.score[self.flagged].min()) if self.flagged.any() else None


@dataclass(frozen=True)
class Gallery:
    """`gallery.npz`: the most suspicious samples themselves, and trusted ones of the flagged class if there are any."""

    x: dict[str, Array]
    reference: list[tuple[str, Array]]


@dataclass(frozen=True)
class Attention:
    """`attention.npz`: where a network looks in suspects and in trusted samples, and what both look like on average."""

    label: str
    witness: str
    n: int
    suspects: Array
    trusted: Array
    suspects_mean: Array
    trusted_mean: Array
    aligned: str = ""


@dataclass(frozen=True)
class Run:
    """A run folder in memory."""

    name: str
    verdict: dict[str, Any]
    suspects: Suspects
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    config: dict[str, Any]
    env: dict[str, Any]
    comparison: list[dict[str, Any]]
    gallery: Gallery | None
    data: dict[str, Any]
    attention: Attention | None
    has_model: bool


def read_run(folder: Path) -> Run:
    """Read a run folder; InputError where it is none, or where a file in it is damaged."""
    for name in ("verdict.json", "suspects.csv"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: a report needs the folder of a finished run.")
    return Run(
        name=folder.resolve().name,
        verdict=_object(folder / "verdict.json"),
        suspects=_suspects(folder / "suspects.csv", folder / "truth.csv"),
        metrics=_object(folder / "metrics.json"),
        history=_history(folder / "history.jsonl"),
        config=_object(folder / "config.json"),
        env=_object(folder / "env.json"),
        comparison=_comparison(folder / "comparison.json"),
        gallery=_gallery(folder / "gallery.npz"),
        data=_object(folder / "data.json"),
        attention=read_attention(folder / "attention.npz"),
        has_model=(folder / "model.safetensors").is_file(),
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing."""
    return read_object(path) if path.is_file() else {}


def _comparison(path: Path) -> list[dict[str, Any]]:
    """The rows of a comparison with other runs."""
    rows = _object(path).get("rows", [])
    if not isinstance(rows, list):
        raise InputError(f"cannot read {path}: its rows are no list; delete it to build the report without them.")
    return [row for row in rows if isinstance(row, dict)]


def _suspects(path: Path, truth: Path) -> Suspects:
    """Three columns only, so that millions of samples stay cheap; ids only where the truth has to be joined."""
    # A class may be called "NA" or "null": nothing but numbers is converted, and no word means "missing".
    escaped = "backslashreplace"
    # Not "category": which values that converts to numbers or booleans depends on the version of pandas.
    dtype: dict[str, Any] = {"label": "str", "score": "float64", "flagged": "str"}
    known = truth.is_file()
    dtype |= {"id": "str"} if known else {}
    table = read_table(path, dtype, usecols=list(dtype), encoding_errors=escaped)
    head = read_table(path, dict.fromkeys(COLUMNS, str), nrows=LISTED, encoding_errors=escaped)
    missing = [name for name in COLUMNS if name not in head]
    if missing:
        raise InputError(f"cannot read {path}: it has no column {missing[0]!r}.")
    first = head.to_dict("records")
    labels = table["label"].map(from_csv_cell).astype("category")
    poisoned = _poisoned(truth) if known else set()
    roles = {row["id"]: "poisoned" if row["id"] in poisoned else "clean" for row in first} if known else {}
    return Suspects(
        score=np.nan_to_num(table["score"].to_numpy(dtype=np.float64)),
        flagged=table["flagged"].isin(["true", "True", "TRUE", "1"]).to_numpy(dtype=np.bool_),
        label=np.asarray(labels.cat.codes, dtype=np.int64),
        classes=[str(name) for name in labels.cat.categories],
        first=[{str(key): from_csv_cell(str(value)) for key, value in row.items()} for row in first],
        truth=table["id"].isin(poisoned).to_numpy(dtype=np.bool_) if known else None,
        roles={from_csv_cell(name): role for name, role in roles.items()},
    )


def _poisoned(path: Path) -> set[str]:
    """Ids of the poisoned samples; samples that carry the trigger under their true label are not among them."""
    table = read_table(path, {"id": str, "role": str}, usecols=["id", "role"])
    return set(table.loc[table["role"] == "poison", "id"])


def _history(path: Path) -> list[dict[str, Any]]:
    """The rows of the history; a last line that a killed run left half-written is passed over."""
    if not path.is_file():
        return []
    lines = read_bytes(path, MAX_TABLE).decode("utf-8", "replace").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise InputError(f"cannot read {path}, line {number}: {error}.") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _gallery(path: Path) -> Gallery | None:
    if not path.is_file():
        return None
    try:
        arrays: dict[str, Array] = read_members(path)
        ids, x = arrays["ids"][:SHOWN], _cut(arrays["x"][:SHOWN], arrays.get("lengths"))
        if len(ids) != len(x) or arrays["x"].dtype != (np.uint8 if arrays["x"].ndim == 4 else np.float32):
            raise ValueError("the samples are neither uint8 images nor float32 series, one an id")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged archive surfaces as any of a dozen types
        raise InputError(f"cannot read {path}: {error!r}; delete it to build the report without pictures.") from None
    reference = _cut(arrays.get("reference_x", np.empty(0))[:SHOWN], arrays.get("reference_lengths"))
    labels = [str(name) for name in np.atleast_1d(arrays.get("reference_label", np.array("trusted")))]
    if len(labels) != len(reference):  # one name for all of them
        labels = labels[:1] * len(reference)
    return Gallery(
        x={str(name): sample for name, sample in zip(ids, x, strict=False)},
        reference=list(zip(labels, reference, strict=False)),
    )


def read_attention(path: Path) -> Attention | None:
    """`attention.npz`; None where there is none, InputError where it is damaged."""
    if not path.is_file():
        return None
    try:
        held = read_members(path)
        arrays = {name: held[name] for name in ("suspects", "trusted", "suspects_mean", "trusted_mean")}
        label, witness, n = str(held["label"]), str(held["witness"]), int(held["n"])
        aligned = str(held.get("aligned", ""))
        if len({array.shape[:2] for array in arrays.values()}) > 1 or arrays["suspects"].ndim != 2:
            raise ValueError("the maps and the averages differ in shape")
        finite = {name: np.nan_to_num(array.astype(np.float64)) for name, array in arrays.items()}
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged archive surfaces as any of a dozen types
        raise InputError(f"cannot read {path}: {error!r}; delete it to build the report without the maps.") from None
    return Attention(label, witness, n, **finite, aligned=aligned)


def _cut(x: Array, lengths: Array | None) -> list[Array]:
    """Samples one by one; series without their padding."""
    if lengths is None:
        return list(x)
    return [sample[..., : max(int(length), 1)] for sample, length in zip(x, lengths, strict=False)]
