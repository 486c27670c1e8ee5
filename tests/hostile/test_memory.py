"""That the memory is used up is no fault of a file: no reader may say so, or leave a sample out for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antibackdoor.data.load import load
from antibackdoor.files import load_state
from antibackdoor.models.pretrained import read_shapes, read_weights
from antibackdoor.report.run import read_run
from hostile_files import array, encoded, folder, images_npz, tarred, written, zipped

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def run(path: Path, name: str) -> Path:
    header = "id,label,score,probability,flagged,suggested_label,reason\n"
    written(path / "verdict.json", "{}")
    written(path / "suspects.csv", header + "a,x,1.0,0.5,True,y,because\n")
    return zipped(path / name, {"ids.npy": array(["a"])}).parent


def skipping(path: Path) -> object:
    return load(path, skip_unreadable=True)


IMAGE = encoded()
PANDAS = "pandas.read_csv"
"""Has an error of its own for it."""
READERS: dict[str, tuple[str, Callable[[Path], Path], Callable[[Path], object]]] = {
    "images": ("data.decoding.decode_image", folder, skipping),
    "sizes of images": ("data.decoding.Image.open", folder, skipping),
    "images in a table": (
        "data.decoding.decode_image",
        lambda p: parquet(p, image=[IMAGE] * 2, label=[0, 1]),
        skipping,
    ),
    "images in a shard": (
        "data.decoding.decode_image",
        lambda p: tarred(p, ("a.png", IMAGE), ("a.cls", b"0")),
        skipping,
    ),
    "pages of a table": ("data.arrow.declared", lambda p: parquet(p, series=[[1.0]] * 2, label=[0, 1]), load),
    "arrays": ("data.arrays.read_member", images_npz, load),
    "headers of arrays": ("data.npy.read_header", images_npz, load),
    "arrays in a shard": (
        "data.shards.read_array",
        lambda p: tarred(p, ("a.npy", array(np.zeros(3))), ("a.cls", b"0")),
        load,
    ),
    "series": ("data.series._table", lambda p: written(p.with_suffix(".tsv"), "1\t2\t3\n"), load),
    "gallery": ("report.run.read_members", lambda p: run(p, "gallery.npz"), read_run),
    "attention": ("report.run.read_members", lambda p: run(p, "attention.npz"), read_run),
    "states": ("files.safe_open", lambda p: written(p, b""), load_state),
    "weights": ("models.pretrained.load_file", lambda p: written(p.with_suffix(".safetensors"), b""), read_weights),
    "shapes": ("models.pretrained.safe_open", lambda p: written(p.with_suffix(".safetensors"), b""), read_shapes),
    "tables of a run": (PANDAS, lambda p: run(p, "other.npz"), read_run),
}


@pytest.mark.parametrize("reader", READERS)
def test_used_up_memory_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    place, make, read = READERS[reader]
    path = make(tmp_path / "set")

    def used_up(*_: object, **__: object) -> None:
        raise ValueError("Error tokenizing data. C error: out of memory") if place == PANDAS else MemoryError

    monkeypatch.setattr(place if place == PANDAS else f"antibackdoor.{place}", used_up)
    with pytest.raises(MemoryError):
        read(path)
