"""What is fuzzed: every reader of a file that a stranger may have made; bytes in, InputError or nothing out.

A reader of containers gets its bytes with the checksums mended, so that mutations reach what lies behind them.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from antibackdoor.bench.grid import read_grid
from antibackdoor.data.core import Data, Spec
from antibackdoor.data.images import decode_image
from antibackdoor.data.load import load
from antibackdoor.data.truth import read_truth
from antibackdoor.exports import read_suspects
from antibackdoor.files import load_state, read_json
from antibackdoor.models.pretrained import read_weights
from antibackdoor.report.page import render
from antibackdoor.report.run import read_run
from antibackdoor.runs import load_model
from antibackdoor.settings import read_settings

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
LABELS = np.array([0, 1])
OPTIONS = {name.replace("_", "-"): name for name in ("data", "out", "epochs", "seed", "image_size", "defense")}


def file(name: str, content: bytes) -> Path:
    """These bytes as a file."""
    path = SCRATCH / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def png_mended(content: bytes) -> bytes:
    """Checksums of a PNG's chunks put right."""
    if not content.startswith(b"\x89PNG"):
        return content
    out, place = bytearray(content), 8
    while place + 12 <= len(out):
        (size,) = struct.unpack_from(">I", out, place)
        end = place + 8 + size
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def tar_mended(content: bytes) -> bytes:
    """Checksums of a tar archive's headers put right, and its end."""
    out = bytearray(content[: len(content) // 512 * 512])
    for place in range(0, len(out), 512):
        if out[place + 257 : place + 262] == b"ustar":
            out[place + 148 : place + 156] = b" " * 8
            out[place + 148 : place + 156] = b"%06o\0 " % sum(out[place : place + 512])
    return bytes(out) + bytes(1024)


def npz(content: bytes, name: str = "x.npy") -> Path:
    """An archive in which these bytes are one array."""
    buffer = io.BytesIO()
    np.save(buffer, LABELS)
    with zipfile.ZipFile(SCRATCH / "array.npz", "w") as archive:
        archive.writestr(name, content)
        if name == "x.npy":
            archive.writestr("y.npy", buffer.getvalue())
    return SCRATCH / "array.npz"


def manifest(content: bytes) -> None:
    """Beside two images."""
    for name, shade in (("a.png", 10), ("b.png", 200)):
        path = SCRATCH / "listed" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
    load(file("listed/list.csv", content))


def card(content: bytes) -> None:
    """A card of a model beside the weights of an honest one."""
    file("model/model.json", content)
    file("model/model.safetensors", next((CORPUS / "weights").iterdir()).read_bytes())
    load_model(SCRATCH / "model")


def run_file(name: str) -> Callable[[bytes], object]:
    """One file of a run folder beside honest ones, read and shown as the report does."""

    def target(content: bytes) -> None:
        for other in ("verdict.json", "suspects.csv", "metrics.json", "history.jsonl"):
            honest = next((CORPUS / f"run_{other.partition('.')[0]}").iterdir()).read_bytes()
            file(f"run-{name}/{other}", content if other == name else honest)
        if name == "gallery.npz":
            file(f"run-{name}/{name}", content)
        render(read_run(SCRATCH / f"run-{name}"))
        if name == "suspects.csv":
            read_suspects(SCRATCH / f"run-{name}")

    return target


def truth(content: bytes) -> None:
    """The table of an experiment."""
    import torch

    spec = Spec("image", (1, 2, 2), ("a", "b"))
    data = Data(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), spec, ["0", "1"])
    read_truth(file("truth.csv", content), data)


def load_image(content: bytes) -> object:
    """One image; what a decoder says of a damaged one is caught where whole folders are read, so any error will do."""
    try:
        return decode_image(content, (8, 8))
    except MemoryError:
        raise
    except Exception:
        return None


TARGETS: dict[str, Callable[[bytes], object]] = {
    "png": lambda content: load_image(png_mended(content)),
    "jpeg": load_image,
    "webp": load_image,
    "bmp": load_image,
    "ppm": load_image,
    "manifest": manifest,
    "npz": lambda content: load(file("set.npz", content)),
    "npy": lambda content: load(npz(content)),
    "ts": lambda content: load(file("set.ts", content)),
    "tsv": lambda content: load(file("set.tsv", content)),
    "arff": lambda content: load(file("set.arff", content)),
    "parquet": lambda content: load(file("set.parquet", content)),
    "arrow": lambda content: load(file("set.arrow", content)),
    "tar": lambda content: load(file("set.tar", tar_mended(content))),
    "card": card,
    "weights": lambda content: read_weights(file("weights.safetensors", content)),
    "state": lambda content: load_state(file("state.safetensors", content)),
    "json": lambda content: read_json(file("some.json", content)),
    "settings": lambda content: read_settings(file("settings.toml", content), OPTIONS),
    "grid": lambda content: read_grid(file("grid.toml", content)).cells(),
    "truth": truth,
    "run_verdict": run_file("verdict.json"),
    "run_metrics": run_file("metrics.json"),
    "run_suspects": run_file("suspects.csv"),
    "run_history": run_file("history.jsonl"),
    "run_gallery": run_file("gallery.npz"),
}
