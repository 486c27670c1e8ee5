"""The ledger: a folder with one small JSON a cell, written once and never edited; tables are made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from antibackdoor.errors import InputError
from antibackdoor.files import lock, read_object, write_text

Record = dict[str, Any]


class _Cell(BaseModel):
    data: str
    model: str
    attack: str
    attack_options: dict[str, Any]
    defense: str
    defense_changes: dict[str, Any] | None = None
    clean_share: FiniteFloat | None = None
    seed: int


class _Rate(BaseModel):
    value: FiniteFloat | None


class _Count(BaseModel):
    count: int
    n: int


NONE = _Rate(value=None)


class _Partition(BaseModel):
    precision_clean_set: _Rate = NONE
    precision_top_1_percent: _Rate = NONE
    recall_isolated_set: _Rate = NONE
    true_labels_recovered: _Rate = NONE


class _Measures(BaseModel):
    clean_accuracy: _Rate = NONE
    attack_success_rate: _Rate = NONE
    excess_attack_success_rate: _Rate = NONE
    recovery_accuracy: _Rate = NONE
    poisoned_samples: _Count = _Count(count=0, n=0)
    detection: dict[str, _Rate] = {}
    partitions: list[_Partition] = []


class _Told(BaseModel):
    """What tables read of a record; there may be more."""

    cell: _Cell
    measures: _Measures


class Ledger:
    """Records by the name of their cell, anywhere under one folder; new ones are written to the folder itself."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._found: dict[str, Path] = {path.stem: path for path in _paths(folder)}

    def __len__(self) -> int:
        """How many cells were done when it was opened, or since then by this process."""
        return len(self._found)

    def __contains__(self, name: str) -> bool:
        """Whether the cell is done, also when another process has just finished it."""
        return name in self._found or (self.folder / f"{name}.json").exists()

    def write(self, name: str, record: Record) -> None:
        """Put a finished cell in place, in one step; its earlier error is forgotten. Nothing is written over a record.

        Raises FileExistsError where the cell is done already.
        """
        if name in self:
            raise FileExistsError(f"{name} is in the ledger {self.folder} already")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        write_text(path, compact(record))
        self._found[name] = path
        self.forget_error(name)

    def write_error(self, name: str, error: Record) -> None:
        """Say why a cell broke, in `NAME.error.json`; it is tried again by the next call."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._error(name), compact(error))

    def forget_error(self, name: str) -> None:
        """Remove what an earlier call left of a cell that is done by now."""
        self._error(name).unlink(missing_ok=True)

    def error(self, name: str) -> str | None:
        """What went wrong with a cell, where something did."""
        path = self._error(name)
        return str(read_object(path).get("error", "unknown")) if path.exists() else None

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold a cell, so that no other process on this ledger runs it too; False where another holds it.

        The claim ends with the process, however that ends.
        """
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with lock(locks / name, wait=False) as mine:
            for part in self.folder.glob(f".{escape(name)}.*.part") if mine else ():
                part.unlink(missing_ok=True)  # of a writer that was killed
            yield mine

    def _error(self, name: str) -> Path:
        return self.folder / f"{name}.error.json"


def read_ledger(folder: Path) -> dict[str, Record]:
    """All records under a ledger's folder by the name of their cell; one that lies in two places counts once."""
    return {path.stem: record for path in _paths(folder) if "measures" in (record := read_object(path))}


def checked(records: Mapping[str, Record]) -> dict[str, Record]:
    """Records by name as they are; InputError where one is not what tables are made from."""
    for name, record in records.items():
        try:
            _Told.model_validate(record)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            raise InputError(
                f"{name}.json is no record of a cell: {where}: {wrong['msg']}; mend or remove it."
            ) from None
    return dict(records)


def _paths(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    inside = [(path, path.relative_to(folder).parts) for path in paths]
    return [path for path, parts in inside if not path.name.endswith(".error.json") and not parts[0].startswith(".")]


def compact(record: Record) -> str:
    """A record as JSON text, one line a key and one line a row of a list: small, and readable as a difference."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(_json(row) for row in value)
            lines.append(f'"{key}": [\n  {rows}\n ]')
        else:
            lines.append(f'"{key}": {_json(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def digest(history: list[Record]) -> str:
    """16 digits that two runs share whose histories agree in everything but the time they took."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
