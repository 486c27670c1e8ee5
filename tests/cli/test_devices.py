"""`--devices`: processes that are started, that fail, that are cut off, and that were started by somebody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from antibackdoor import InputError, scan, train
from antibackdoor.data.core import Data, Splits
from antibackdoor.data.load import load
from antibackdoor.data.rows import FileRows
from antibackdoor.files import read_json
from antibackdoor.training.launch import SET_BY_TORCHRUN, processes
from ranks import Broken
from toy import toy_images
from toy_files import TINY, Run

COMMAND = [sys.executable, "-m", "antibackdoor.cli"]


def broken(rank: str, how: str = "told") -> Data:
    data = toy_images(81)
    assert isinstance(data.x, Tensor)
    return replace(data, x=Broken(data.x, rank, how))


def go(data: Any, **more: Any) -> Any:
    options = {"recipe.min_steps": 0}
    return train(data, defense="none", options=options, model="resnet18-w4", epochs=1, device="cpu", **more)


@pytest.mark.long
def test_a_run_of_two_devices_leaves_one_run_folder(images: Path, tmp_path: Path) -> None:
    splits = load(images, memory_map=True)
    assert isinstance(splits.train.x, FileRows)
    result = go(splits, out=tmp_path / "run", devices=2)
    assert result.metrics["clean_accuracy"]["n"] == 15 and read_json(tmp_path / "run" / "result.json")["n"] == 60
    table = pd.read_csv(tmp_path / "run" / "suspects.csv")
    assert sorted(table["id"]) == sorted(splits.train.ids)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1
    assert not torch.distributed.is_initialized() and not set(SET_BY_TORCHRUN) & set(os.environ)
    go(splits, out=tmp_path / "run", resume=True)  # the number of devices is no setting of the run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("told", "'cat.png' is gone"),
        pytest.param("killed", "device 1 was killed by signal 9", marks=pytest.mark.slow),
    ],
)
def test_one_device_that_fails_ends_all_with_its_sentence(how: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        go(broken("1", how), devices=2)
    assert not torch.distributed.is_initialized() and not set(SET_BY_TORCHRUN) & set(os.environ)


@pytest.mark.slow
def test_the_first_device_may_fail_too() -> None:
    with pytest.raises(InputError, match="is gone"):
        go(broken("0"), devices=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", 0), "greater than or equal to 1"),
        (("--devices", 2, "--device", "cpu:1"), "several devices cannot all be 'cpu:1'"),
        (("--nodes", 2, "--device", "cpu"), "started by torchrun"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(
    run: Run, images: Path, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    result = run("train", images, "--out", tmp_path / "out", *words, status=2)
    assert said in result.output and not (tmp_path / "out").exists()


def test_torchrun_must_have_started_as_many(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET_BY_TORCHRUN:
        monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match="torchrun started 4 processes, but --devices x --nodes is 2"):
        go(images, devices=2)


def test_too_little_shared_memory_is_told() -> None:
    with pytest.raises(InputError, match="do not fit the shared memory"), processes(2, 1, (print, {}), size=2**60):
        pass


def test_what_cannot_be_sent_is_told() -> None:
    with pytest.raises(InputError, match="cannot be sent to other processes"), processes(2, 1, (lambda: None, {})):
        pass


@pytest.mark.slow
def test_a_scan_on_two_devices_finds_what_one_finds() -> None:
    data = toy_images(81)
    options = {"warm_up.epochs": 2, "warm_up.min_steps": 0, "recipe.min_steps": 0}
    one, two = (
        scan(Splits(data), options=options, model="resnet18-w4", epochs=1, device="cpu", devices=devices)
        for devices in (1, 2)
    )
    assert sorted(one.suspects["id"]) == sorted(two.suspects["id"])
    scores = [found.suspects.set_index("id").loc[list(data.ids)]["score"].to_numpy() for found in (one, two)]
    assert abs(scores[0] - scores[1]).max() < 0.1
    assert one.verdict.poisoned == two.verdict.poisoned


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_run_resumes_to_the_same_weights(images: Path, tmp_path: Path) -> None:
    words = ["train", str(images), *TINY[:-2], "--epochs", "40", "--devices", "2", "--defense", "none"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*COMMAND, *words, "--out", str(whole)], check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "ANTIBACKDOOR_TEST": str(cut)}
    seen = 0
    for stop, resume in ((signal.SIGKILL, []), (signal.SIGINT, ["--resume"])):
        with subprocess.Popen(
            [*COMMAND, *words, *resume, "--out", str(cut)], env=environment, stderr=subprocess.PIPE
        ) as process:
            wait_for(lambda seen=seen: sum(path.stat().st_mtime_ns for path in cut.glob("stages/*.safetensors")) > seen)
            process.send_signal(stop)
            _, said = process.communicate(timeout=60)
        assert process.returncode == (-9 if stop == signal.SIGKILL else 130)
        wait_for(lambda: not alive(str(cut)))
        assert stop == signal.SIGKILL or said.decode().count("go on with: antibackdoor train") == 1
        seen = sum(path.stat().st_mtime_ns for path in cut.glob("stages/*.safetensors"))
    subprocess.run([*COMMAND, *words, "--out", str(cut), "--resume"], check=True, capture_output=True, timeout=300)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def wait_for(condition: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def alive(mark: str) -> list[str]:
    """Processes, of this test, that are still there."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"ANTIBACKDOOR_TEST={mark}".encode() in place.read_bytes():
                found.append(place.parent.name)
        except OSError:
            continue
    return found
