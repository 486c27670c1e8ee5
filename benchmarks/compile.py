"""Whether compiling the network (`torch.compile`) pays: steps of the same training, eager and compiled.

Compiled whole, by what a user would write, `torch.compile(model)`; and what that costs before the first step, in eager
epochs of a set of the size of CIFAR-10. The package does not compile: methods cut a network at a tap, send it
batches of other sizes and look into it, and each of these compiles it anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from antibackdoor.training.job import Job
from benchmarks.turns import random_images, ratio, rounded, take_turns

TRAIN = 50_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="wideresnet16_1")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    data = random_images(args.batch)
    job = Job(data, model=args.model, fabric=fabric)
    x, y = data.spec.decode(job.data.x[torch.arange(args.batch)]), job.data.y

    def steps(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)

        def run() -> None:
            model.train()
            for _ in range(args.steps):
                with fabric.autocast():
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        return run

    compiled = steps(torch.compile(job.model("compiled")))  # type: ignore[arg-type]
    started = time.perf_counter()
    compiled()
    first = time.perf_counter() - started
    seconds = take_turns({"eager": steps(job.model("eager")), "compiled": compiled}, args.repeats, fabric.device)
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
