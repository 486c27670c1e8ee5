"""Nothing reaches for the network at run time, unless a data set was named that has to be downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from antibackdoor.data import catalog
from antibackdoor.data.catalog import load_named
from antibackdoor.errors import InputError
from toy_files import TINY, UNDEFENDED, write_images

CUT = """
import json, sys
tried = []
def hook(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        tried.append([event, str(given[1:])])
        raise OSError("the network is cut")
sys.addaudithook(hook)  # cannot be taken back, and sees every library
from typer.testing import CliRunner
from antibackdoor.cli import app
told = []
for words in json.load(sys.stdin):
    before = len(tried)
    done = CliRunner().invoke(app, words)
    told.append([done.exit_code, done.output, tried[before:]])
print(json.dumps(told))
"""


@pytest.mark.timeout(600)
def test_no_command_reaches_for_the_network(tmp_path: Path) -> None:
    images, run, scan = write_images(tmp_path / "images", count=8), tmp_path / "run", tmp_path / "scan"
    commands = [
        ["train", images, "--out", run, *TINY, *UNDEFENDED],
        ["scan", images, "--out", scan, *TINY, "--detector", "loss"],
        ["predict", run, images, "--out", tmp_path / "predicted.csv"],
        ["report", run],
        ["export", run, tmp_path / "suspects.csv"],
        ["review", run, "--export", tmp_path / "cleaned"],
        ["poison", "digits", "--attack", "badnets", "--out", tmp_path / "poisoned"],
        ["list", "datasets"],
        ["train", "ecg5000", "--out", tmp_path / "asked-for"],
        ["train", "cifar10", "--out", tmp_path / "asked-for"],
    ]
    env = {key: value for key, value in os.environ.items() if key != "ANTIBACKDOOR_DATA"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "ANTIBACKDOOR_CACHE": str(tmp_path / "cache")}
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", CUT], input=words, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert [(status, tried) for status, _, tried in told[:-2]] == [(0, [])] * (len(commands) - 2), told
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
