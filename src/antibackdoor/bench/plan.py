"""What a grid will take: time and memory of cells, from what the ledger measured of cells like them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.ledger import Record, read_ledger
from antibackdoor.options import flat

MEMORY_MIB = 1536
"""What a cell is taken to need where nothing like it was measured."""


class Estimates:
    """Seconds and memory of cells, by data, model and defense, on the same sort of device.

    Time is that of whole cells, of those whose defense has the most options as here and, among these, of the same
    attack where one was measured, since some are fitted first. It is scaled by training samples and by epochs,
    `seconds * (n / n') * (e / e')`; where only one of the two cells says its epochs, or the size of the set is not
    known, nothing is claimed.
    """

    def __init__(self, ledger: Path, device: str = "auto"):
        kind = device.partition(":")[0]
        self._groups: dict[tuple[str, str, str], list[Record]] = {}
        self._sizes: dict[str, int] = {}
        for record in read_ledger(ledger).values():
            if kind != "auto" and not record["environment"]["device"].startswith(kind):
                continue
            cell = record["cell"]
            self._groups.setdefault(_key(cell), []).append(record)
            scale = record.get("scale", {})
            if "train_full" in scale:
                self._sizes[cell["data"]] = scale["train_full"]
            elif cell.get("train_size") is None:
                self._sizes.setdefault(cell["data"], record["measures"]["poisoned_samples"]["n"])

    def seconds(self, cell: Cell) -> float | None:
        """The median over the cells most like it; None where there are none."""
        found: dict[tuple[int, bool], list[float]] = {}
        for record in self._groups.get(_key(vars(cell)), []):
            if (seconds := self._scaled(cell, record)) is not None:
                found.setdefault(_unlike(cell, record["cell"]), []).append(seconds)
        return statistics.median(found[min(found)]) if found else None

    def memory(self, cell: Cell) -> int:
        """MiB: the most that a cell like it took."""
        known = [record["cost"].get("peak_memory_mib") for record in self._groups.get(_key(vars(cell)), [])]
        return max((value for value in known if value), default=MEMORY_MIB)

    def longest_first(self, names: Iterable[str], cells: Mapping[str, Cell], *, keep: bool = False) -> list[str]:
        """Names with those of unknown time in front, since they may be the longest; `keep`: as they are."""
        names = list(names)
        if keep:
            return names

        def length(name: str) -> float:
            seconds = self.seconds(cells[name])
            return float("inf") if seconds is None else seconds

        return sorted(names, key=length, reverse=True)

    def _scaled(self, cell: Cell, record: Record) -> float | None:
        other = record["cell"]
        n = self._size(cell.data, cell.train_size)
        m = record["measures"]["poisoned_samples"]["n"]
        if n is None and cell.train_size == other.get("train_size"):
            n = m
        epochs = (cell.epochs, other.get("epochs"))
        if n is None or (epochs[0] is None) != (epochs[1] is None):
            return None
        factor = 1.0 if epochs[0] is None or epochs[1] is None else epochs[0] / epochs[1]
        cost = record["cost"]
        seconds = max(cost.get("wall_seconds", 0.0), cost["seconds"])  # of a resumed cell the first is its last part
        return float(seconds) * factor * n / float(m)

    def _size(self, data: str, size: int | None) -> int | None:
        full = self._sizes.get(data)
        return full if size is None else size if full is None else min(size, full)


def _key(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    return cell["data"], cell["model"], cell["defense"]


def _unlike(cell: Cell, other: Mapping[str, Any]) -> tuple[int, bool]:
    """In how many options of the defense they differ, and whether in the attack."""
    own, its = (dict(flat(changes)) for changes in (cell.defense_options, other["defense_changes"]))
    missing = object()
    differ = sum(own.get(name, missing) != its.get(name, missing) for name in own.keys() | its.keys())
    return differ, other["attack"] != cell.attack


def plan_text(cells: list[Cell], excluded: Mapping[str, str], ledger_names: Iterable[str], estimates: Estimates,
              workers: int) -> str:  # fmt: skip
    """Cells done, missing and left out, each with its time where that is known, and the time of all together.

    The whole is the sum over the missing cells, divided by the workers, or the longest cell where that is more.
    """
    done = set(ledger_names)
    lines, known, unknown = [], [], 0
    for cell in cells:
        name = cell.name()
        if name in done:
            lines.append(f"done      {name}")
            continue
        seconds = estimates.seconds(cell)
        unknown += seconds is None
        known += [] if seconds is None else [seconds]
        lines.append(f"missing   {name}  ({'unknown' if seconds is None else duration(seconds)})")
    lines += [f"left out  {name}  ({reason})" for name, reason in excluded.items()]
    missing = len(known) + unknown
    total = max([sum(known) / workers, *known]) if known else 0.0
    time = duration(total) + (f" and {unknown} of unknown time" if unknown else "") if known else "unknown"
    counts = f"{len(cells)} cells: {len(cells) - missing} done, {missing} missing, {len(excluded)} left out"
    ahead = f"; estimated time with {workers} worker{'s' if workers > 1 else ''}: {time}" if missing else ""
    return "\n".join([*lines, counts + ahead])


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
