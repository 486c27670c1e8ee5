"""Nothing reaches for the network at run time, unless a data set was named that has to be downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from antibackdoor.cli.frame import ORDER
from antibackdoor.data import catalog
from antibackdoor.data.catalog import load_named
from antibackdoor.errors import InputError
from toy_files import TINY, UNDEFENDED, cut_network, write_images

COMMANDS = """
import json, os, sys
from typer.testing import CliRunner
from antibackdoor.cli import app
from antibackdoor.review import server
async def once(*_):
    return True
server._Server.on_tick = once  # the page is served, and ended at once
told = []
for words in json.load(sys.stdin):
    done = CliRunner().invoke(app, words)
    with open(os.environ["TRIED"], "a+") as file:
        file.seek(0)
        told.append([done.exit_code, done.output, file.read().splitlines()])
        file.truncate(0)
print(json.dumps(told))
"""
GRID = """
[[cells]]
data = ["digits"]
train_size = 40
attacks = ["badnets"]
defenses = ["none"]
defense_options = { "recipe.min_steps" = 0 }
models = ["resnet18-w1"]
epochs = 1
seeds = [0]
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_command_reaches_for_the_network(tmp_path: Path) -> None:
    for extra in ("onnxruntime", "onnxscript", "uvicorn"):
        pytest.importorskip(extra)
    images, run, scan = write_images(tmp_path / "images", count=8), tmp_path / "run", tmp_path / "scan"
    (tmp_path / "grid.toml").write_text(GRID)
    commands = [
        ["train", images, "--out", run, *TINY, *UNDEFENDED],
        ["scan", images, "--out", scan, *TINY, "--detector", "loss", "--set", "recipe.min_steps=0"],
        ["predict", run, images, "--out", tmp_path / "predicted.csv"],
        ["report", run],
        ["export", run, tmp_path / "suspects.csv"],
        ["export", run, tmp_path / "model.onnx"],
        ["review", run, "--export", tmp_path / "cleaned"],
        ["review", run, "--no-open"],
        ["poison", "digits", "--attack", "badnets", "--out", tmp_path / "poisoned"],
        ["bench", tmp_path / "grid.toml", "--out", tmp_path / "results", "--workers", "1"],
        ["doctor"],
        ["list", "datasets"],
        ["train", "ecg5000", "--out", tmp_path / "asked-for"],
        ["train", "cifar10", "--out", tmp_path / "asked-for"],
    ]
    assert {str(command[0]) for command in commands} == set(ORDER) - {"demo"}, "which has a test of its own"
    env = {key: value for key, value in os.environ.items() if key != "ANTIBACKDOOR_DATA"}
    env |= {**cut_network(tmp_path), "ANTIBACKDOOR_CACHE": str(tmp_path / "cache")}
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=words, env=env, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert [(status, tried) for status, _, tried in told[:-2]] == [(0, [])] * (len(commands) - 2), told
    assert "Review page (for this machine only): http://127.0.0.1:" in told[7][1]
    for status, output, tried in told[-2:]:  # so the hook does see what reaches out
        assert status == 2 and "could not be downloaded" in output and tried


def test_a_download_of_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"not what was published")
    monkeypatch.setenv("ANTIBACKDOOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANTIBACKDOOR_DATA", raising=False)
    monkeypatch.setattr(catalog, "CIFAR10_URL", archive.as_uri())
    with pytest.raises(InputError, match="could not be downloaded"):
        load_named("cifar10")
    assert not list((tmp_path / "cache").glob("*.npz"))
