"""A run folder opened for review: its data, read again, its suspects in order, and the decisions so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from antibackdoor.data.core import Data, Splits
from antibackdoor.data.decoding import Size
from antibackdoor.data.load import at_hand, load
from antibackdoor.data.series import Missing
from antibackdoor.errors import InputError
from antibackdoor.files import read_object
from antibackdoor.review.decisions import Decisions, Undecided, take_cleaned
from antibackdoor.runs import read_suspects, refuse_links_out


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
        """The set without what was dropped and with the labels that were given; the test set as it is.

        Its source tells this review too, so that a run on it can be reviewed in turn.
        """
        stays, labels = self.decisions.cleaned(self.flagged, self.suggested, undecided)
        source = self.splits.source or {}
        reviews = [*source.get("reviews", []), [str(self.folder.resolve()), undecided]]
        return replace(self.splits, train=take_cleaned(self.data, stays, labels), source={**source, "reviews": reviews})


def open_session(folder: Path, splits: Splits | None = None, source: str | None = None) -> Session:
    """Open a finished run folder.

    The data are `splits`, or read from `source` (a path or name), or else from where the run read them. Of a run on
    data that other reviews had cleaned, these are cleaned again.
    Raises InputError where the run is not finished, or the data are not those that it was made on.
    """
    _check_finished(folder)
    told = read_told(folder)
    splits = splits or _read_again(folder, told, source)
    cleaned_already = len((splits.source or {}).get("reviews", []))
    for earlier, undecided in told.reviews[cleaned_already:]:
        _check_finished(earlier)
        splits = _join(earlier, splits).cleaned(undecided)
    return _join(folder, splits)


def _check_finished(folder: Path) -> None:
    for name in ("config.json", "suspects.csv"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: a review needs the folder of a finished run.")
    refuse_links_out(folder)


class Told(BaseModel):
    """`source.json`, as `load` told how it read the data; a run folder from elsewhere may tell anything.

    reviews: of which run folders, and what became of the undecided, that the data went through before the run.
    """

    model_config = ConfigDict(strict=True)

    source: str | None = None
    test: str | None = None
    image_size: Size = None
    missing: Missing = "refuse"
    skip_unreadable: bool = False
    memory_map: bool | None = None
    data_root: Path | None = None
    mirror: bool | None = None
    reviews: list[tuple[Path, Undecided]] = []

    def reading(self) -> dict[str, Any]:
        """How the data were read, as `load` takes it."""
        return {name: value for name, value in self if name not in ("source", "reviews")}


def read_told(folder: Path) -> Told:
    """What a run folder tells of its data, if anything."""
    path = folder / "source.json"
    try:
        return Told.model_validate_json(json.dumps(read_object(path) if path.is_file() else {}))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"{path} does not tell how to read the data: {wrong['loc'][0]}: {wrong['msg']}.") from None


def _read_again(folder: Path, told: Told, source: str | None) -> Splits:
    """The data from where the user says or, where they lie on this machine, from where the run read them."""
    place = source or told.source
    if place is None:
        raise InputError(f"{folder} does not tell where its data are; name them with --data.")
    if source is None and not at_hand(place, told.data_root):
        raise InputError(f"the data of {folder} are not here any more ({place}); name them with --data.")
    return load(place, **told.reading())


def _join(folder: Path, splits: Splits) -> Session:
    """Suspects and data, row by row; they must be the data of the run, and ids the same ones."""
    if splits.train.fingerprint() != read_object(folder / "config.json").get("data"):
        raise InputError(
            f"these are not the data that the run in {folder} was made on (their content differs); "
            "give the same data, read the same way and with the same decisions of earlier reviews."
        )
    data, table = splits.train, read_suspects(folder)
    rows = pd.Index(data.ids).get_indexer(pd.Index(table["id"]))
    if len(table) != len(data) or (rows < 0).any() or len(np.unique(rows)) != len(data):
        raise InputError(f"{folder / 'suspects.csv'} does not name the samples of this data set, each once.")
    order = rows.astype(np.int64)
    table = table.iloc[np.argsort(order)].reset_index(drop=True)
    flagged = table["flagged"].to_numpy(dtype=np.bool_)
    suggested = _numbers(table["suggested_label"].tolist(), data.spec.classes)
    return Session(folder, splits, table, order, flagged, suggested, Decisions(folder, data))


def _numbers(names: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    known = {name: number for number, name in enumerate(classes)}
    return np.array([known.get(name, -1) for name in names], dtype=np.int64)
