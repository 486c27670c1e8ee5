"""`scan`: verdict and suspects only; its exit status is a gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import antibackdoor
from antibackdoor import InputError
from antibackdoor.detectors import DETECTORS
from antibackdoor.models import create
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress
from toy import toy_images
from toy_files import Run, write_series

NAMES = [entry.name for entry in DETECTORS]
SHORT = ("--model", "resnet18-w4", "--device", "cpu", "--set", "recipe.min_steps=0", "--epochs", 2)
MORE = {
    "trap": ("--set", "warm_up.epochs=1", "--set", "warm_up.min_steps=0"),
    "jury": ("--set", "trap.epochs=1", "--set", "trap.min_steps=0", "--set", "outsider.min_steps=0"),
}
GATE = ("--detector", "activation_clustering", "--fail-on-poison")
FILES = {"suspects.csv", "verdict.json", "metrics.json", "history.jsonl", "config.json", "env.json", "report.html",
         "gallery.npz", "result.json"}  # fmt: skip


def short(name: str) -> tuple[object, ...]:
    return ("--detector", name, *SHORT, *MORE.get(name, ()))


@pytest.fixture
def tampered(tmp_path: Path) -> Path:
    """Two classes that brightness tells apart; the last 8 of 48 samples of the second look like neither."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 60, (88, 8, 8, 3)), np.arange(88) >= 40
    x[y] += 80
    x[80:, ::2] = 255
    path = tmp_path / "tampered.npz"
    np.savez(path, x=x.astype(np.uint8), y=y.astype(int), classes=["dark", "bright"])
    return path


