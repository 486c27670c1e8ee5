"""What is fuzzed: every reader of a file that a stranger may have made; bytes in, InputError or nothing out.

A reader of containers gets its bytes with the checksums mended, so that mutations reach what lies behind them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from antibackdoor.bench.declared import tables_text
from antibackdoor.bench.grid import read_grid
from antibackdoor.data.core import Data, Spec
from antibackdoor.data.decoding import decode_image
from antibackdoor.data.load import load
from antibackdoor.data.truth import read_truth
from antibackdoor.exports import read_suspects
from antibackdoor.files import load_state, read_json
from antibackdoor.models.pretrained import read_weights
from antibackdoor.report.page import render
from antibackdoor.report.run import read_run
from antibackdoor.review.decisions import Decisions
from antibackdoor.review.session import open_session
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


def pictures(*names: str) -> None:
    """Images at these places."""
    for shade, name in enumerate(names):
        path = SCRATCH / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


def manifest(content: bytes) -> None:
    """Beside two images."""
    pictures("listed/a.png", "listed/b.png")
    load(file("listed/list.csv", content))


def folder(content: bytes) -> None:
    """A folder with the names and files of an archive."""
    root = SCRATCH / "folder"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist()[:20]:
                place = root / PurePosixPath(member.filename)
                if ".." not in place.parts and place.is_relative_to(root) and member.file_size < 2**20:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(member))
    except Exception:
        pass  # of the archive, or of a name that the system does not take: what is there is what is read
    load(root)


def recording(content: bytes) -> None:
    """Beside one that is whole."""
    file("recordings/a/0.csv", b"x,y\n1,2\n3,4\n")
    file("recordings/b/0.csv", content)
    load(SCRATCH / "recordings", missing="interpolate")


def pack(content: bytes) -> None:
    """What is told of decoded images that were kept."""
    pictures("packed/a/0.png", "packed/b/0.png")
    with patch.dict(os.environ, ANTIBACKDOOR_CACHE=str(SCRATCH / "cache")):
        for _ in range(2):
            load(SCRATCH / "packed", memory_map=True)
            for card in SCRATCH.rglob("pack.json"):
                card.write_bytes(content)


def saved(name: str) -> Callable[[bytes], object]:
    """A file of a folder that `save_to_disk` wrote."""

    def target(content: bytes) -> None:
        honest = {path.name: path.read_bytes() for path in (CORPUS / "arrow").glob("series-stream")}
        file(f"{name}/train/data-00000-of-00001.arrow", honest["series-stream"])
        file(f"{name}/train/state.json", (CORPUS / "saved_state" / "plain").read_bytes())
        file(f"{name}/dataset_dict.json", b'{"splits": ["train"]}')
        file(f"{name}/{'train/' if name == 'state.json' else ''}{name}", content)
        load(SCRATCH / name)

    return target


def decisions(content: bytes) -> None:
    """What somebody decided about samples."""
    data = Data(
        torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
        torch.tensor([0, 1]),
        Spec("image", (1, 2, 2), ("x", "y")),
        ["a/0.png", "=b"],
    )
    Decisions(file("review/review.jsonl", content).parent, data)


def reviewed(name: str) -> Callable[[bytes], object]:
    """A file of a run that says on which data it was made and where they are; of paths only those of ours are read."""

    def target(content: bytes) -> None:
        pictures("data/x/0.png", "data/y/0.png")
        splits = load(SCRATCH / "data")
        honest = {"source": str(SCRATCH / "data"), "test": None, "image_size": None, "missing": "refuse"}
        if name == "source.json":
            try:
                told = json.loads(content)
            except (ValueError, RecursionError):
                told = None
            if isinstance(told, dict):
                paths = {key: str(SCRATCH / "data") for key in ("source", "test") if isinstance(told.get(key), str)}
                content = json.dumps({**told, **paths}).encode()
        rows = "".join(f'"{row}","x",1.0,0.5,True,"",""\n' for row in splits.train.ids)
        file(f"{name}/suspects.csv", b"id,label,score,probability,flagged,suggested_label,reason\n" + rows.encode())
        file(f"{name}/config.json", json.dumps({"data": splits.train.fingerprint()}).encode())
        file(f"{name}/source.json", json.dumps(honest).encode())
        with patch.dict(os.environ, ANTIBACKDOOR_CACHE=str(SCRATCH / "cache")):
            mended = content.replace(b"0123456789abcdef", splits.train.fingerprint().encode())
            open_session(file(f"{name}/{name}", mended).parent)

    return target


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
            file(f"run-{name}/{other}", honest)
        file(f"run-{name}/{name}", content)
        render(read_run(SCRATCH / f"run-{name}"))
        if name == "suspects.csv":
            read_suspects(SCRATCH / f"run-{name}")

    return target


def truth(content: bytes) -> None:
    """The table of an experiment."""
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
    "recording": recording,
    "table": lambda content: load(file("set.csv", content), missing="interpolate"),
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
    "run_attention": run_file("attention.npz"),
    "run_config": reviewed("config.json"),
    "run_source": reviewed("source.json"),
    "review": decisions,
    "folder": folder,
    "pack": pack,
    "saved_state": saved("state.json"),
    "saved_splits": saved("dataset_dict.json"),
    "ledger": lambda content: tables_text(None, file("ledger/cell.json", content).parent, "markdown"),
}
