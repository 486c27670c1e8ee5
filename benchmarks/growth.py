"""Time and peak memory by the number of samples, each in a process of its own: in memory and read from disk.

The model is one linear layer, so that what is measured is our own machinery: reading, checking, shuffling, gathering,
decoding, one epoch of training with every loss kept, one scoring pass. The images are generated: an `.npz`, and a
folder of PNG files that is decoded into a copy on disk first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from PIL import Image

from benchmarks.turns import ratio

SIDE = 16
BYTES = 3 * SIDE * SIDE
RUN = """
import json, sys, time
import torch
from antibackdoor.bench.machine import MIB, peak_memory
from antibackdoor.data.core import check_trainable
from antibackdoor.data.load import load
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import logits_of, losses

spent, started = {}, time.process_time()
def lap(name):
    global started
    now = time.process_time()
    spent[name], started = now - started, now

lap("import")
data = load(sys.argv[1], memory_map=sys.argv[2] == "disk").train
lap("read")
check_trainable(data)
data.fingerprint()
lap("check")
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, len(data.spec.classes)))
job = Job(data, model=model, fabric=make_fabric("cpu"))
model = job.model()
job.fit("one", model, CrossEntropy(), Recipe(epochs=1, min_steps=0, batch_size=128, augment="none"))
lap("epoch")
losses(logits_of(model, data, job.fabric), data.y)
lap("scoring pass")
print(json.dumps({"seconds": spent, "peak_bytes": peak_memory() * MIB}))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--files", type=int, nargs="*", default=[1_000, 10_000], help="images in a folder")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for n in args.sizes:
            file = generated_npz(Path(name) / f"{n}.npz", n)
            runs += [{"source": "npz", "where": where, "n": n, **one(file, where)} for where in ("memory", "disk")]
        for n in args.files:
            folder = generated_folder(Path(name) / str(n), n)
            runs += [{"source": "folder", "where": where, "n": n, **one(folder, where)} for where in ("memory", "disk")]
    peak = {(run["source"], run["where"], run["n"]): float(run["peak_bytes"]) for run in runs}
    time = {key: sum(run["seconds"][part] for part in ("read", "check", "epoch", "scoring pass")) for key, run in
            zip(peak, runs, strict=True)}  # fmt: skip
    first, before, last = args.sizes[0], args.sizes[-2], args.sizes[-1]

    def grown(where: str, start: int) -> float:
        return peak["npz", where, last] - peak["npz", where, start]

    added = float(last - before)
    return {
        "ratios": {
            f"in memory: peak at {last:,} less that at {first:,}, over the samples' bytes": ratio(
                [grown("memory", first)], [float(BYTES * (last - first))], most=1.3
            ),
            f"from disk: peak at {last:,} over that at {before:,}": ratio(
                [peak["npz", "disk", last]], [peak["npz", "disk", before]]
            ),
            f"from disk: bytes that a sample adds, {before:,} to {last:,}": ratio([grown("disk", before)], [added]),
            f"from disk over in memory, time at {last:,}": ratio(
                [time["npz", "disk", last]], [time["npz", "memory", last]]
            ),
            f"time a sample at {last:,} over that at {before:,}, from disk": ratio(
                [time["npz", "disk", last] / last], [time["npz", "disk", before] / before]
            ),
        },
        "bytes_a_sample": BYTES,
        "runs": runs,
    }


def generated_npz(file: Path, n: int) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(file, x=x, y=np.arange(n) % 10)
    return file


def generated_folder(folder: Path, n: int) -> Path:
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for row in range(n):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(row % 10) / f"{row:07d}.png", compress_level=0)
    return folder


def one(source: Path, where: str) -> dict[str, Any]:
    """A run in a process of its own, its figures as it tells them."""
    words = [sys.executable, "-c", RUN, str(source), where]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    told["seconds"] = {name: round(value, 2) for name, value in told["seconds"].items()}
    return told
