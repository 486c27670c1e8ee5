"""The measuring tools themselves; what they find is in results/cost."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from benchmarks.__main__ import CASES
from benchmarks.billion import simulation, threshold
from benchmarks.turns import ratio, take_turns


def test_turns_are_taken_and_the_first_round_is_thrown_away() -> None:
    seen: list[str] = []
    parts = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    seconds = take_turns(parts, 2, torch.device("cpu"))
    assert "".join(seen) == "abcbcacab"
    assert all(len(values) == 2 for values in seconds.values())


def test_a_ratio_is_taken_round_by_round() -> None:
    found = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0], scale=10, least=0.5)
    assert found == {"median": 20, "low": 10, "high": 30, "n": 3, "at least": 0.5}
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_every_case_can_be_run() -> None:
    for name in CASES:
        module = importlib.import_module(f"benchmarks.{name}")
        assert callable(module.measure) and callable(module.add_options) and module.__doc__


@pytest.mark.parametrize(("n", "workers", "share"), [(5_000, 7, 0.01), (999, 10, 0.5), (50, 5, 1.0)])
def test_histograms_find_the_highest_scores_as_sorting_does(n: int, workers: int, share: float) -> None:
    assert simulation(n, workers, share)["different"] == 0


def test_histograms_zoom_into_a_crowded_bin() -> None:
    scores = np.concatenate([np.linspace(0, 1e-9, 1000), [1e6]])
    cut, above, rounds = threshold(np.array_split(scores, 3), 11)
    assert rounds > 1 and above == 10 and cut == np.sort(scores)[-11]
