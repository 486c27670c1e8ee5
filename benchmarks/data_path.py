"""The data path alone, beside a training step: gathering, augmenting, keeping losses, poisoning; each for one batch.

Gathering is measured from memory, from a file that the system has in memory, and through the overlay that a poisoned
set is. Ratios are shares of the forward and backward pass of one batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.poisoned import fitted
from antibackdoor.data.augment import AUGMENTATIONS
from antibackdoor.data.batches import gather, to_device
from antibackdoor.data.core import Data
from antibackdoor.data.rows import FileRows, Overlay
from antibackdoor.training.job import Job
from antibackdoor.training.objectives import CrossEntropy
from benchmarks.turns import random_images, random_series, ratio, rounded, take_turns


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=10_000)


def measure(args: argparse.Namespace, fabric: Fabric) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    for data in (random_images(args.samples), random_series(args.samples)):
        with tempfile.TemporaryDirectory() as folder:
            spent = one_kind(data, Path(folder), args, fabric)
        kind, step = data.spec.kind, spent["forward and backward"]
        seconds[kind] = rounded(spent)
        ratios |= {
            f"{name}, {kind}, over the model's share of a step": ratio(values, step)
            for name, values in spent.items()
            if values is not step
        }
    return {"ratios": ratios, "seconds_per_batch": seconds, "batch": args.batch, "samples": args.samples}


def one_kind(data: Data, folder: Path, args: argparse.Namespace, fabric: Fabric) -> dict[str, list[float]]:
    device, here = fabric.device, to_device(data, fabric.device)
    job = Job(data, model=args.model, fabric=fabric)
    model, objective = job.model(), CrossEntropy()
    rng, noise = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    assert isinstance(data.x, Tensor)
    data.x.numpy().tofile(folder / "x.bin")
    on_disk = dataclasses.replace(data, x=FileRows(folder / "x.bin", data.x.shape, data.x.numpy().dtype))
    tenth = torch.arange(0, args.samples, 10)
    overlay = dataclasses.replace(here, x=Overlay(here.x, tenth, data.x[tenth]))
    attack = ATTACKS["badnets"].make()
    state = fitted(attack, data, seed=0, fabric=fabric)
    ready = gather(here, torch.arange(args.batch), device)
    kept = torch.full((args.samples,), torch.nan, device=device)

    def rows() -> Tensor:
        return torch.randperm(args.samples, generator=rng)[: args.batch]

    def model_alone() -> None:
        with fabric.autocast():
            loss = objective(model, ready).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    def record() -> None:
        kept[ready.rows] = ready.y.float()

    return take_turns(
        {
            "forward and backward": model_alone,
            "gather from memory": lambda: gather(here, rows(), device),
            "gather from disk": lambda: gather(on_disk, rows(), device),
            "gather through a poison overlay": lambda: gather(overlay, rows(), device),
            "weak augmentation": lambda: AUGMENTATIONS["weak"](ready.x, data.spec, noise),
            "strong augmentation": lambda: AUGMENTATIONS["strong"](ready.x, data.spec, noise),
            "keeping each loss": record,
            "poisoning (badnets)": lambda: attack.make(data, rows(), state, "poison"),
        },
        args.repeats,
        device,
    )
