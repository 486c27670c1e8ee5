"""Each command as a user runs it, on toy files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from antibackdoor import InputError, load
from antibackdoor.bench.poisoned import poison, read_experiment
from antibackdoor.demo import run_all
from toy_files import TINY, TINY_DEFENSE, UNDEFENDED, Run, cut_network, write_images, write_recordings, write_series
from toy_review import toy_run_of

RESULTS = Path(__file__).parents[2] / "results"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from antibackdoor.cli import app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.split() == ["False", "False"]


def test_version(run: Run) -> None:
    assert run("--version").output.strip() == "antibackdoor 0.1.0"


def test_near_command_names_are_suggested(run: Run) -> None:
    assert "train" in run("trian", status=2).output


def test_train_predict_and_report_on_images(run: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = run("train", images, "--out", out, *TINY, *TINY_DEFENSE).output
    assert "report.html" in told and "clean accuracy" in told and "of 60 samples" in told
    wanted = {"model.safetensors", "model.json", "suspects.csv", "verdict.json", "metrics.json", "history.jsonl",
              "config.json", "env.json", "report.html", "result.json"}  # fmt: skip
    assert wanted <= {path.name for path in out.iterdir()}

    table = predicted(run, out, images)  # of data with a test set, the test set
    assert list(table) == ["id", "predicted", "probability", "label"] and len(table) == 15
    assert table["probability"].between(1 / 3 - 0.01, 1).all()

    (out / "report.html").unlink()
    assert run("report", out).output.strip().endswith("report.html") and (out / "report.html").is_file()

    flat = tmp_path / "flat"
    flat.mkdir()
    for number, size in enumerate([(16, 16), (40, 30)]):  # resized to the model's size
        Image.new("RGB", size, "red").save(flat / f"{number}.png")
    assert list(predicted(run, out, flat)) == ["id", "predicted", "probability"]
    assert predicted(run, out, flat / "1.png")["id"].tolist() == ["1.png"]
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 8, 8, 1), np.uint8))
    assert len(predicted(run, out, tmp_path / "x.npz")) == 3
    other = write_images(tmp_path / "other", ("green", "yellow"), count=2)
    assert predicted(run, out, other)["label"].tolist() == ["green"] * 2 + ["yellow"] * 2


def predicted(run: Run, folder: Path, data: Path) -> pd.DataFrame:
    table = folder.parent / "tables" / "predicted.csv"
    run("predict", folder, data, "--out", table)
    return pd.read_csv(table, dtype={"id": str})


def test_train_and_predict_on_series(run: Run, tmp_path: Path) -> None:
    data = write_series(tmp_path / "toy.ts")
    assert run("train", data, "--out", tmp_path / "run", *UNDEFENDED, *TINY, "--quiet").output == ""
    assert not json.loads((tmp_path / "run" / "verdict.json").read_text())["poisoned"]
    longer = write_series(tmp_path / "longer.ts", lengths=30)
    assert predicted(run, tmp_path / "run", longer)["label"].tolist()[:2] == ["slow", "fast"]
    run("predict", tmp_path / "run", write_images(tmp_path / "i"), "--out", tmp_path / "t.csv", status=2)


def test_train_and_predict_on_recordings(run: Run, tmp_path: Path) -> None:
    data = write_recordings(tmp_path / "set")
    told = run("train", data, "--out", tmp_path / "run", *TINY, *UNDEFENDED)
    assert "columns called time are not read" in told.stderr
    assert json.loads((tmp_path / "run" / "data.json").read_text())["shape"] == [1, 24]
    assert predicted(run, tmp_path / "run", data / "slow" / "00.csv")["id"].tolist() == ["00.csv"]
    rows = predicted(run, tmp_path / "run", data)
    assert len(rows) == 16 and rows["id"][0] == "fast/01.csv" and rows["label"][0] == "fast"


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_a_poisoned_set_is_written_and_measured(run: Run, images: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "poisoned"
    told = run(
        "poison", images, "--attack", "badnets", "--rate", 0.2, "--target", "red", "--format", form, "--out", out
    )
    assert "12 of 60 samples poisoned" in told.output
    assert (
        not list(tmp_path.glob("*.part")) and json.loads((out / "attack.json").read_text())["counts"]["poisoned"] == 12
    )

    original, again = load(images), load(out)
    made = poison(original, "badnets", {"rate": 0.2, "target": "red"})
    assert again.train.spec == original.train.spec
    assert sorted(map(bytes, again.train.x.numpy())) == sorted(
        map(bytes, made.splits.train.x[torch.arange(60)].numpy())
    )  # type: ignore[attr-defined]
    experiment = read_experiment(out, again)
    assert int(experiment.truth.poisoned.sum()) == 12 and len(experiment.triggered) == 10
    assert (again.train.y[experiment.truth.poisoned] == 2).all() and (
        experiment.truth.labels[experiment.truth.poisoned] != 2
    ).all()
    assert torch.equal(experiment.triggered.x[torch.arange(10)], made.experiment.triggered.x[torch.arange(10)])

    run("train", out, "--truth", out, "--out", tmp_path / "run", *TINY, *TINY_DEFENSE)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["attack_success_rate"]["n"] == 10 and "auroc" in metrics["detection"]
    other = run("train", images, "--truth", out, "--out", tmp_path / "other", *TINY, status=2)
    assert "truth.csv" in other.output and not (tmp_path / "other").exists()


def test_names_never_lead_out_of_a_written_folder(run: Run, tmp_path: Path) -> None:
    classes, ids = ["../../evil", "..", "a/b", "A_b"], [f"/etc/{k}/../x\n" for k in range(40)]
    x, y = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=classes, ids_train=ids, ids_test=ids)
    run("poison", tmp_path / "d.npz", "--attack", "badnets", "--format", "folder", "--out", tmp_path / "sub" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"d.npz", "sub"}
    assert len(list((tmp_path / "sub" / "out" / "data" / "train").iterdir())) == 4
    splits = load(tmp_path / "sub" / "out")
    read_experiment(tmp_path / "sub" / "out", splits)


def test_list_is_for_people_and_programs(run: Run) -> None:
    found = json.loads(run("list", "--json").output)
    assert set(found) == {"attacks", "defenses", "detectors", "models", "datasets"}
    assert all({"name", "kinds", "description"} <= set(row) for rows in found.values() for row in rows)
    one = json.loads(run("list", "defenses", "e2abl", "--json").output)["defenses"][0]
    assert "paper" in one["profiles"] and {"main.epochs", "isolation_rate"} <= {row["name"] for row in one["options"]}
    assert "isolation_rate" in run("list", "defenses", "e2abl").output
    assert "did you mean 'e2abl'" in run("list", "defenses", "e2able", status=2).output


@pytest.mark.long
def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cut_network(tmp_path).items():
        monkeypatch.setenv(name, value)
    told = run("demo", "--kind", "series", "--epochs", 1, "--out", tmp_path / "demo", *TINY_DEFENSE, "--no-open").output
    assert "Attack success rate" in told and "report.html" in told
    rows = json.loads((tmp_path / "demo" / "japanese_vowels-defended" / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["no defense", "defended"]
    run("demo", "--out", tmp_path / "demo", status=2)
    assert not (tmp_path / "tried").exists(), "the network"


@pytest.mark.skipif(os.name == "nt", reason="no signals, no shell")
@pytest.mark.parametrize(
    ("ends", "sentence"),
    [
        ("kill -9 $$", "'digits, defended' was killed by signal 9; .*train digits --resume"),
        ("echo 'epoch 3 of 9' >&2; kill -9 $$", "was killed by signal 9"),
        ("echo 'epoch 3 of 9' >&2; exit 1", "ended with status 1"),
        ("echo 'error: the disk is full.' >&2; exit 2", r"^the disk is full\.$"),
    ],
)
def test_a_run_of_the_demo_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, sentence: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{ends}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(InputError, match=sentence):
        run_all({"digits, defended": ["train", "digits"]}, Console(quiet=True))


def test_review_cleans_and_train_goes_on_with_it(run: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("train", images, "--out", out, *TINY, *UNDEFENDED, "--quiet")
    first = sorted((images / "train" / "blue").iterdir())[0].name
    (out / "review.jsonl").write_text(json.dumps({"id": f"train/blue/{first}", "decision": "drop"}) + "\n")
    told = run("review", out, "--export", tmp_path / "cleaned", "--format", "folder").output
    assert told.startswith("59 of 60 samples kept, 1 dropped, 0 relabeled")
    assert not (tmp_path / "cleaned" / "data" / "train" / "blue" / first).exists()
    assert len(load(tmp_path / "cleaned" / "data").train) == 59
    again = run("train", images, "--review", out, "--out", tmp_path / "again", *TINY, *UNDEFENDED).output
    assert "of 59 samples" in again
    run("train", images, "--review", tmp_path / "cleaned", "--out", tmp_path / "third", status=2)
    run("review", tmp_path / "cleaned", status=2)


def test_reviewed_data_are_read_as_the_run_read_them(run: Run, images: Path, tmp_path: Path) -> None:
    first, second, data = tmp_path / "run", tmp_path / "second", images / "train"
    run("train", data, "--image-size", 8, "--test", images / "test", "--out", first, *TINY, *UNDEFENDED, "--quiet")
    run("train", data, "--review", first, "--out", second, *TINY, *UNDEFENDED, "--quiet")
    told = json.loads((second / "data.json").read_text())
    assert (told["shape"], told["test_samples"]) == ([3, 8, 8], 15)
    resized = run("train", data, "--review", first, "--image-size", 9, "--out", tmp_path / "third", status=2).output
    assert "not the data" in resized, "what is said goes before"


def test_a_ledger_that_is_not_there_has_no_tables(run: Run, tmp_path: Path) -> None:
    assert "nowhere holds no results" in run("bench", "--out", tmp_path / "nowhere", "--table", status=2).output
    (tmp_path / "broken.error.json").write_text("{}")
    assert "holds no results" in run("bench", "--out", tmp_path, "--table", status=2).output


def test_the_truth_must_be_about_what_a_review_left(run: Run, tmp_path: Path) -> None:
    made, reviewed, out = tmp_path / "poisoned", tmp_path / "run", tmp_path / "again"
    run("poison", "digits", "--attack", "badnets", "--out", made, "--quiet")
    toy_run_of(load(made), reviewed)
    told = run("train", made, "--truth", made, "--review", reviewed, "--out", out, *TINY, *UNDEFENDED, status=2).output
    assert "truth.csv does not speak of these samples" in told and not out.exists()


def test_tables_of_a_ledger_in_folders(run: Run, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(next(RESULTS.rglob("*-none-*.json")), tmp_path / "deep" / "er")
    assert "| CA |" in run("bench", "--out", tmp_path, "--table").output


def test_a_grid_names_data_that_are_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text('[[cells]]\ndata = ["digit"]\n')
    told = run("bench", tmp_path / "grid.toml", "--out", tmp_path / "out", "--plan", status=2).output
    assert "unknown data set" in told and "did you mean 'digits'" in told
    run("bench", tmp_path / "grid.toml", "--out", tmp_path / "out", "--table")  # what there is can be shown without
