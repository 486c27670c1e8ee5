"""How long a user waits before anything happens: `--help`, the import, a run that is already done.

Each in a process of its own, wall time; the ratios are over a Python that does nothing. `--help` has a goal in seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from benchmarks.turns import ratio, rounded

HELP = "import sys; sys.argv = ['antibackdoor', '--help']; from antibackdoor.cli import main; main()"
SCRIPTS = {
    "python alone": "pass",
    "import antibackdoor": "import antibackdoor",
    "antibackdoor --help": HELP,
    "import torch": "import torch",
    "from antibackdoor import train": "from antibackdoor import train",
}
TRAIN = """
import sys
sys.argv = ["antibackdoor", "train", "digits", "--defense", "none", "--model", "resnet18-w8", "--epochs", "3", "--set",
            "recipe.min_steps=0", "--device", "cpu", "--quiet", "--out", {out!r}, *{more!r}]
from antibackdoor.cli import main
main()
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    pass


def seconds_of(script: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env={**os.environ, "COLUMNS": "80"})
    return time.perf_counter() - started


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:

        def train(number: int, *more: str) -> Callable[[], float]:
            return lambda: seconds_of(TRAIN.format(out=str(Path(folder) / str(number)), more=list(more)))

        seconds: dict[str, list[float]] = {}
        for number in range(args.repeats + 1):
            parts = {name: (lambda script=script: seconds_of(script)) for name, script in SCRIPTS.items()}  # type: ignore[misc]
            parts |= {"a short training": train(number), "the same, resumed when done": train(number, "--resume")}
            for name, part in parts.items():
                spent = part()
                if number:  # the first round reads files into memory
                    seconds.setdefault(name, []).append(spent)
    ones = [1.0] * args.repeats
    shown = {
        "antibackdoor --help, seconds": ratio(seconds["antibackdoor --help"], ones, most=0.7),
        "antibackdoor --help over python alone": ratio(seconds["antibackdoor --help"], seconds["python alone"]),
        "import antibackdoor over python alone": ratio(seconds["import antibackdoor"], seconds["python alone"]),
        "from antibackdoor import train over import torch": ratio(
            seconds["from antibackdoor import train"], seconds["import torch"]
        ),
        "a finished run resumed over the run": ratio(
            seconds["the same, resumed when done"], seconds["a short training"]
        ),
    }
    return {"ratios": shown, "wall_seconds": rounded(seconds)}
