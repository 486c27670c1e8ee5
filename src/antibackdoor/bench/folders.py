"""A set written as files of the kind that users have: class folders, images with a CSV manifest, `.ts` series."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from antibackdoor.data.core import Data, Splits
from antibackdoor.data.images import load_folder, load_manifest
from antibackdoor.data.series import load_series


@dataclass(frozen=True)
class Written:
    """splits: what a reader makes of the files. ids: of each part, the ids under which its samples are read.

    classes: the names under which the classes are read, in the order of the set that was written.
    """

    splits: Splits
    ids: dict[str, list[str]]
    classes: list[str]


def write_files(splits: Splits, folder: Path, *, manifest: bool = False) -> Written:
    """Write `folder/data/train/CLASS/*.png`, or `folder/data.csv` and `folder/images/*.png`, or `folder/data/*.ts`.

    Whatever names the data bring, every file lies inside of `folder`. Read and written values are the same.
    """
    parts = {"train": splits.train, **({} if splits.test is None else {"test": splits.test})}
    spec = splits.train.spec
    classes = _plain_names(spec.classes)
    if spec.kind == "series":
        (folder / "data").mkdir()
        classes = [name.lower() for name in classes]  # as the reader of .ts files makes them
        ids = {
            part: _write_ts(data, folder / "data" / f"poisoned_{part.upper()}.ts", classes)
            for part, data in parts.items()
        }
        return Written(load_series(folder / "data"), ids, classes)
    size = (spec.shape[2], spec.shape[1])
    if manifest:
        (folder / "images").mkdir()
        ids = {part: _write_images(data, folder, f"images/{part}-", None) for part, data in parts.items()}
        with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            for part, data in parts.items():
                writer.writerows((name, classes[k], part) for name, k in zip(ids[part], data.y.tolist(), strict=True))
        return Written(load_manifest(folder / "data.csv", image_size=size), ids, classes)
    ids = {part: _write_images(data, folder / "data", f"{part}/", classes) for part, data in parts.items()}
    return Written(load_folder(folder / "data", image_size=size), ids, classes)


def _write_images(data: Data, root: Path, prefix: str, folders: Sequence[str] | None) -> list[str]:
    """One PNG a sample, in the folder of its class where there are folders; returns the names below `root`."""
    names = []
    if folders is not None:
        for k in data.y.unique().tolist():
            (root / f"{prefix}{folders[k]}").mkdir(parents=True)
    for row, (label, sample_id) in enumerate(zip(data.y.tolist(), data.ids, strict=True)):
        # The row number keeps names apart and in order; it says nothing about the poison.
        inside = "" if folders is None else f"{folders[label]}/"
        names.append(f"{prefix}{inside}{row:06d}-{_plain(Path(sample_id).stem)}.png")
        pixels = data.x[torch.tensor([row])][0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(root / names[-1])
    return names


def _write_ts(data: Data, path: Path, classes: Sequence[str]) -> list[str]:
    """One line a series: its channels, then its class. Nine digits bring every float32 back."""
    channels, steps = data.spec.shape
    unequal = data.lengths is not None
    head = {
        "problemName": "poisoned",
        "timeStamps": "false",
        "missing": "false",
        "univariate": str(channels == 1).lower(),
        **({} if channels == 1 else {"dimensions": str(channels)}),
        "equalLength": str(not unequal).lower(),
        **({} if unequal else {"seriesLength": str(steps)}),
        "classLabel": "true " + " ".join(classes),
    }
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"@{name} {value}\n" for name, value in head.items())
        file.write("@data\n")
        for rows in data.chunks():
            ends = [steps] * len(rows) if data.lengths is None else data.lengths[rows].tolist()
            for series, label, end in zip(data.x[rows].numpy(), data.y[rows].tolist(), ends, strict=True):
                lines = [",".join(f"{value:.9g}" for value in channel[:end].astype(np.float64)) for channel in series]
                file.write(":".join([*lines, classes[label]]) + "\n")
    return [str(row) for row in range(len(data))]


def _plain_names(classes: Sequence[str]) -> list[str]:
    """Class names as folder names, different even where letter case does not count."""
    names: list[str] = []
    for number, name in enumerate(classes):
        plain, taken = _plain(name), {other.casefold() for other in names}
        names.append(f"{plain}-{number}" if plain.casefold() in taken else plain)
    return names


def _plain(text: str) -> str:
    """Text from whoever made the data as a plain file name: no separators, no leading dot, not long."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[-60:] or "_"
