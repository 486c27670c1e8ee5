"""A run folder opened for review: its data, read again, its suspects in order, and the decisions so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from antibackdoor.data.core import Data, Splits
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from antibackdoor.files import from_csv_cell, read_json
from antibackdoor.review.decisions import Decisions, Undecided, take_cleaned


@dataclass(frozen=True)
class Session:
    """order: row numbers of the data, most suspicious first. table: `suspects.csv`, one row a sample, in data order.

    suggested: (n,) class numbers, -1 where nothing is suggested.
    """

    folder: Path
    splits: Splits
    table: pd.DataFrame
    order: npt.NDArray[np.int64]
    flagged: npt.NDArray[np.bool_]
    suggested: npt.NDArray[np.int64]
    decisions: Decisions

    @property
    def data(self) -> Data:
        """The training set as it was given."""
        return self.splits.train

    def cleaned(self, undecided: Undecided = "drop") -> Splits:
        """The set without what was dropped and with the labels that were given; the test set as it is."""
        stays, labels = self.decisions.cleaned(self.flagged, self.suggested, undecided)
        return Splits(take_cleaned(self.data, stays, labels), self.splits.test)


def open_session(folder: Path, splits: Splits | None = None, source: str | None = None) -> Session:
    """Open a finished run folder.

    The data are `splits`, or read from `source` (a path or name), or else from where the run read them.
    Raises InputError where the run is not finished, or the data are not those that it was made on.
    """
    for name in ("config.json", "suspects.csv"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: a review needs the folder of a finished run.")
    splits = splits or _read_again(folder, source)
    wanted = read_json(folder / "config.json").get("data")
    if splits.train.fingerprint() != wanted:
        raise InputError(
            f"these are not the data that the run in {folder} was made on (their content differs); "
            "give the same data, read the same way, with --data."
        )
    return _join(folder, splits)


def _read_again(folder: Path, source: str | None) -> Splits:
    told = read_json(folder / "source.json") if (folder / "source.json").is_file() else {}
    told = told if isinstance(told, dict) else {}
    source = source or told.get("source")
    if not isinstance(source, str):
        raise InputError(f"{folder} does not tell where its data are; name them with --data.")
    known = {"test", "image_size", "missing", "skip_unreadable", "memory_map", "data_root"}
    arguments: dict[str, Any] = {name: told[name] for name in known & told.keys()}
    size, root = arguments.get("image_size"), arguments.get("data_root")
    arguments |= {
        "image_size": tuple(size) if isinstance(size, list) else size,
        "data_root": Path(root) if isinstance(root, str) else None,
    }
    return load(source, **arguments)


def _join(folder: Path, splits: Splits) -> Session:
    """Suspects and data, row by row; ids must be the same ones."""
    path, data = folder / "suspects.csv", splits.train
    kinds = {"id": str, "label": str, "suggested_label": str, "reason": str, "flagged": str}
    try:
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False, encoding_errors="surrogateescape")
        table = table[["id", "label", "score", "flagged", "suggested_label", "reason"]]
        for name in ("id", "label", "suggested_label", "reason"):
            table[name] = table[name].map(from_csv_cell)
        table["score"] = table["score"].astype("float64")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {path}: {error}.") from None
    rows = pd.Index(data.ids).get_indexer(pd.Index(table["id"]))
    if len(table) != len(data) or (rows < 0).any() or len(np.unique(rows)) != len(data):
        raise InputError(f"{path} does not name the samples of this data set, each once.")
    order = rows.astype(np.int64)
    table = table.iloc[np.argsort(order)].reset_index(drop=True)
    flagged = table["flagged"].str.lower().isin(["true", "1"]).to_numpy(dtype=np.bool_)
    suggested = _numbers(table["suggested_label"].tolist(), data.spec.classes)
    return Session(folder, splits, table, order, flagged, suggested, Decisions(folder, data))


def _numbers(names: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    known = {name: number for number, name in enumerate(classes)}
    return np.array([known.get(name, -1) for name in names], dtype=np.int64)
