"""Bad input: status 2, one sentence, no traceback, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antibackdoor import cli, load
from toy_files import TINY, Run, write_images, write_series
from toy_review import toy_run_of


def empty(root: Path) -> Path:
    root.mkdir()
    return root


def truncated(root: Path) -> Path:
    path = write_images(root) / "red" / "00.png"
    path.write_bytes(path.read_bytes()[:100])
    return root


def with_text(root: Path) -> Path:
    (write_images(root) / "red" / "notes.txt").write_text("not an image")
    return root


def wrong_labels(root: Path) -> Path:
    path = root.with_suffix(".npz")
    np.savez(path, x=np.zeros((4, 8, 8, 3), np.uint8), y=np.array([0, 1, 2, 7]), classes=["a", "b", "c"])
    return path


def shapes_differ(root: Path) -> Path:
    path, y = root.with_suffix(".npz"), np.arange(8) % 2
    np.savez(
        path, x_train=np.zeros((8, 8, 8, 3), np.uint8), y_train=y, x_test=np.zeros((8, 9, 9, 3), np.uint8), y_test=y
    )
    return path


def untested(root: Path) -> Path:
    path = root.with_suffix(".npz")
    x, y = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 4
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y % 2)
    return path


def a_run(root: Path) -> Path:
    root.mkdir()
    for name in ("config.json", "suspects.csv"):
        (root / name).touch()
    return root


DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda root: root, "unknown data set"),
    "empty folder": (empty, "no class folders"),
    "one class": (lambda root: write_images(root, ("red",)), "one class"),
    "truncated image": (truncated, "1 of 60 files"),
    "text among images": (with_text, "notes.txt"),
    "labels out of range": (wrong_labels, "7"),
    "gaps": (lambda root: write_series(root.with_suffix(".ts"), value="NaN"), "--missing"),
    "length 1": (lambda root: write_series(root.with_suffix(".ts"), lengths=1), "length 1"),
    "shapes differ": (shapes_differ, "shape"),
    "classes absent from the test set": (untested, "no sample of the class '2' (and 1 more)"),
    "a run": (a_run, "holds a run, not data"),
}


@pytest.mark.parametrize("command", ["train", "scan"])
@pytest.mark.parametrize("case", DATA)
def test_bad_data(run: Run, tmp_path: Path, case: str, command: str) -> None:
    make, words = DATA[case]
    refused(run, make(tmp_path / "data"), tmp_path / "out", words, command=command)


OPTIONS = {
    "model": (["--model", "resnet81"], "did you mean 'resnet18'"),
    "width": (["--model", "resnet18-w0"], "width"),
    "defense": (["--defense", "e2alb"], "did you mean 'e2abl'"),
    "profile": (["--defense", "e2abl:papr"], "did you mean 'paper'"),
    "set": (["--set", "truste=0.1"], "did you mean 'trusted'"),
    "nested set": (["--set", "main.epoch=1"], "did you mean 'epochs'"),
    "set value": (["--set", "trusted=2"], "less than or equal to 1"),
    "set form": (["--set", "trusted"], "NAME=VALUE"),
    "device": (["--device", "gpu"], "unknown device"),
    "precision": (["--precision", "half"], "precision"),
    "truth": (["--truth", "nowhere"], "truth.csv"),
    "test": (["--test", "nowhere"], "does not exist"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(run: Run, images: Path, tmp_path: Path, case: str) -> None:
    words, told = OPTIONS[case]
    refused(run, images, tmp_path / "out", told, *words)


SCAN_OPTIONS = {
    "detector": (["--detector", "spectral"], "unknown detector"),
    "near detector": (["--detector", "entrop"], "did you mean 'entropy'"),
    "set": (["--detector", "loss", "--set", "flagg=0.1"], "did you mean 'flag'"),
    "set value": (["--detector", "loss", "--set", "flag=2"], "less than or equal to 1"),
    "model": (["--model", "resnet81"], "did you mean 'resnet18'"),
    "device": (["--device", "gpu"], "unknown device"),
    "network": (["--detector", "loss", "--network", "nowhere"], "model.json"),
    "truth": (["--truth", "nowhere"], "truth.csv"),
}


@pytest.mark.parametrize("case", SCAN_OPTIONS)
def test_bad_scan_options(run: Run, images: Path, tmp_path: Path, case: str) -> None:
    words, told = SCAN_OPTIONS[case]
    refused(run, images, tmp_path / "out", told, *words, command="scan")


def refused(run: Run, data: Path, out: Path, told: str, *words: str, command: str = "train") -> None:
    before = {path.name for path in out.parent.iterdir()}
    output = run(command, data, "--out", out, *words, status=2).output
    assert told in output and output.startswith("error: ") and len(output.strip().splitlines()) == 1
    assert {path.name for path in out.parent.iterdir()} == before


@pytest.mark.parametrize(
    "words", [["--target", "purple"], ["--rate", "0.9"], ["--attack", "badnet"], ["--set", "size=99"]]
)
def test_bad_poison(run: Run, images: Path, tmp_path: Path, words: list[str]) -> None:
    attack = [] if "--attack" in words else ["--attack", "badnets"]
    output = run("poison", images, "--out", tmp_path / "out", *attack, *words, status=2).output
    assert output.startswith("error: ") and {path.name for path in tmp_path.iterdir()} == {"data"}


def test_a_folder_in_use_is_refused(run: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for command in (["train"], ["scan"], ["poison", "--attack", "badnets"], ["demo"]):
        data = [] if command == ["demo"] else [images]
        assert "not empty" in run(command[0], *data, *command[1:], "--out", tmp_path / "out", status=2).output
    assert "no config.json" in run("train", images, "--out", tmp_path / "out", "--resume", *TINY, status=2).output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_nothing_is_written_among_the_data(run: Run, images: Path, tmp_path: Path) -> None:
    train, link = images / "train", tmp_path / "link"
    link.symlink_to(train)
    toy_run_of(load(train), tmp_path / "run")
    for words in (
        ("train", train, "--out", train / "run"),
        ("scan", train, "--out", link / "deep" / "run"),
        ("train", train, "--test", images / "test", "--out", images / "test" / "run"),
        ("poison", images, "--attack", "badnets", "--out", images / "poisoned"),
        ("review", tmp_path / "run", "--export", train),
        ("predict", tmp_path / "run", images, "--out", images / "predicted.csv"),
    ):
        assert "lies in the folder of the data" in run(*words, status=2).output
    assert len(load(images).train) == 60 and len(load(train).train) == 60


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(run: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "error: " in run("train", images, "--out", tmp_path / "locked" / "out", *TINY, status=2).output


def test_predict_and_report_need_a_run_folder(run: Run, images: Path, tmp_path: Path) -> None:
    assert "model.json" in run("predict", tmp_path, images, "--out", tmp_path / "t.csv", status=2).output
    assert "finished run" in run("report", tmp_path, status=2).output
    assert not (tmp_path / "t.csv").exists()


def test_a_full_disk_is_told_in_a_sentence(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "out/model.safetensors")

    monkeypatch.setattr("antibackdoor.api.train", full)
    assert "No space left" in run("train", images, "--out", tmp_path / "out", status=2).output


def test_an_interruption_tells_how_to_go_on(run: Run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("antibackdoor.api.train", interrupted)
    output = run("train", images, "--out", "my run", status=130).output
    assert output.strip() == f"interrupted; go on with: antibackdoor train {images} --out 'my run' --resume"


def test_the_unexpected_is_told_briefly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("antibackdoor.listing.listing", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["antibackdoor", "list"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()
