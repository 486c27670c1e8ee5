"""What the benchmark costs around the training itself, and what a second process gains: on small cells of `digits`.

    python benchmarks/bench_overhead.py [--cells 6] [--epochs 100] [--out FILE.json]

Overhead around the training: 1 - (time inside epochs) / (wall time from the first cell's start to the last record), one
worker: loading, poisoning, judging, checkpoints, the driver. Of it, what is outside of the cells. The start of the
worker process comes on top, once. Speed-up: wall time with one worker over that with two, both from an empty ledger.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.engines import Event, Local
from antibackdoor.bench.ledger import Ledger, read_ledger
from antibackdoor.bench.machine import cores
from antibackdoor.bench.run import Watcher, run_cells
from antibackdoor.files import write_json


class Clock(Watcher):
    """When the first cell began to train, and when the last came home."""

    def begin(self, missing: int, done: int) -> None:
        self.started, self.first, self.last = time.perf_counter(), 0.0, 0.0

    def epoch(self, name: str, content: dict[str, Any]) -> None:
        self.first = self.first or time.perf_counter()

    def end(self, name: str, event: Event) -> None:
        self.last = time.perf_counter()


def run(cells: list[Cell], workers: int) -> dict[str, float]:
    """Wall time of a grid from an empty ledger, and what its records say of their own."""
    with tempfile.TemporaryDirectory() as folder:
        clock, started = Clock(), time.perf_counter()
        engine = Local(workers)
        engine.threads = 1
        broken = run_cells(
            cells, Ledger(Path(folder) / "l"), engine, stages=Path(folder) / "s", device="cpu", watcher=clock
        )
        wall = time.perf_counter() - started
        records = read_ledger(Path(folder) / "l").values()
        if broken:
            raise SystemExit(f"{len(broken)} cells broke")
        return {
            "wall_seconds": wall,
            "start_seconds": clock.first - clock.started,
            "after_start_seconds": clock.last - clock.first,
            "cell_seconds": sum(record["cost"]["wall_seconds"] for record in records),
            "training_seconds": sum(sum(row["seconds"] for row in record["history"]) for record in records),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cell = Cell(
        data="digits", attack="badnets", model="resnet18-w8", train_size=400, epochs=options.epochs, batch_size=64
    )
    cells = [replace(cell, seed=seed) for seed in range(options.cells)]
    one, two = run(cells, 1), run(cells, 2)
    result = {
        "cells": len(cells),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "overhead_around_training": 1 - one["training_seconds"] / one["after_start_seconds"],
        "overhead_outside_of_cells": 1 - one["cell_seconds"] / one["after_start_seconds"],
        "speed_up_of_two": one["wall_seconds"] / two["wall_seconds"],
        "one": one,
        "two": two,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
