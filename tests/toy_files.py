"""Toy data as files, and settings that make a run take a moment, for tests of the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import Result

Run = Callable[..., Result]
TINY = ("--model", "resnet18-w8", "--epochs", "2", "--device", "cpu")
UNDEFENDED = ("--defense", "none", "--set", "recipe.min_steps=0")
TINY_DEFENSE = tuple(
    word
    for setting in ("trap.epochs=2", "trap.min_steps=0", "outsider.min_steps=0", "main.min_steps=0")
    for word in ("--set", setting)
)


def write_images(root: Path, classes: tuple[str, ...] = ("blue", "green", "red"), count: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            pixels[..., 2 - number % 3] += 150
            Image.fromarray(pixels).save(root / name / f"{k:02d}.png")
    return root


HOOK = """
import os, sys
def hook(event, given):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        return
    if event == "socket.bind" and given[1][0] == "127.0.0.1":
        return  # the review page, which is for this machine only
    with open(os.environ["TRIED"], "a") as file:
        print(event, given[1:], file=file)
    raise OSError("the network is cut")
sys.addaudithook(hook)  # cannot be taken back, and sees every library
"""
"""Python loads it at its start, in the processes that commands start too."""


def cut_network(folder: Path) -> dict[str, str]:
    """The environment of processes that must not reach for the network; what they tried is noted in `folder/tried`."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(HOOK)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path]), "TRIED": str(folder / "tried")}


def write_series(path: Path, lengths: int = 24, count: int = 16, value: str | None = None) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for k in range(count):
        line = np.sin(np.arange(lengths) * (0.3 + 0.6 * (k % 2))) + rng.normal(0, 0.1, lengths)
        text = [f"{x:.4f}" for x in line]
        if value and k == 3:
            text[0] = value
        lines.append(",".join(text) + f":{'slow' if k % 2 == 0 else 'fast'}")
    head = "@problemName toy\n@timeStamps false\n@missing false\n@univariate true\n@equalLength true\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}@seriesLength {lengths}\n@classLabel true slow fast\n@data\n" + "\n".join(lines) + "\n")
    return path


def write_recordings(root: Path, count: int = 16, steps: int = 24) -> Path:
    """A CSV file a sample in class folders, with a column of time stamps."""
    rng = np.random.default_rng(0)
    for k in range(count):
        path = root / ("slow", "fast")[k % 2] / f"{k:02d}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = np.sin(np.arange(steps) * (0.3 + 0.6 * (k % 2))) + rng.normal(0, 0.1, steps)
        path.write_text("time,value\n" + "".join(f"{step / 10},{value:.4f}\n" for step, value in enumerate(line)))
    return root
