"""The driver: gives the missing cells of a grid to an engine, and brings their records home to the ledger."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.engines import Engine, Event, Task
from antibackdoor.bench.ledger import Ledger
from antibackdoor.bench.plan import Estimates
from antibackdoor.files import sweep

LOST = 3
"""A cell whose worker or node went away is given out again, this many times without an epoch between them."""
POLL_SECONDS = 0.5


class Watcher:
    """Hears how a run of many cells goes on; the command line shows it, this base ignores it."""

    def begin(self, missing: int, done: int) -> None:
        """Before the first cell."""

    def start(self, name: str) -> None:
        """A cell was handed to the engine."""

    def epoch(self, name: str, content: dict[str, Any]) -> None:
        """A cell passed an epoch: "stage", "epoch", "epochs" and, after its first, "seconds"."""

    def end(self, name: str, event: Event) -> None:
        """A cell is done, broke, or was lost and will be given out again."""


def run_cells(
    cells: Iterable[Cell],
    ledger: Ledger,
    engine: Engine,
    *,
    stages: Path,
    device: str = "auto",
    watcher: Watcher | None = None,
) -> list[str]:
    """Run the cells that the ledger lacks, and return the names of those that broke.

    A cell that breaks leaves `NAME.error.json` and does not stop the rest; the next call tries it again.

    stages: a scratch folder in which a killed cell's checkpoints wait for the next call. Several processes may work on
    one ledger at once: they share the cells out among themselves, and each returns when all are done. Cells that run
    beside each other start with the longest, as far as the ledger knows. Engines that run one at a time keep the order.
    """
    watcher = watcher or Watcher()
    by_name = {cell.name(): cell for cell in cells}
    missing = [name for name in by_name if name not in ledger]
    for name in by_name.keys() - set(missing):  # of a call that was killed just after it had written a record
        ledger.forget_error(name)
        shutil.rmtree(stages / name, ignore_errors=True)
    estimates = Estimates(ledger.folder, device)
    waiting = [
        Task(name, by_name[name], stages / name, device, estimates.memory(by_name[name]))
        for name in estimates.longest_first(missing, by_name, keep=not engine.parallel)
    ]
    watcher.begin(len(waiting), len(by_name) - len(waiting))
    run = _Run(ledger, engine, watcher)
    with ExitStack() as stack:
        stack.callback(run.release)
        stack.enter_context(engine)
        while waiting or run.claims:
            waiting = run.hand_out(waiting)
            if not run.claims:
                time.sleep(POLL_SECONDS if waiting else 0)  # what is left, if anything, runs in another process
                continue
            for event in engine.poll(POLL_SECONDS):
                waiting = run.hear(event) + waiting  # what was lost goes on first: its checkpoints are there
    return run.broken


class _Run:
    """The state of one call: claims on cells that run here, and how often each was lost."""

    def __init__(self, ledger: Ledger, engine: Engine, watcher: Watcher):
        self.ledger, self.engine, self.watcher = ledger, engine, watcher
        self.broken: list[str] = []
        self.claims: dict[str, tuple[Task, ExitStack]] = {}
        self.lost: Counter[str] = Counter()

    def hand_out(self, waiting: list[Task]) -> list[Task]:
        """Submit what the engine takes and no other process holds; returns what still waits."""
        left = []
        for number, task in enumerate(waiting):
            if not self.engine.ready(task):
                left += waiting[number:]
                break
            claim = ExitStack()
            if not claim.enter_context(self.ledger.claim(task.name)):
                left.append(task)  # another process runs it
            elif task.name in self.ledger:
                claim.close()  # another process has run it
            else:
                sweep(task.stages)
                self.claims[task.name] = (task, claim)
                self.watcher.start(task.name)
                self.engine.submit(task)
        return left

    def hear(self, event: Event) -> list[Task]:
        """Deal with an event; returns the task where it has to be given out again."""
        if event.kind == "epoch":
            if event.content["epoch"]:  # it gets on, however often its worker goes away
                self.lost[event.name] = 0
            self.watcher.epoch(event.name, event.content)
            return []
        task, claim = self.claims.pop(event.name)
        self.lost[event.name] += event.kind == "lost"
        again = event.kind == "lost" and self.lost[event.name] < LOST
        if event.kind == "done":
            self.ledger.write(event.name, event.content)
            shutil.rmtree(task.stages, ignore_errors=True)
        elif not again:
            self.ledger.write_error(event.name, {"cell": asdict(task.cell), **event.content})
            self.broken.append(event.name)
        claim.close()
        self.watcher.end(event.name, event)
        return [task] if again else []

    def release(self) -> None:
        """Let go of what is left when a run is interrupted."""
        for _, claim in self.claims.values():
            claim.close()
