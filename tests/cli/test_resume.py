"""A killed run goes on to the same weights, history and suspects as one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from antibackdoor import InputError, train
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress

SETTINGS: dict[str, Any] = {"trap.epochs": 2, "trap.min_steps": 0, "outsider.min_steps": 0, "main.min_steps": 0}


class Killer(Progress):
    """Interrupts after so many epochs."""

    def __init__(self, epochs: int):
        self.left = epochs
        super().__init__(epoch=self.count)

    def count(self, row: dict[str, Any]) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def once(data: Path, out: Path, **more: Any) -> None:
    train(data, options=SETTINGS, model="resnet18-w8", epochs=3, device="cpu", out=out, **more)


@pytest.mark.parametrize("epochs", [0, 1, 3, 6])  # before and in the trap, among the outsiders, in the main training
def test_a_resumed_run_ends_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    monkeypatch.setattr(Job, "checkpoint_seconds", 0.0)
    once(images, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        once(images, tmp_path / "cut", progress=Killer(epochs))
    assert not (tmp_path / "cut" / "result.json").exists()
    torch.seed()  # a new process has another random state
    once(images, tmp_path / "cut", resume=True)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] | weights[1])
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    for name in ("suspects.csv", "verdict.json", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_other_settings_are_not_resumed(images: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        once(images, tmp_path / "cut", progress=Killer(0))
    with pytest.raises(InputError, match="other data or settings"):
        once(images, tmp_path / "cut", resume=True, seed=1)
