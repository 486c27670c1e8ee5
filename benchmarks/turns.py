"""Paired measurement: things take turns in one process, so that a noisy machine hits all of them alike.

On a CPU seconds are those that this process was given, of all its threads: other programs of a busy machine do not
count. On a GPU they are those of the clock, with the device's queue emptied before and after.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from antibackdoor.data.core import Data, Spec
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Fit, ParameterGroups, Recipe
from antibackdoor.training.objectives import Objective

CLASSES = tuple("0123456789")


def timed(part: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def take_turns(parts: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every part in every round; each round starts with another part, and the first round is thrown away.

    It pays for allocation and autotuning.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    names = list(parts)
    for number in range(repeats + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            spent = timed(parts[name], device)
            if number:
                seconds[name].append(spent)
    return seconds


def ratio(
    over: list[float], under: list[float], *, scale: float = 1.0, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """`scale * over / under`, round by round: the median with the smallest and the largest, and what it should be."""
    pairs = [scale * a / b for a, b in zip(over, under, strict=True)]
    found: dict[str, Any] = {name: _short(f(pairs)) for name, f in FIGURES.items()} | {"n": len(pairs)}
    goal = {"at least": least, "at most": most}
    return found | {words: value for words, value in goal.items() if value is not None}


FIGURES: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "low": min, "high": max}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def rounded(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """For the record."""
    return {name: [_short(value) for value in values] for name, values in seconds.items()}


def endless(
    job: Job,
    name: str,
    model: nn.Module,
    objective: Objective,
    recipe: Recipe,
    parameters: ParameterGroups | None = None,
    *,
    compiled: bool = False,
) -> Fit:
    """A stage without an end, in batches of a large set: small ones get smaller batches by themselves."""
    recipe = replace(recipe, epochs=10**6, min_steps=0)
    fit = Fit(name, model, objective, job.data, recipe, parameters=parameters, compiled=compiled, fabric=job.fabric)
    fit.batch_size = min(recipe.batch_size, len(job.data))
    fit.steps = len(job.data) // fit.batch_size
    return fit


def random_images(n: int, side: int = 32) -> Data:
    """Noise: cost does not depend on what images show."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, side, side), generator=rng, dtype=torch.uint8)
    y = torch.randint(len(CLASSES), (n,), generator=rng)
    return Data(x, y, Spec("image", (3, side, side), CLASSES), [str(row) for row in range(n)])


def random_series(n: int, steps: int = 140) -> Data:
    """Noise of ECG5000's length."""
    x = torch.randn(n, 1, steps, generator=torch.Generator().manual_seed(0))
    spec = Spec("series", (1, steps), CLASSES, float(x.min()), float(x.max()))
    return Data(x, torch.arange(n) % len(CLASSES), spec, [str(row) for row in range(n)])
