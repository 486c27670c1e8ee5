"""Our loop against a minimal hand-written one of the same model: what is left of the hardware's rate.

The minimal loop shuffles, takes decoded images from memory, and calls forward, backward and the optimizer; ours also
decodes, augments, keeps each sample's loss and steps a schedule.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

from antibackdoor.data.batches import to_device
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Fit, Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy
from benchmarks.turns import random_images, ratio, rounded, take_turns


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    data = to_device(random_images(args.samples), fabric.device)
    job = Job(data, model=args.model, fabric=fabric)
    model = job.model()
    x, y = data.spec.decode(data.x[torch.arange(len(data))]), data.y
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def minimal() -> None:
        model.train()
        for rows in torch.randperm(len(x), device=x.device).split(args.batch):
            with fabric.autocast():
                loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def ours(augment: str) -> Fit:
        recipe = Recipe(epochs=args.repeats + 1, min_steps=0, batch_size=args.batch, augment=augment)
        # Small sets get smaller batches by themselves; here both loops take the same.
        stage = Fit(augment, job.model(augment), CrossEntropy(), data, recipe, fabric=fabric)
        stage.batch_size, stage.steps = args.batch, args.samples // args.batch
        return stage

    weak, none = ours("weak"), ours("none")
    seconds = take_turns(
        {
            "minimal": minimal,
            "ours": lambda: weak.run_epoch(Progress()),
            "ours, not augmented": lambda: none.run_epoch(Progress()),
        },
        args.repeats,
        fabric.device,
    )
    return {
        "ratios": {
            f"rate of our loop over the limit, {args.model}": ratio(seconds["minimal"], seconds["ours"], least=0.95),
            f"the same without augmentation, {args.model}": ratio(
                seconds["minimal"], seconds["ours, not augmented"], least=0.95
            ),
        },
        "seconds_per_epoch": rounded(seconds),
        "samples": args.samples,
        "batch": args.batch,
    }
