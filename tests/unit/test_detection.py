"""Detectors in a cell: who is given the model, what is measured, and how much of what is filtered out is poison."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from antibackdoor.bench import detection
from antibackdoor.bench.detection import judge_detectors, precision_at
from antibackdoor.data.core import Data, Truth
from antibackdoor.defenses import Outcome
from antibackdoor.training.job import Job
from antibackdoor.verdict import Verdict


def poisoned(rows: list[int], n: int) -> Truth:
    """Of n samples these are poisoned; all are of class 0 and labeled so."""
    mask, zeros = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    mask[rows] = True
    return Truth(mask, torch.zeros_like(mask), zeros, zeros)


def test_precision_of_what_is_filtered_out_by_hand() -> None:
    """Of 1,000 samples, the later the more suspicious; poison are the last, the 10th, the 20th and the 100th."""
    got = precision_at(torch.arange(1000.0), poisoned([999, 990, 980, 900], 1000))
    counts = {"0.001": (1, 1), "0.005": (1, 5), "0.01": (2, 10), "0.02": (3, 20), "0.05": (3, 50), "0.1": (4, 100)}
    assert got == {rate: {"value": count / n, "count": count, "n": n} for rate, (count, n) in counts.items()}


def test_of_a_small_set_one_sample_is_filtered_out() -> None:
    got = precision_at(torch.tensor([0.0, 2.0, 1.0]), poisoned([1], 3))
    assert set(got) == {"0.001", "0.005", "0.01", "0.02", "0.05", "0.1"}
    assert all(share == {"value": 1.0, "count": 1, "n": 1} for share in got.values())


class Scripted:
    """A detector whose answer is known: the first of four samples is the most suspicious and flagged."""

    def __init__(self, name: str):
        self.watches_training, self.given = name == "watcher", list[nn.Module | None]()

    def run(self, job: Job, model: nn.Module | None) -> Outcome:
        self.given.append(model)
        zeros, flagged = torch.zeros(4), torch.tensor([True, False, False, False])
        return Outcome(nn.Identity(), torch.tensor([3.0, 2.0, 1.0, 0.0]), zeros, flagged, torch.full((4,), -1))

    def verdict(self, data: Data, outcome: Outcome) -> Verdict:
        return Verdict(True, 0.75, list(data.spec.classes), float(outcome.flagged.double().mean()), ["because"])


def scripted_job(name: str) -> Job:
    """Two stages in the history, of 8 and 5 steps; each row tells how many there were so far."""
    rows = (("a", 4), ("a", 8), ("b", 5)) if name == "watcher" else ()
    data = SimpleNamespace(spec=SimpleNamespace(classes=[name]))
    return cast(Job, SimpleNamespace(data=data, history=[{"stage": stage, "steps": steps} for stage, steps in rows]))


def test_what_is_told_of_a_detector_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Scripted] = {}
    clock = iter([100.0, 101.23456, 200.0, 200.004])
    monkeypatch.setattr(detection, "make_detector", lambda name: made.setdefault(name, Scripted(name)))
    monkeypatch.setattr(detection, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = nn.Identity()
    found = judge_detectors(["judge", "watcher"], model, scripted_job, poisoned([0, 2], 4))
    assert list(found) == ["judge", "watcher"]
    assert made["judge"].given == [model] and made["watcher"].given == [None], "it watches a training of its own"
    assert [told["seconds"] for told in found.values()] == [1.23, 0.0]
    assert [told["steps"] for told in found.values()] == [0, 8 + 5]
    for name, told in found.items():
        assert told["flagged_precision"] == {"value": 1.0, "count": 1, "n": 1}
        assert told["flagged_recall"] == {"value": 0.5, "count": 1, "n": 2}
        assert told["auroc"] == {"value": 0.75, "n": 4}  # of 4 pairs one is out of order
        assert told["precision_at"]["0.1"] == {"value": 1.0, "count": 1, "n": 1}
        verdict: dict[str, Any] = {measure: value["value"] for measure, value in told["verdict"].items()}
        assert verdict == {
            "poisoned": 1.0, "right": 1.0, "confidence": 0.75, "estimated_rate": 0.25, "rate_ratio": 0.5
        }, f"{name} names the class of poison, and half of it"  # fmt: skip


def test_equal_scores_are_filtered_out_in_the_order_of_the_set() -> None:
    scores: Tensor = torch.zeros(20)
    assert precision_at(scores, poisoned([0], 20))["0.1"] == {"value": 0.5, "count": 1, "n": 2}
    assert precision_at(scores, poisoned([19], 20))["0.1"] == {"value": 0.0, "count": 0, "n": 2}
