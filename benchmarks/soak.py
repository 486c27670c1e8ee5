"""Runs a bench grid for a long time while its processes are killed at random, and counts what that did.

    python benchmarks/soak.py experiments/attacks-series.toml --ledger results --minutes 90 \\
        --out results/trust/soak.json

Every one to eight minutes a worker or, one time in eight, the bench itself is killed with SIGKILL; the bench is started
again after its own death. After `--minutes` the kills end and the grid goes on to its end (or to `--limit`). Then: does
every cell stand once, with no error, no process, no temporary file left behind (here, or in $TMPDIR, a folder of its
own), and did no process grow? Memory is compared over the lives of the processes: resident MiB once it had settled
and at the last look, of each that lived 10 minutes or longer, of which there must be some; cells differ in size, so a
worker may have grown by a quarter. The status is 1 where anything is wrong, and where the grid ended too early.
A worker killed before its first epoch may lose the same cell several times; the bench gives it out again.
Linux only: it reads `/proc`.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from antibackdoor.bench.grid import read_grid
from antibackdoor.bench.ledger import Ledger
from antibackdoor.environment import environment
from antibackdoor.files import write_json
from antibackdoor.training.job import make_fabric

WORKER, LOOK_SECONDS, SETTLED_SECONDS = "antibackdoor.bench.worker", 20, 60
GROWTH = {"bench": 1.1, "worker": 1.25}
"""Last over settled memory that is no leak, over ten minutes or longer."""


def processes(mark: str) -> dict[int, str]:
    """Processes that carry our mark in their environment, by id: "bench" or "worker"."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and "State:\tZ" not in (folder / "status").read_text()
            ):
                found[int(folder.name)] = "worker" if WORKER in (folder / "cmdline").read_text() else "bench"
        except OSError:
            continue  # it ended meanwhile
    return {pid: role for pid, role in found.items() if pid != os.getpid()}


def resident(pid: int) -> float:
    """MiB of memory that a process holds; 0 where it is gone."""
    try:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024
    except (OSError, IndexError):
        return 0.0


class Lives:
    """Memory of every process over its life."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[float, float, str]]] = {}

    def look(self, running: dict[int, str], now: float) -> None:
        """Note what each holds now."""
        for pid, role in running.items():
            if size := resident(pid):
                self.seen.setdefault(pid, []).append((now, size, role))

    def growth(self, role: str, minutes: float) -> list[dict[str, float]]:
        """Of each that lived `minutes` or longer: MiB once it had settled, and at the end."""
        found = []
        for looks in self.seen.values():
            settled = [look for look in looks if look[0] - looks[0][0] >= SETTLED_SECONDS]
            if looks[0][2] == role and settled and (lived := looks[-1][0] - looks[0][0]) >= 60 * minutes:
                row = {"minutes": lived / 60, "first_mib": settled[0][1], "last_mib": looks[-1][1]}
                found.append({key: round(value, 1) for key, value in row.items()})
        return found


def soak(command: list[str], mark: str, rng: random.Random, minutes: float, limit: float) -> dict[str, Any]:
    """Run `command` to its end, again after every death; returns what was counted."""
    kills, lives, wrong = Counter[str](), Lives(), list[str]()
    scratch = tempfile.mkdtemp(prefix=mark)
    env = {**os.environ, "ANTIBACKDOOR_SOAK": mark, "TMPDIR": scratch}
    begun = time.monotonic()
    bench = subprocess.Popen(command, env=env)
    after = begun + rng.uniform(60, 480)
    while bench.poll() is None:
        time.sleep(LOOK_SECONDS)
        now, running = time.monotonic(), processes(mark)
        lives.look(running, now)
        if now > begun + 60 * limit:
            bench.send_signal(signal.SIGTERM)
            bench.wait()
        elif now > after and now < begun + 60 * minutes:
            after = now + rng.uniform(60, 480)
            workers = [pid for pid, role in running.items() if role == "worker"]
            if rng.random() < 0.125 or not workers:
                bench.kill()
                bench.wait()
                kills["bench"] += 1
                time.sleep(15)
                wrong += [f"a worker outlived its bench: {pid}" for pid in processes(mark)]
                bench = subprocess.Popen(command, env=env)
            else:
                os.kill(rng.choice(workers), signal.SIGKILL)
                kills["worker"] += 1
            print(f"{(now - begun) / 60:.0f} min, kills: {dict(kills)}", flush=True)
    time.sleep(15)
    wrong += [f"still running: {pid}, a {role}" for pid, role in processes(mark).items()]
    wrong += [f"left over in $TMPDIR: {path.name}" for path in Path(scratch).iterdir()]
    shutil.rmtree(scratch)
    spent = round((time.monotonic() - begun) / 60, 1)
    memory = {role: lives.growth(role, 10) for role in GROWTH}
    for role, rows in memory.items():
        wrong += [f"no {role} lived long enough to see whether it grows"] * (not rows)
        wrong += [f"a {role} grew: {row}" for row in rows if row["last_mib"] > GROWTH[role] * row["first_mib"]]
    wrong += [f"the bench ended with status {bench.returncode}"] * bool(bench.returncode)
    wrong += [f"the grid ended after {spent} minutes; give a longer one"] * (spent < minutes)
    return {"minutes": spent, "status": bench.returncode, "kills": dict(kills), "memory": memory, "problems": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("grid", type=Path)
    parser.add_argument("--profile", default="")
    parser.add_argument("--only", default="", help="cells in whose name this expression is found")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--limit", type=float, default=24 * 60, help="minutes after which the grid is ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cells = [cell.name() for cell in read_grid(given.grid, given.profile or None).cells(given.only)]
    before = sum(name in Ledger(given.ledger) for name in cells)
    words = ["bench", str(given.grid), "--out", str(given.ledger), "--workers", str(given.workers), "--quiet"]
    words += ["--profile", given.profile] * bool(given.profile) + ["--only", given.only] * bool(given.only)
    command = [sys.executable, "-m", "antibackdoor.cli", *words]
    told = soak(command, f"soak-{os.getpid()}", random.Random(given.seed), given.minutes, given.limit)
    names = Counter(path.stem for path in given.ledger.rglob("*.json") if not path.name.endswith(".error.json"))
    ledger, problems = Ledger(given.ledger), told.pop("problems")
    problems += [f"not done: {name} ({ledger.error(name) or 'no error'})" for name in cells if name not in names]
    problems += [f"{count} records: {name}" for name, count in names.items() if count > 1]
    problems += [f"left over: {path.name}" for path in given.ledger.rglob("*.part")]
    problems += [f"left over: {path.name}" for path in (given.ledger / ".stages").glob("*") if path.name in names]
    record = {"command": shlex.join(["python", *sys.argv]), "cells": len(cells), "done_before": before, **told}
    record["problems"] = problems
    print(f"{len(cells) - before} cells in {told['minutes']} min, {told['kills']} kills; {len(problems)} problems")
    for problem in problems:
        print(f"  {problem}")
    if given.out:
        write_json(given.out, {**record, "environment": environment(make_fabric("cpu"))})
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
