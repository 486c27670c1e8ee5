"""What a person decided about single samples: one line of JSON each in `review.jsonl`, appended and never rewritten."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout

from antibackdoor.data.core import Data
from antibackdoor.errors import InputError
from antibackdoor.files import append_to
from antibackdoor.limits import MAX_TABLE, read_bytes

Decision: TypeAlias = Literal["keep", "drop", "relabel", "undecided"]
Undecided: TypeAlias = Literal["drop", "keep", "suggest"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
UNDECIDED, KEEP, DROP, RELABEL = -1, -2, -3, 0
"""Codes of decisions; 0 and more is the class a sample was given."""
NAME, LOCK = "review.jsonl", ".review.lock"


class Decisions:
    """The decisions about the samples of one set, `codes` (n,): a class number, or one of the codes above.

    Every change is on the disk before it counts, and the last thousand can be taken back, also by the next program that
    opens the file: `done` has rows and their codes before. A line that is no JSON is passed over, wherever it stands: a
    killed program left it half-written, and the next one went on with a line of its own. Only one program at a time may
    hold the file (`hold`). Raises InputError for a line that is no decision, or that speaks of other samples.
    """

    def __init__(self, folder: Path, data: Data):
        self.path, self.data = folder / NAME, data
        self.codes: npt.NDArray[np.int64] = np.full(len(data), UNDECIDED, dtype=np.int64)
        self.done: deque[tuple[int, int]] = deque(maxlen=1000)
        self._rows = {name: row for row, name in enumerate(data.ids)}
        self._classes = {name: number for number, name in enumerate(data.spec.classes)}
        self._torn = False
        self._one = threading.Lock()
        self._lock = FileLock(folder / LOCK)
        if self.path.exists():
            self._read()

    def hold(self) -> None:
        """Keep other programs from writing here until this one ends."""
        try:
            append_to(self.path.with_name(LOCK)).close()  # a plain file, which the library cannot tell from others
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.path.parent} is being reviewed by another program; end that one first.") from None
        except OSError as error:
            raise InputError(f"cannot write in {self.path.parent}: {error.strerror or error}.") from None

    def release(self) -> None:
        """Let others write again."""
        self._lock.release()

    def decide(self, rows: Sequence[int], decision: Decision, label: str | None = None) -> None:
        """Note one decision about these rows; it is on the disk when this returns."""
        self.put([(row, self.code(decision, label)) for row in rows])

    def code(self, decision: str, label: str | None) -> int:
        """The code of a decision; InputError for one there is not, and for a class that the data do not have."""
        if decision not in DECISIONS or (decision == "relabel") != (label is not None):
            raise InputError("a decision is keep, drop, undecided, or relabel with a class.")
        if label is None:
            return {"keep": KEEP, "drop": DROP, "undecided": UNDECIDED}[decision]
        if label not in self._classes:
            raise InputError(f"there is no class {label!r} in this data set.")
        return self._classes[label]

    def put(self, changes: Sequence[tuple[int, int]]) -> None:
        """Append (row, code) pairs in one write."""
        with self._one:
            self._append([self._line(row, code) for row, code in changes])
            for row, code in changes:
                self._set(row, code)

    def undo(self) -> int | None:
        """Take the last decision back; the row that it was about, or None where there is none."""
        with self._one:
            if not self.done:
                return None
            row, before = self.done[-1]
            self._append([{**self._line(row, before), "undo": True}])
            self._set(row, before, undo=True)
            return row

    def _set(self, row: int, code: int, *, undo: bool = False) -> None:
        if not undo:
            self.done.append((row, int(self.codes[row])))
        elif self.done:
            self.done.pop()
        self.codes[row] = code

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            with append_to(self.path) as file:
                file.write(("\n" if self._torn else "").encode() + lines.encode())
                self._torn = True
                file.flush()
                os.fsync(file.fileno())
                self._torn = False
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}.") from None

    def _line(self, row: int, code: int) -> dict[str, str]:
        decision = {UNDECIDED: "undecided", KEEP: "keep", DROP: "drop"}.get(code, "relabel")
        label = {"label": self.data.spec.classes[code]} if code >= 0 else {}
        return {"id": self.data.ids[row], "decision": decision, **label}

    def _read(self) -> None:
        try:
            text = read_bytes(self.path, MAX_TABLE).decode("utf-8", "replace")
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}.") from None
        self._torn = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                told = json.loads(line) if line.strip() else None
            except ValueError:
                continue  # a write that was cut off
            except RecursionError:
                raise InputError(f"{self.path} line {number} is nested too deeply.") from None
            if told is None:
                continue
            name = told.get("id") if isinstance(told, dict) else None
            if not isinstance(name, str) or name not in self._rows:
                raise InputError(f"{self.path} line {number} names a sample that is not in this data set.")
            try:
                code = self.code(told.get("decision", ""), told.get("label"))
            except (InputError, TypeError) as error:
                raise InputError(f"{self.path} line {number}: {error}") from None
            self._set(self._rows[name], code, undo=told.get("undo") is True)

    def cleaned(
        self, flagged: npt.NDArray[np.bool_], suggested: npt.NDArray[np.int64], undecided: Undecided = "drop"
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which samples stay `(n,)` and their labels `(n,)`.

        undecided: what becomes of flagged samples that nobody decided about: dropped, kept as they are labeled, or
        given the suggested label where there is one and dropped otherwise. Samples that are not flagged stay.
        """
        given = self.data.y.cpu().numpy()
        open_ = flagged & (self.codes == UNDECIDED)
        labels = np.where(self.codes >= 0, self.codes, given)
        stays = self.codes != DROP
        if undecided == "drop":
            stays &= ~open_
        elif undecided == "suggest":
            labels = np.where(open_ & (suggested >= 0), suggested, labels)
            stays &= ~(open_ & (suggested < 0))
        return stays, labels


def take_cleaned(data: Data, stays: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]) -> Data:
    """The samples that stay, with these labels."""
    if not stays.any():
        raise InputError("no sample is left: everything was dropped.")
    relabeled = replace(data, y=torch.from_numpy(labels).to(data.y.device))
    return relabeled.take(torch.from_numpy(np.flatnonzero(stays)))
