"""Whether a step of FixMatch is bound by the model: time outside forward and backward, and against a PIL pipeline.

Four things take turns: whole steps as a defense runs them (gathering, weak and strong views, forward, backward,
optimizer, averaged weights, records); forward and backward alone, on a batch of views made before; making the views
alone; and making the same views from PIL images one by one with torchvision (crop, flip, RandAugment(2, 10), a hole of
half a side) in one process.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torchvision.transforms import v2

from antibackdoor.data.batches import gather
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Fit, Progress
from antibackdoor.training.semi_supervised import FixMatch, SemiSupervised
from benchmarks.turns import random_images, ratio, rounded, take_turns


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="wideresnet16_1")
    parser.add_argument("--batch", type=int, default=16, help="labeled samples a step")
    parser.add_argument("--steps", type=int, default=1, help="in a turn")


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    recipe = SemiSupervised(batch_size=args.batch, epochs=args.repeats + 1, min_steps=0)
    unlabeled = recipe.ratio * args.batch
    data = random_images(max(20 * args.batch, args.steps * unlabeled))
    job = Job(data, model=args.model, fabric=fabric)
    device, model = fabric.device, job.model()
    match = FixMatch(job, model, recipe, torch.arange(10 * args.batch))
    rows = torch.arange(args.steps * unlabeled)
    fit = Fit("fixmatch", model, match, job.data, recipe, rows=rows, fabric=fabric)
    noise = torch.Generator(device).manual_seed(0)
    plain = gather(job.data, rows[:unlabeled], device)
    ready = match.prepare(plain, lambda batch, _: batch, noise)
    stored = data.x[torch.arange(args.batch + unlabeled)]
    pictures = [v2.functional.to_pil_image(image) for image in stored]

    def model_alone() -> None:
        for _ in range(args.steps):
            with fabric.autocast():
                loss = match(model, ready).loss
            fit.optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)

    def views() -> None:
        for _ in range(args.steps):
            match.prepare(plain, lambda batch, _: batch, noise)

    def views_by_pil() -> None:
        for _ in range(args.steps):
            pil_views(pictures, args.batch, device)

    seconds = take_turns(
        {
            "whole steps": lambda: fit.run_epoch(Progress()),
            "forward and backward": model_alone,
            "views": views,
            "views by PIL": views_by_pil,
        },
        args.repeats,
        device,
    )
    by_pil = [
        whole - ours + theirs
        for whole, ours, theirs in zip(
            *(seconds[name] for name in ("whole steps", "views", "views by PIL")), strict=True
        )
    ]
    return {
        "ratios": {
            f"whole step over forward and backward, {args.model}": ratio(
                seconds["whole steps"], seconds["forward and backward"]
            ),
            f"views over the whole step, {args.model}": ratio(seconds["views"], seconds["whole steps"]),
            f"views by PIL over ours, {args.model}": ratio(seconds["views by PIL"], seconds["views"]),
            f"steps with views by PIL over ours, {args.model}": ratio(by_pil, seconds["whole steps"]),
        },
        "images_a_step": {"labeled": args.batch, "unlabeled": unlabeled, "views": len(ready.x)},
        "seconds": rounded(seconds),
    }


WEAK = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4)]
TENSOR = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
HOLE = v2.RandomErasing(p=1, scale=(0.25, 0.25), ratio=(1, 1))
EASY = v2.Compose([*WEAK, *TENSOR])
HARD = v2.Compose([*WEAK, v2.RandAugment(2, 10), *TENSOR, HOLE])


def pil_views(pictures: list, labeled: int, device: torch.device) -> Tensor:
    """Weak views of all pictures and strong ones of all but the labeled first, one picture after the other."""
    views = [EASY(picture) for picture in pictures] + [HARD(picture) for picture in pictures[labeled:]]
    return torch.stack(views).to(device)
