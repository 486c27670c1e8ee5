"""What the default defense costs over plain training of the same backbone, and what `scan` costs over it.

Epochs and passes of every part take turns; what they add up to in a run on 50,000 images follows from each round.
`scan` questions the same witnesses, in a network of half the width, and trains no model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from antibackdoor.defenses.company import Company, second_logits
from antibackdoor.defenses.jury import Jury
from antibackdoor.defenses.witness import Witness
from antibackdoor.training.groups import nearest
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Fit, ParameterGroups, Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective
from antibackdoor.training.scores import bonds_of, features_of, logits_of
from benchmarks.turns import CLASSES, random_images, ratio, rounded, take_turns

TRAIN = 50_000
Parts = dict[str, Callable[[], object]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--half", default="resnet18-w8", help="the same of half the width, for `scan`")
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--epochs", type=int, nargs="*", default=[12, 60], help="of the runs that are worked out")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    method, data = Jury(), random_images(args.samples)
    job, half = (Job(data, model=name, fabric=fabric) for name in (args.model, args.half))
    model = job.model()
    plain, strong = (
        fit(job, name, job.model(name), CrossEntropy(), replace(method.main, augment=name))
        for name in ("weak", "strong")
    )
    parts: Parts = {
        "plain epoch": lambda: plain.run_epoch(Progress()),
        "strong epoch": lambda: strong.run_epoch(Progress()),
        "hearing": lambda: logits_of(model, data, fabric),
        "company": company(method),
        **{f"{name}, {args.model}": part for name, part in questions(job, method).items()},
        **{f"{name}, {args.half}": part for name, part in questions(half, method).items()},
    }
    seconds = take_turns(parts, args.repeats, fabric.device)
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    ratios = {}
    for epochs in args.epochs:
        title = f"over a plain run of {epochs} epochs"
        under = [epochs * TRAIN / args.samples * one["plain epoch"] for one in rounds]
        trained = [training(one, method, epochs) * TRAIN / args.samples for one in rounds]
        asked, scanned = (
            [witnesses(one, method, name, TRAIN / args.samples) for one in rounds] for name in (args.model, args.half)
        )
        both = [a + b for a, b in zip(trained, asked, strict=True)]
        ratios |= {
            f"the default {title}, {args.model}": ratio(both, under, most=1.5),
            f"of it the training of the model {title}, {args.model}": ratio(trained, under),
            f"of it the witnesses {title}, {args.model}": ratio(asked, under),
            f"`scan` in {args.half} {title}, {args.model}": ratio(scanned, under, most=0.3),
        }
    return {"ratios": ratios, "seconds": rounded(seconds), "samples": args.samples}


def training(one: dict[str, float], method: Jury, epochs: int) -> float:
    """Of the model: strong augmentation up to the first hearing and, on clean data, weak from there on."""
    first = math.ceil(method.hearing * epochs)
    return first * one["strong epoch"] + (epochs - first) * one["plain epoch"] + (epochs - first + 1) * one["hearing"]


def witnesses(one: dict[str, float], method: Jury, model: str, scale: float) -> float:
    """Of the trap, its looks and mixtures, and the outsiders: each learns the other classes and looks at its own."""
    epoch, look, mixture, features = (
        one[f"{name}, {model}"] * scale for name in ("shallow epoch", "look", "mixture", "features")
    )
    outsiders = min(len(CLASSES), method.groups)
    lessons = outsiders * min(method.lessons / TRAIN, 1 - 1 / len(CLASSES)) * method.outsider.epochs
    trap = method.trap.epochs * epoch + method.looks * look + method.mixtures * mixture + features
    return trap + lessons * epoch + look + one["company"]


def questions(job: Job, method: Jury) -> Parts:
    """What witnesses do, once over all samples each."""
    tap = method.tapped(job, "trap")
    trap = fit(job, "trap", tap, Witness(job), method.trap, tap.warm_up_parameters())
    data, fabric = job.data, job.fabric
    return {
        "shallow epoch": lambda: trap.run_epoch(Progress()),
        "look": lambda: logits_of(tap, data, fabric, call=second_logits),
        "mixture": lambda: bonds_of(tap, data, fabric, 0, 1, call=second_logits),
        "features": lambda: features_of(tap, data, fabric, call=second_logits),
    }


def company(method: Jury) -> Callable[[], object]:
    """Neighbors and their shared opinions among 50,000, by 128 features each."""
    rng = torch.Generator().manual_seed(0)
    features, given = torch.randn(TRAIN, 128, generator=rng), torch.arange(TRAIN) % len(CLASSES)
    said = [torch.rand(TRAIN, generator=rng, dtype=torch.float64) for _ in range(3)]
    return lambda: Company.of(
        said, given, nearest(features, given, method.neighbors), len(CLASSES), rounds=method.rounds, most=0.65, home=2
    )


def fit(
    job: Job,
    name: str,
    model: nn.Module,
    objective: Objective,
    recipe: Recipe,
    only: ParameterGroups | None = None,
) -> Fit:
    """A stage without an end, in batches of a large set: small ones get smaller batches by themselves."""
    recipe = replace(recipe, epochs=10**6, min_steps=0)
    made = Fit(name, model, objective, job.data, recipe, parameters=only, fabric=job.fabric)
    made.batch_size = min(recipe.batch_size, len(job.data))
    made.steps = len(job.data) // made.batch_size
    return made
