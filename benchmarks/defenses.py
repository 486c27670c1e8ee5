"""Whole runs of defenses against plain training: same set, same epochs of the main training, steps as on a large set.

The floors of steps that small sets get are taken off, so that the ratios are those of the epochs that each method asks
for.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from lightning_fabric import Fabric

from antibackdoor.defenses import make_defense
from antibackdoor.defenses.base import Defense
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from benchmarks.turns import random_images, ratio, rounded, take_turns

GOALS = {"e2abl": 1.10}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w8")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--only", nargs="*", default=["e2abl", "auto", "abl", "dlp"], help="names of defenses")


def no_floors(name: str) -> Defense:
    """The defense without floors of steps."""
    method = make_defense(name)
    fields = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    recipes = {field: getattr(method, field) for field in fields if isinstance(getattr(method, field), Recipe)}
    return make_defense(name, {f"{field}.min_steps": 0 for field in recipes})


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    data = random_images(args.samples)

    def run(name: str) -> None:
        no_floors(name).run(Job(data, model=args.model, fabric=fabric))

    names = ["none", *args.only]
    seconds = take_turns(
        {name: (lambda name=name: run(name)) for name in names},  # type: ignore[misc]
        args.repeats,
        fabric.device,
    )
    return {
        "ratios": {
            f"{name} over plain, {args.model}": ratio(seconds[name], seconds["none"], most=GOALS.get(name))
            for name in args.only
        },
        "seconds": rounded(seconds),
        "samples": args.samples,
    }
