"""What E2ABL costs over plain training of the same backbone: seconds an epoch, side by side in one run, and parameters.

Plain epochs, warm-up epochs (shallow part and second head only, with the passes that rank the samples), the ranking by
company between both stages, and dual epochs take turns; the ratio of a whole run follows from each round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric

from antibackdoor.data.batches import gather
from antibackdoor.defenses.dual_head import Dual
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.defenses.trap import Trap
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress
from antibackdoor.training.objectives import CrossEntropy
from benchmarks.turns import endless, random_images, ratio, rounded, take_turns

PAPER = "resnet34"
"""The network of the paper, of which only parameters are counted here."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--epochs", type=int, default=60, help="of the whole run that the ratio is worked out for")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    job = Job(random_images(args.samples), model=args.model, fabric=fabric)
    method = E2ABL()
    assert method.warm_up is not None
    example = gather(job.data, torch.arange(2), fabric.device).x
    tap = Tap(job.model("dual"), None, 10, example)
    trap = Trap(method, job)
    dual = Dual(method, job, trap)
    dual.partition(tap, 0)

    fits = (
        endless(job, "plain", job.model("plain"), CrossEntropy(), method.main),
        endless(job, "warm-up", tap, trap, method.warm_up, tap.warm_up_parameters()),
        endless(job, "dual", tap, dual, method.main),
    )
    parts: dict[str, Callable[[], object]] = {
        fit.stage: (lambda fit=fit: fit.run_epoch(Progress()))  # type: ignore[misc]
        for fit in fits
    }
    seconds = take_turns({**parts, "ranking": lambda: trap.company(tap)}, args.repeats, fabric.device)
    warm_up = method.warm_up.epochs
    whole = [
        warm_up * first + between + (args.epochs - warm_up) * second
        for first, between, second in zip(seconds["warm-up"], seconds["ranking"], seconds["dual"], strict=True)
    ]
    plain = [args.epochs * value for value in seconds["plain"]]
    paper = Tap(Job(job.data, model=PAPER, fabric=fabric).model(), None, 10, example)
    parameters = {args.model: tap.parameter_counts(), PAPER: paper.parameter_counts()}
    return {
        "ratios": {
            f"E2ABL over plain, {args.epochs} epochs each, {args.model}": ratio(whole, plain, most=1.10),
            f"a warm-up epoch over a plain one, {args.model}": ratio(seconds["warm-up"], seconds["plain"]),
            f"the ranking between them over a plain epoch, {args.model}": ratio(seconds["ranking"], seconds["plain"]),
            f"a dual epoch over a plain one, {args.model}": ratio(seconds["dual"], seconds["plain"]),
            **{
                f"parameters over plain, {name}": ratio([counts["ratio"]], [1.0], most=1.1)
                for name, counts in parameters.items()
            },
        },
        "seconds_per_epoch": rounded(seconds),
        "parameters": parameters,
        "samples": args.samples,
    }
