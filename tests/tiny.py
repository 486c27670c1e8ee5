"""Training runs of about a second, and what several tests ask of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Data
from antibackdoor.defenses import Outcome, make_defense
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Progress, Recipe

FABRIC = make_fabric("cpu", "32-true")


def clean_for(data: Data, defense: str) -> dict[str, Data]:
    """What a defense is given beside the data, where it needs it: here the untrusted set's own first samples."""
    return {"clean": data.take(torch.arange(20))} if "clean" in make_defense(defense).needs else {}


def short(defense: str, epochs: int = 5) -> dict[str, Any]:
    """Settings that give every stage of a defense this many epochs and no floor of steps."""
    method = make_defense(defense)
    stages = [field.name for field in dataclasses.fields(method) if isinstance(getattr(method, field.name), Recipe)]  # type: ignore[arg-type]
    return {f"{stage}.{name}": value for stage in stages for name, value in (("epochs", epochs), ("min_steps", 0))}


def train(
    data: Data,
    defense: str = "none",
    options: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
    model: str | nn.Module = "resnet18-w8",
    extras: dict[str, Data] | None = None,
) -> tuple[Outcome, Job]:
    """What a defense makes of the data; a checkpoint after every epoch where there is a folder."""
    extras = clean_for(data, defense) if extras is None else extras
    job = Job(data, model=model, seed=seed, fabric=FABRIC, folder=folder, progress=progress, extras=extras)
    job.checkpoint_seconds = -1.0
    return make_defense(defense, short(defense) if options is None else options).run(job), job


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Equal bit for bit, names included."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def stored(data: Data) -> Tensor:
    """All samples as they are stored."""
    return data.x[torch.arange(len(data))]
