"""On paper and in simulation: what 10^9 samples on 1,000 workers would cost, and what breaks first.

The arithmetic takes bytes and seconds that are measured here, on small sets: what the ranking and the partitions of
E2ABL keep of a sample, what a list of names and a table of suspects take, how long a shuffle takes. The simulation
splits scores over workers and finds the highest ones by counting - each worker sends a histogram, all zoom into the bin
where the cut lies - and compares with sorting everything in one place: the same rows, ties by row number included.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor

from antibackdoor.defenses.base import Partition
from antibackdoor.models import create
from antibackdoor.training.ranking import LossDrop, Persistence, top
from benchmarks.turns import random_images, ratio, timed

BINS = 2**16
FEATURES = 224 * 224 * 3


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128, help="samples a worker takes a step")
    parser.add_argument("--bandwidth", type=float, default=1e10, help="bytes a second between two workers, one way")
    parser.add_argument("--simulated", type=int, default=1_000_000, help="scores in the simulation")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    n, workers = args.samples, args.workers
    state, simulated = state_bytes(), simulation(args.simulated, workers)
    some = 2_000_000
    shuffle = min(timed(lambda: torch.randperm(some), torch.device("cpu")) for _ in range(3)) / some
    weights = sum(p.numel() for p in create("resnet34", random_images(2).spec).parameters())
    steps = n / workers / args.batch
    ring = 2 * 4 * weights / args.bandwidth
    return {
        "ratios": {
            # Added up in a ring, a histogram passes every worker twice.
            "bytes to every worker: all scores over histograms": ratio([8 * n], [2.0 * simulated["bytes_a_worker"]]),
            "rows that differ from sorting everything": ratio([float(simulated["different"])], [1.0], most=0),
        },
        "measured": {
            "state_bytes_a_sample": state,
            "shuffle_seconds_a_sample": float(f"{shuffle:.3g}"),
            "weights_of_resnet34": weights,
        },
        "simulation": simulated,
        "worked_out": {
            "samples_of_a_worker": n / workers,
            "decoded_gigabytes_of_a_worker_224x224": FEATURES * n / workers / 1e9,
            "state_gigabytes_of_a_worker_if_split": sum(state.values()) * n / workers / 1e9,
            "state_gigabytes_of_a_worker_if_not_split": sum(state.values()) * n / 1e9,
            "shuffle_of_all_rows_seconds": shuffle * n,
            "shuffle_of_all_rows_gigabytes": 8 * n / 1e9,
            "shuffle_of_own_rows_seconds": shuffle * n / workers,
            "all_scores_gigabytes": 8 * n / 1e9,
            "all_scores_seconds": 8 * n / args.bandwidth,
            "steps_an_epoch": steps,
            "gradients_megabytes_a_step": 2 * 4 * weights / 1e6,
            "gradients_seconds_a_step": ring,
            "gradients_seconds_an_epoch": ring * steps,
        },
        "assumed": {"samples": n, "workers": workers, "batch": args.batch, "bandwidth": args.bandwidth},
    }


def state_bytes(n: int = 10_000) -> dict[str, float]:
    """Bytes a sample of what stays in memory beside the samples, measured on the real things."""

    def tensors(*found: Tensor) -> float:
        return sum(t.numel() * t.element_size() for t in found) / n

    persistence, drop, flags = Persistence(n, 0), LossDrop(n), torch.zeros(n, dtype=torch.bool)
    partition = Partition(0, flags, flags.clone(), torch.zeros(n, dtype=torch.int64))
    names = [f"train/class_{row % 10}/{row:09d}.jpg" for row in range(n)]
    return {
        "label": tensors(torch.zeros(n, dtype=torch.int64)),
        "name": sum(map(sys.getsizeof, names)) / n + 8,
        "ranking (persistence)": tensors(persistence.total),
        "ranking (loss_drop)": tensors(drop.last, drop.total),
        "one partition (of each epoch)": tensors(partition.isolated, partition.recovered, partition.labels),
    }


def simulation(n: int, workers: int, share: float = 0.01) -> dict[str, Any]:
    """The rows with the highest scores, found by workers that each hold a part; against `top` of all in one place."""
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=n).round(4)  # with many ties
    count = round(share * n)
    parts = np.array_split(scores, workers)
    cut, above, rounds = threshold(parts, count)
    chosen: list[npt.NDArray[np.int64]] = []
    # Ties: every worker tells how many scores it has at the cut, and takes what those before it left.
    left, start = count - above, 0
    for part in parts:
        ties = np.flatnonzero(part == cut)[:left]
        left -= len(ties)
        chosen.append(start + np.union1d(np.flatnonzero(part > cut), ties))
        start += len(part)
    found = np.concatenate(chosen)
    want = top(torch.from_numpy(scores), count).sort().values.numpy()
    return {
        "scores": n,
        "workers": workers,
        "chosen": count,
        "rounds": rounds,
        "bytes_a_worker": 8 * (BINS * rounds + 3),
        "different": len(np.setxor1d(found, want)),
    }


def threshold(parts: list[npt.NDArray[np.float64]], count: int) -> tuple[float, int, int]:
    """The `count`-th highest score, how many lie above it, and the rounds of histograms that it took."""
    low, high = min(part.min() for part in parts), max(part.max() for part in parts)
    above, rounds = 0, 0
    while True:
        rounds += 1
        edges = np.linspace(low, high, BINS + 1)
        total = sum(np.histogram(part, edges)[0] for part in parts)  # what all workers add up
        from_top = above + np.cumsum(total[::-1])
        place = int(np.searchsorted(from_top, count))
        above = int(from_top[place - 1]) if place else above
        low, high = edges[BINS - place - 1], edges[BINS - place]
        inside = [part[(part >= low) & (part <= high if place == 0 else part < high)] for part in parts]
        distinct = np.unique(np.concatenate(inside))
        if len(distinct) == 1:  # each worker sends its smallest and largest score of the bin: they agree
            return float(distinct[0]), above, rounds
        low, high = float(distinct[0]), float(distinct[-1])
