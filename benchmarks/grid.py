"""What the benchmark costs around the training itself, and what a second process gains: on small cells of `digits`.

Overhead around the training: wall time from the first cell's start to the last record over the time inside of epochs,
one worker: loading, poisoning, judging, checkpoints, the driver. The start of the worker process comes on top, once.
Speed-up: wall time with one worker over that with two, both from an empty ledger. Wall times, which other programs of a
busy machine stretch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from antibackdoor.bench.cell import Cell
from antibackdoor.bench.engines import Event, Local
from antibackdoor.bench.ledger import Ledger, read_ledger
from antibackdoor.bench.machine import cores
from antibackdoor.bench.run import Watcher, run_cells
from benchmarks.turns import ratio


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    cell = Cell(data="digits", attack="badnets", model="resnet18-w8", train_size=400, epochs=args.epochs, batch_size=64)
    cells = [replace(cell, seed=seed) for seed in range(args.cells)]
    one, two = run(cells, 1), run(cells, 2)
    return {
        "ratios": {
            "wall time of cells over their epochs, one worker": ratio(
                [one["after_start_seconds"]], [one["training_seconds"]]
            ),
            "one worker over two, wall time": ratio([one["wall_seconds"]], [two["wall_seconds"]]),
        },
        "cells": len(cells),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "one": one,
        "two": two,
    }


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
