"""What people expect of any command: help that teaches, files of settings, JSON, plain text in pipes, hints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from antibackdoor import load
from antibackdoor.data import copies
from antibackdoor.data.copies import fills_memory
from toy_files import TINY, UNDEFENDED, Run

COMMANDS = ("train", "scan", "predict", "poison", "list", "review", "export", "bench")
SHELL = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(run: Run, command: str) -> None:
    told = run(command, "--help").output
    examples = told[told.index("Examples:") :]
    assert len(re.findall(rf"antibackdoor {command} ", examples)) >= 2 or command == "predict"


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", ["[set]", "quarter of the memory"]), ("bench", ["one a core", "its first"]), ("review", ["terminal"])],
)
def test_help_loses_nothing_in_brackets(run: Run, command: str, words: list[str]) -> None:
    told = " ".join(run(command, "--help").output.replace("│", " ").split())
    assert all(word in told for word in words) and not re.search(r" \.( |$)", told)


def test_every_example_names_options_that_exist(run: Run) -> None:
    for command in COMMANDS:
        told = run(command, "--help").output
        head, _, examples = told.partition("Examples:")
        used = {word for line in examples.splitlines() if f"antibackdoor {command}" in line for word in line.split()}
        assert {word for word in used if word.startswith("--")} <= set(re.findall(r"--[\w-]+", head))


def test_a_mistyped_option_is_recognized(run: Run, tmp_path: Path) -> None:
    assert "--epochs" in run("train", "x", "--out", tmp_path / "r", "--epcohs", "3", status=2).output


CONFIG = """
data = "{data}"
model = "resnet18-w8"
epochs = 1
device = "cpu"
defense = "none"
seed = 5
skip-unreadable = true
[set]
recipe.min_steps = 0
recipe.learning_rate = 0.01
"""


def test_a_file_of_settings_and_what_is_typed_over_it(run: Run, images: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "run.toml", tmp_path / "run"
    file.write_text(CONFIG.format(data=images))
    words = ("--config", file, "--seed", "3", "--set", "recipe.learning_rate=0.02", "--quiet")
    run("train", *words, "--out", out)
    kept = json.loads((out / "config.json").read_text())
    assert (kept["seed"], kept["epochs"], kept["defense"]["name"]) == (3, 1, "none")
    recipe = kept["defense"]["options"]["recipe"]
    assert (recipe["learning_rate"], recipe["min_steps"]) == (0.02, 0)


def test_a_file_spells_options_as_the_command_line_does(run: Run, images: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "poison.toml", tmp_path / "poisoned"
    file.write_text('attack = "badnets"\nformat = "folder"\nrate = 0.1\n[set]\nsize = 2\n')
    run("poison", images, "--config", file, "--out", out, "--quiet")
    assert (out / "data" / "train").is_dir(), "`format`, not the name that it has in Python"
    assert json.loads((out / "attack.json").read_text())["options"]["size"] == 2
    file.write_text("json = true\nepochs = 1\n")
    told = run("train", images, "--config", file, "--out", tmp_path / "run", *TINY, *UNDEFENDED).stdout
    assert json.loads(told)["samples"] == 60


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("epcohs = 3", "did you mean 'epochs'"),
        ("epochs =", "cannot read the settings"),
        ("set = 3", "must be a table"),
        ("epochs = {a = 1}", "takes a value"),
        ("[set]\nmain.epcohs = 3", "did you mean 'epochs'"),
    ],
)
def test_a_wrong_file_of_settings(run: Run, images: Path, tmp_path: Path, text: str, hint: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    told = run("train", images, "--config", file, "--out", tmp_path / "run", status=2).output
    assert hint in " ".join(told.split()) and not (tmp_path / "run").exists()
    missing = run("train", images, "--config", tmp_path / "no.toml", "--out", tmp_path / "run", status=2).output
    assert "cannot read the settings" in missing


def test_json_for_programs(run: Run, images: Path, tmp_path: Path) -> None:
    result = run("train", images, "--out", tmp_path / "run", *TINY, *UNDEFENDED, "--json", "--verbose")
    told = json.loads(result.stdout)
    assert told["samples"] == 60 and told["poisoned"] is False and told["architecture"] == "resnet18-w8"
    assert Path(told["report"]).is_file() and told["metrics"]["clean_accuracy"]["n"] == 15
    assert "60 samples (image, 3 x 16 x 16, 3 classes)" in " ".join(result.stderr.split())
    assert result.stderr.count("epoch ") == 2, "verbose tells every epoch"
    assert "defense: none with resnet18-w8; main training 8 steps of 16 samples" in " ".join(result.stderr.split())


def test_more_epochs_than_asked_for_are_told(run: Run, images: Path, tmp_path: Path) -> None:
    floor = (*UNDEFENDED[:-1], "recipe.min_steps=12")
    told = " ".join(run("train", images, "--out", tmp_path / "run", *TINY, *floor).output.split())
    assert "12 steps of 16 samples (3 epochs: so small a set gets more, unless --set recipe.min_steps=0)" in told


@pytest.mark.long
def test_json_of_every_command_that_makes_something(run: Run, images: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "run", tmp_path / "rows.csv"
    run("train", images, "--out", out, *TINY, *UNDEFENDED, "--quiet")
    poisoned = ("poison", images, "--attack", "badnets", "--rate", "0.2", "--out", tmp_path / "poisoned")
    assert json.loads(run(*poisoned, "--json").stdout)["counts"]["poisoned"] == 12
    told = json.loads(run("predict", out, images, "--out", rows, "--json").stdout)
    assert told["predictions"] == 15 == len(rows.read_text().splitlines()) - 1 and 0 <= told["as_labeled"] <= 1
    assert json.loads(run("export", out, tmp_path / "s.csv", "--json").stdout)["out"] == str(tmp_path / "s.csv")
    grid = tmp_path / "grid.toml"
    grid.write_text('[[cells]]\ndata = ["digits"]\ntrain_size = 60\nmodels = ["resnet18-w4"]\nepochs = 1\n')
    words = ("bench", grid, "--out", tmp_path / "results", "--workers", "0", "--quiet", "--json")
    plan = json.loads(run(*words, "--plan").stdout)
    assert plan["done"] == [] and len(plan["missing"]) == 1
    assert json.loads(run(*words).stdout) == {"cells": [*plan["missing"]], "broken": [], "out": words[3].__str__()}


def test_json_of_what_is_wrong(run: Run, tmp_path: Path) -> None:
    for words in (("train", tmp_path / "gone", "--out", tmp_path / "run"), ("list", "attacks", "badnest")):
        result = run(*words, "--json", status=2)
        assert result.stderr == f"error: {json.loads(result.stdout)['error']}\n"
    assert "did you mean 'badnets'" in result.stderr
    unread = run("train", "x", "--config", tmp_path / "gone.toml", "--out", tmp_path / "run", "--json", status=2)
    assert "gone.toml" in json.loads(unread.stdout)["error"]


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        (ZeroDivisionError("by zero"), 1, "something unexpected went wrong (ZeroDivisionError: by zero)"),
        (MemoryError(), 2, "memory of this machine"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "a smaller batch"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_json_of_whatever_goes_wrong(
    run: Run, monkeypatch: pytest.MonkeyPatch, wrong: BaseException, status: int, words: str
) -> None:
    def broken(*_: object) -> None:
        raise wrong

    monkeypatch.setattr("antibackdoor.listing.listing", broken)
    result = run("list", "--json", status=status)
    told = json.loads(result.stdout)["error"]
    assert words in told and result.stderr.removeprefix("error: ") == f"{told}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("list", "defens"), "unknown word 'defens': did you mean 'defenses'?"),
        (("review", "run", "--format", "foldr"), "unknown value of --format 'foldr': did you mean 'folder'?"),
        (("list", "detectors", "spectral"), "did you mean 'spectral_signatures'?"),
    ],
)
def test_the_nearest_word_of_a_closed_list(run: Run, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in run(*words, status=2).stderr


@pytest.mark.parametrize("words", [("--epochs", "x"), ("--modle", "x")])
def test_json_of_words_that_the_command_does_not_take(run: Run, words: tuple[str, ...]) -> None:
    result = run("train", "photos", "--out", "run", *words, "--json", status=2)
    assert words[0] in json.loads(result.stdout)["error"]


def test_no_colors_in_a_pipe(run: Run) -> None:
    code = "from antibackdoor.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, env=SHELL, check=True)
    assert b"Examples:" in done.stdout and b"\x1b" not in done.stdout + done.stderr
    assert "\x1b" not in run("list", "attacks").output


def test_the_doctor(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTIBACKDOOR_DATA", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    found = json.loads(run("doctor", "--json").output)
    assert found["problems"] == [] and found["versions"]["torch"] and found["devices"]["a training step"]
    assert found["data"]["embedded"] == ["digits", "japanese_vowels"]
    np.savez(tmp_path / "cifar10.npz", x=np.zeros(1))
    monkeypatch.setenv("ANTIBACKDOOR_DATA", str(tmp_path))
    assert json.loads(run("doctor", "--json").output)["data"]["in root"] == ["cifar10"]
    told = run("doctor", "--data-root", tmp_path / "gone", status=1).output
    assert "is no folder" in " ".join(told.split()) and "No problem" not in told


def test_completion_is_offered() -> None:
    code = "from antibackdoor.cli import main; main()"
    asked = {**SHELL, "COMP_WORDS": "antibackdoor tr", "COMP_CWORD": "1", "_ANTIBACKDOOR_COMPLETE": "complete_bash"}
    script = "import sys; sys.argv[0] = 'antibackdoor'; " + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=asked, check=False)
    assert done.stdout.split() == ["train"]


def test_a_large_file_is_mapped_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x=np.zeros((8, 8, 8, 3), np.uint8), y=np.arange(8) % 2)
    assert not fills_memory(path) and fills_memory(path, share=1e-12)
    assert not fills_memory(tmp_path / "none.npz")
    load(path)
    assert not copies.copies_of(path, ()).parent.exists()
    monkeypatch.setattr("antibackdoor.data.load.fills_memory", lambda path: copies.fills_memory(path, 1e-12))
    data = load(path)
    assert (
        copies.copies_of(path, ()).parent.exists()
        and data.train.fingerprint() == load(path, memory_map=False).train.fingerprint()
    )
