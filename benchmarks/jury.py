"""What the default defense costs over plain training of the same backbone, and what `scan` costs over it.

Epochs and passes of every part take turns; what they add up to in a run on 50,000 images follows from each round.
`scan` does the same in a network of half the width, for as many epochs as stand in the recipe.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric

from antibackdoor.defenses.company import Company, second_logits
from antibackdoor.defenses.jury import Jury
from antibackdoor.defenses.witness import Witness
from antibackdoor.training.groups import nearest
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import bonds_of, features_of, logits_of
from benchmarks.turns import CLASSES, endless, random_images, ratio, rounded, take_turns

TRAIN = 50_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--half", default="resnet18-w8", help="the same of half the width, for `scan`")
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--epochs", type=int, nargs="*", default=[12, 60], help="of the runs that are worked out")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    method, data = Jury(), random_images(args.samples)
    parts = {
        f"{name}, {model}": part
        for model in (args.model, args.half)
        for name, part in parts_of(Job(data, model=model, fabric=fabric), method).items()
    }
    seconds = take_turns({**parts, "company": company(method)}, args.repeats, fabric.device)
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    whole, half = ([costs(one, model, TRAIN / args.samples) for one in rounds] for model in (args.model, args.half))
    scan = [one.training(method, method.main.epochs) + one.witnesses(method) for one in half]
    ratios = {}
    for epochs in args.epochs:
        title = f"over a plain run of {epochs} epochs, {args.model}"
        under = [epochs * one.plain for one in whole]
        trained, asked = [one.training(method, epochs) for one in whole], [one.witnesses(method) for one in whole]
        both = [a + b for a, b in zip(trained, asked, strict=True)]
        ratios |= {
            f"the default {title}": ratio(both, under, most=1.5),
            f"of it the training of the model {title}": ratio(trained, under),
            f"of it the witnesses {title}": ratio(asked, under),
            f"`scan` in {args.half} {title}": ratio(scan, under, most=0.3),
        }
    return {"ratios": ratios, "seconds": rounded(seconds), "samples": args.samples}


@dataclass(frozen=True)
class Costs:
    """Seconds of one epoch, or pass, over all of a large set, in one round."""

    plain: float
    strong: float
    hearing: float
    shallow: float
    look: float
    mixture: float
    features: float
    company: float

    def training(self, method: Jury, epochs: int) -> float:
        """Of the model: strong augmentation up to the first hearing and, on clean data, weak from there on."""
        first = math.ceil(method.hearing * epochs)
        heard = epochs - first + 1
        return first * self.strong + (epochs - first) * self.plain + heard * self.hearing

    def witnesses(self, method: Jury) -> float:
        """Of the trap, its looks and mixtures, and the outsiders: each learns the other classes and sees its own."""
        outsiders = min(len(CLASSES), method.groups)
        lessons = outsiders * min(method.lessons / TRAIN, 1 - 1 / len(CLASSES)) * method.outsider.epochs
        passes = (method.looks + 1) * self.look + method.mixtures * self.mixture + self.features
        return (method.trap.epochs + lessons) * self.shallow + passes + self.company


def costs(one: dict[str, float], model: str, scale: float) -> Costs:
    """Of a model in a round; `scale`: how much larger the set is than the one that was measured."""
    own = {name.removesuffix(f", {model}"): scale * s for name, s in one.items() if name.endswith(f", {model}")}
    return Costs(**own, company=one["company"])


def parts_of(job: Job, method: Jury) -> dict[str, Callable[[], object]]:
    """What is measured of a model, by the names of `Costs`: once over all samples each."""
    data, fabric, model, tap = job.data, job.fabric, job.model(), method.tapped(job, "trap")
    plain, strong = (
        endless(job, name, job.model(name), CrossEntropy(), replace(method.main, augment=name))
        for name in ("weak", "strong")
    )
    trap = endless(job, "trap", tap, Witness(job), method.trap, tap.warm_up_parameters())
    return {
        "plain": lambda: plain.run_epoch(Progress()),
        "strong": lambda: strong.run_epoch(Progress()),
        "hearing": lambda: logits_of(model, data, fabric),
        "shallow": lambda: trap.run_epoch(Progress()),
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
