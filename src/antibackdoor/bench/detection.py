"""Detectors in a cell: each judges the model that the cell has trained, on the same samples, against the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from antibackdoor.bench.judge import Measure, detection_measures, share, verdict_measures
from antibackdoor.data.core import Truth
from antibackdoor.detectors import make_detector
from antibackdoor.training.job import Job
from antibackdoor.training.ranking import top

FILTER_RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Shares of the whole set that are filtered out, the most suspicious samples first."""


def judge_detectors(
    names: Iterable[str], model: nn.Module, job_of: Callable[[str], Job], truth: Truth
) -> dict[str, dict[str, Any]]:
    """What each detector finds, by name, with counts.

    model: what the detectors that judge with a finished network are given, all the same one. job_of: a fresh job for a
    detector; those that watch a training do it there, on their own schedule.
    """
    found = {}
    for name in names:
        method, job, started = make_detector(name), job_of(name), time.perf_counter()
        outcome = method.run(job, None if method.watches_training else model)
        seconds = time.perf_counter() - started
        measures = detection_measures(outcome, truth)
        measures["precision_at"] = precision_at(outcome.scores, truth)
        measures["verdict"] = verdict_measures(method.verdict(job.data, outcome), truth, job.data.spec.classes)
        measures["seconds"] = round(seconds, 2)
        measures["steps"] = sum({row["stage"]: row["steps"] for row in job.history}.values())
        found[name] = measures
    return found


def precision_at(scores: Tensor, truth: Truth) -> dict[str, Measure]:
    """The poisoned share of what is filtered out at each of `FILTER_RATES`, one sample at least."""
    order = top(scores, len(scores))
    poisoned = truth.poisoned[order]
    return {f"{rate:g}": share(poisoned[: max(1, round(rate * len(scores)))]) for rate in FILTER_RATES}