@pytest.mark.parametrize("name", NAMES)
def test_scan_writes_everything_but_a_model(run: Run, images: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    told = run("scan", images, "--out", out, *short(name)).output
    assert "of 60 samples" in told and "report.html" in told
    written = {path.name for path in out.iterdir()}
    assert written >= FILES and not any(file.startswith("model.") for file in written)
    table = pd.read_csv(out / "suspects.csv")
    assert len(table) == 60 and table.groupby("flagged")["score"].apply(lambda s: s.is_monotonic_decreasing).all()
    assert np.isfinite(table["score"]).all() and set(table["id"]) == set(antibackdoor.load(images).train.ids)
    assert table["probability"].notna().all() == (name in MORE)
    verdict = json.loads((out / "verdict.json").read_text())
    assert 0 <= verdict["confidence"] <= 1 and verdict["evidence"]
    config = json.loads((out / "config.json").read_text())
    assert config["detector"]["name"] == name and config["detector"]["options"]["recipe"]["min_steps"] == 0
    assert json.loads((out / "metrics.json").read_text())["cost"]["steps"] > 0
    if not verdict["confidence"]:
        assert "not judged" in told


def test_scan_of_series_with_the_default(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("scan", write_series(tmp_path / "toy.ts"), "--out", out, *SHORT, "--quiet")
    assert json.loads((out / "config.json").read_text())["detector"]["name"] == "jury"


@pytest.mark.long
@pytest.mark.timeout(400)  # two scans of some 50 s; more where a machine is shared
def test_the_default_gate_stops_poisoned_digits_and_lets_clean_ones_pass(run: Run, tmp_path: Path) -> None:
    attack = ("--attack", "badnets", "--rate", 0.1, "--target", 0)
    run("poison", "digits", *attack, "--out", tmp_path / "poisoned", "--quiet")
    gate = ("--fail-on-poison", "--json", "--quiet")
    told = json.loads(run("scan", tmp_path / "poisoned", "--out", tmp_path / "bad", *gate, status=3).output)
    assert told["target_classes"] == ["0"] and 0.05 < told["estimated_rate"] < 0.15
    assert not json.loads(run("scan", "digits", "--out", tmp_path / "good", *gate).output)["poisoned"]


def test_a_gate_stops_what_looks_poisoned(run: Run, tampered: Path, images: Path, tmp_path: Path) -> None:
    found = run("scan", tampered, "--out", tmp_path / "bad", *GATE, *SHORT, "--json", "--quiet", status=3)
    told = json.loads(found.output)
    assert told["poisoned"] and told["target_classes"] == ["bright"] and told["samples"] == 88
    assert sorted(row["id"] for row in told["suspects"]) == [str(k) for k in range(80, 88)]
    assert (tmp_path / "bad" / "result.json").exists()  # the evidence is kept
    again = run("scan", tampered, "--out", tmp_path / "bad", *GATE, *SHORT, "--resume", status=3)
    assert "looks poisoned" in again.output
    run("scan", tampered, "--out", tmp_path / "told", *GATE[:2], *SHORT)  # without the gate it is no failure
    run("scan", images, "--out", tmp_path / "good", *GATE, *SHORT)


def test_a_gate_needs_an_answer(run: Run, images: Path, tmp_path: Path) -> None:
    for words in (["--detector", "loss"], ["--detector", "spectral_signatures", "--set", "rate=0.1"]):
        told = run("scan", images, "--out", tmp_path / "out", "--fail-on-poison", *words, status=2).output
        assert "only ranks" in told and not (tmp_path / "out").exists()
    np.savez(tmp_path / "few.npz", x=np.zeros((8, 8, 8, 3), np.uint8), y=np.arange(8) % 2)
    told = run("scan", tmp_path / "few.npz", "--out", tmp_path / "out", *GATE, *SHORT, "--quiet", status=2).output
    assert "could not be judged" in told and len(told.strip().splitlines()) == 1
    asked = run("scan", tmp_path / "few.npz", "--out", tmp_path / "json", *GATE, *SHORT, "--json", status=2)
    assert json.loads(asked.stdout)["judged"] is False, "one document: the findings, which were told already"


def test_scan_measures_against_the_truth(run: Run, images: Path, tmp_path: Path) -> None:
    run("poison", images, "--attack", "badnets", "--rate", 0.1, "--out", tmp_path / "poisoned", "--quiet")
    words = ("--truth", tmp_path / "poisoned", "--out", tmp_path / "out", *short("loss"), "--quiet")
    run("scan", tmp_path / "poisoned", *words)
    detection = json.loads((tmp_path / "out" / "metrics.json").read_text())["detection"]
    assert 0 <= detection["auroc"]["value"] <= 1 and detection["flagged_recall"]["n"] == 6


def test_the_model_of_a_run_can_judge(run: Run, images: Path, tmp_path: Path) -> None:
    short_run = ("--defense", "none", "--set", "recipe.min_steps=0", "--model", "resnet18-w4", "--epochs", 1)
    run("train", images, "--out", tmp_path / "run", *short_run, "--quiet")
    words = ("scan", images, "--network", tmp_path / "run", "--quiet", "--detector")
    run(*words, "entropy", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["cost"]["steps"] == 0  # nothing was trained
    assert "training of its own" in run(*words, "trap", "--out", tmp_path / "trap", status=2).output


def test_an_interruption_tells_how_to_go_on(run: Run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("antibackdoor.scanning.scan", interrupted)
    output = run("scan", images, "--out", "my run", status=130).output
    assert output.strip() == f"interrupted; go on with: antibackdoor scan {images} --out 'my run' --resume"


class Killer(Progress):
    """Interrupts after so many epochs."""

    def __init__(self, epochs: int):
        self.left = epochs
        super().__init__(epoch=self.count)

    def count(self, row: dict[str, Any]) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "epochs"), [("trap", 1), ("trap", 3), ("loss_drop", 1), ("spectral_signatures", 2)])
def test_a_resumed_scan_ends_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, epochs: int
) -> None:
    monkeypatch.setattr(Job, "checkpoint_seconds", -1.0)
    options = {"recipe.min_steps": 0, **({"warm_up.epochs": 2, "warm_up.min_steps": 0} if name == "trap" else {})}

    def once(out: str, **more: Any) -> None:
        folder = tmp_path / out
        antibackdoor.scan(images, detector=name, options=options, model="resnet18-w4", epochs=3, out=folder, **more)

    once("whole")
    with pytest.raises(KeyboardInterrupt):
        once("cut", progress=Killer(epochs))
    assert not (tmp_path / "cut" / "result.json").exists()
    torch.seed()  # a new process has another random state
    once("cut", resume=True)
    for file in ("suspects.csv", "verdict.json", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    with pytest.raises(InputError, match="other data or settings"):
        once("cut", resume=True, seed=1)


def test_any_module_can_judge() -> None:
    data = toy_images(24)
    flatten, linear = torch.nn.Flatten(), torch.nn.Linear
    net = torch.nn.Sequential(flatten, linear(432, 5), torch.nn.ReLU(), linear(5, 4))
    found = antibackdoor.scan(data, detector="spectral_signatures", network=net, device="cpu")
    assert found.suspects["probability"].isna().all()
    assert found.history == [] and not found.verdict.poisoned
    with pytest.raises(InputError, match="does not take these samples"):
        antibackdoor.scan(data, detector="loss", network=linear(7, 4))
    with pytest.raises(InputError, match="gives 7 logits a sample, but the data have 4 classes"):
        antibackdoor.scan(data, detector="loss", network=torch.nn.Sequential(flatten, linear(432, 7)))
    assert callable(antibackdoor.scan)  # not the module of that name
    architecture = create("resnet18-w4", data.spec)
    weights = {key: value.clone() for key, value in architecture.state_dict().items()}
    antibackdoor.scan(data, detector="loss", model=architecture, epochs=1, options={"recipe.min_steps": 0})
    assert all(torch.equal(weights[key], value) for key, value in architecture.state_dict().items())


def test_the_model_of_other_classes_does_not_judge(run: Run, images: Path, tmp_path: Path) -> None:
    words = ("--defense", "none", "--set", "recipe.min_steps=0", "--model", "resnet18-w4", "--epochs", 1, "--quiet")
    run("train", images, "--out", tmp_path / "run", *words)
    other = tmp_path / "other"
    shutil.copytree(images / "train", other)
    sorted(other.iterdir())[0].rename(other / "zebra")
    told = run("scan", other, "--network", tmp_path / "run", "--detector", "loss", "--out", tmp_path / "out", status=2)
    assert "knows other classes than these data" in told.output and not (tmp_path / "out").exists()


def test_what_was_not_read_is_told_and_kept(run: Run, images: Path, tmp_path: Path) -> None:
    (images / "train" / "red" / "broken.png").write_text("no image")
    found = run("scan", images, "--skip-unreadable", "--out", tmp_path / "out", "--detector", "loss", *SHORT, "--json")
    assert "1 of 76 files" in json.loads(found.stdout)["notes"][0] and "note: 1 of 76 files" in found.stderr
    assert "broken.png" in json.loads((tmp_path / "out" / "data.json").read_text())["notes"][0]
    words = ("--skip-unreadable", "--out", tmp_path / "quiet", "--detector", "loss", *SHORT, "--quiet")
    assert run("scan", images, *words).output == ""
