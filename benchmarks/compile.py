"""Whether compiling the network (`--compile`) pays: epochs of the same plain training, eager and compiled.

And what that costs before the first step, in eager epochs of a set of the size of CIFAR-10.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from lightning_fabric import Fabric

from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy
from benchmarks.turns import endless, random_images, ratio, rounded, take_turns

TRAIN = 50_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="wideresnet16_1")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    job = Job(random_images(args.batch * args.steps), model=args.model, fabric=fabric)
    recipe = Recipe(batch_size=args.batch)
    torch.compiler.config.force_disable_caches = True  # what an earlier run compiled would be taken from the disk
    eager, compiled = (
        endless(job, name, job.model(name), CrossEntropy(), recipe, compiled=name == "compiled")
        for name in ("eager", "compiled")
    )
    started = time.perf_counter()
    compiled.run_epoch(Progress())
    first = time.perf_counter() - started
    parts = {fit.stage: (lambda fit=fit: fit.run_epoch(Progress())) for fit in (eager, compiled)}  # type: ignore[misc]
    seconds = take_turns(parts, args.repeats, fabric.device)
    epoch = [TRAIN / args.batch / args.steps * value for value in seconds["eager"]]
    return {
        "ratios": {
            f"rate compiled over eager, {args.model}": ratio(seconds["eager"], seconds["compiled"]),
            f"compiling over an eager epoch of 50,000, {args.model}": ratio([first] * len(epoch), epoch),
        },
        "seconds_per_turn": rounded(seconds),
        "seconds_to_compile": first,
        "steps": args.steps,
        "batch": args.batch,
    }
