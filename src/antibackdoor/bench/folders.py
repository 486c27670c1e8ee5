"""A set written as files of the kind that users have: class folders, images with a CSV manifest, `.ts` series."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from antibackdoor.data.core import Data, Splits
from antibackdoor.data.folders import folder_names, safe_name, write_class_folders, write_png
from antibackdoor.data.load import load


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
    classes = folder_names(spec.classes)
    if spec.kind == "series":
        (folder / "data").mkdir()
        classes = [name.lower() for name in classes]  # as the reader of .ts files makes them
        ids = {
            part: _write_ts(data, folder / "data" / f"poisoned_{part.upper()}.ts", classes)
            for part, data in parts.items()
        }
        return Written(load(folder / "data"), ids, classes)
    size = (spec.shape[2], spec.shape[1])
    if manifest:
        (folder / "images").mkdir()
        ids = {part: _write_listed(data, folder, part) for part, data in parts.items()}
        with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerow(["path", "label", "split"])
            for part, data in parts.items():
                writer.writerows((name, classes[k], part) for name, k in zip(ids[part], data.y.tolist(), strict=True))
        return Written(load(folder / "data.csv", image_size=size, memory_map=False), ids, classes)
    ids = {part: write_class_folders(data, folder / "data", part, classes) for part, data in parts.items()}
    return Written(load(folder / "data", image_size=size, memory_map=False), ids, classes)


def _write_listed(data: Data, folder: Path, part: str) -> list[str]:
    """One PNG a sample in `folder/images/`; returns the names as a manifest beside it gives them."""
    names = [f"images/{part}-{row:06d}-{safe_name(Path(name).stem)}.png" for row, name in enumerate(data.ids)]
    for row, name in enumerate(names):
        write_png(data, row, folder / name)
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
