"""The fuzzing of `fuzz/run.py`, for moments: its whole corpus, and some mutations of each of its files."""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
SLOW = {"run_gallery", "run_history", "run_metrics", "run_suspects", "run_verdict", "card", "npy", "npz"}
pytest.importorskip("pyarrow")
pytest.importorskip("aeon")


@pytest.mark.parametrize("target", sorted(path.name for path in (FUZZ / "corpus").iterdir()))
def test_readers_refuse_or_read(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FUZZ), *sys.path])
    import run

    kept = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        counted, seeds, rng = run.Counted(target, tmp_path), run.seeds_of(target), random.Random(0)
        for content in seeds:
            counted(content)
        for _ in range(5 if target in SLOW else 60):
            counted(run.mutated(seeds, rng))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, kept)
    assert not counted.found and counted.executions > len(seeds)
