"""The fuzzing of `fuzz/run.py`, for moments: its corpus, some mutations of each of its files, and what counts."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from antibackdoor.errors import InputError

FUZZ = Path(__file__).parents[2] / "fuzz"
SLOW = {"card", "folder", "ledger", "npy", "npz", "pack", "run_attention", "run_config", "run_gallery", "run_history"}
SLOW |= {"run_metrics", "run_source", "run_suspects", "run_verdict"}
pytest.importorskip("pyarrow")
pytest.importorskip("aeon")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys, "path", [str(FUZZ), *sys.path])
    import run

    kept = resource.getrlimit(resource.RLIMIT_DATA)
    yield run
    resource.setrlimit(resource.RLIMIT_DATA, kept)


@pytest.mark.parametrize("target", sorted(path.name for path in (FUZZ / "corpus").iterdir()))
def test_readers_refuse_or_read(target: str, tmp_path: Path, run: Any) -> None:
    counted, seeds, rng = run.Counted(target, tmp_path), run.seeds_of(target), random.Random(0)
    for content in seeds:
        counted(content)
    for _ in range(5 if target in SLOW else 60):
        counted(run.mutated(seeds, rng))
    assert not counted.found and counted.executions > len(seeds)


def masking(_: bytes) -> None:
    """Makes a sentence of a memory that is used up."""
    try:
        bytearray(2**40)
    except MemoryError as error:
        raise InputError(f"cannot read it: {error}.") from None


def unsaid(_: bytes) -> None:
    raise InputError("cannot read it: unable to allocate 954 MiB.")


def shown(_: bytes) -> None:
    raise KeyError("no sentence")


@pytest.mark.parametrize("reader", [masking, unsaid, shown])
def test_what_counts_as_broken(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, reader: Callable[..., None]
) -> None:
    import targets

    monkeypatch.setitem(targets.TARGETS, "json", reader)
    counted = run.Counted("json", tmp_path)
    counted(b"{}")
    assert len(counted.found) == 1 and list(tmp_path.glob("found-*"))


def test_a_target_that_stands_still_is_ended(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody writes to computes nothing, so that no limit of computing ends it."""
    import targets

    monkeypatch.setitem(targets.TARGETS, "json", lambda _: time.sleep(600))
    monkeypatch.setattr(run, "PATIENCE", 1)
    started = time.monotonic()
    deaths, _ = run.fuzz("json", tmp_path, 2, 0, False)
    assert deaths and "it stood still for 1 s" in deaths[0] and time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("told", "status"),
    [({}, 0), ({"found": ["x"]}, 1), ({"deaths": ["status 9"]}, 1), ({"most_growth_mib": 1025}, 1)],
)
def test_the_exit_status_says_whether_anything_broke(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], status: int
) -> None:
    row = {**run.NOTHING, "target": "json", **told}
    (tmp_path / "out.json").write_text(json.dumps({"targets": [row]}))
    words = [
        "run.py",
        "json",
        "--seconds",
        "0",
        "--out",
        str(tmp_path / "out.json"),
        "--work",
        str(tmp_path),
        "--blind",
    ]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(run, "fuzz", lambda *_: ([], 0.1))
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == status
    assert json.loads((tmp_path / "out.json").read_text())["broken"] == status
