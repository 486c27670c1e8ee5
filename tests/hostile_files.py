"""What the tests with hostile input share: files made by hand, and the promise that every reader keeps."""

from __future__ import annotations

import io
import re
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shortage import short_of_memory

from antibackdoor.errors import LONGEST, InputError

SECONDS, BYTES = 5.0, 2**30
MAGIC = b"\x93NUMPY\x01\x00"

Case = tuple[Callable[[Path], Path], str]


def refused(call: Callable[[], object], sentence: str) -> str:
    """`call` raises InputError with this sentence (a pattern), on one visible line, in bounded time and memory."""
    with bounded(), pytest.raises(InputError) as caught:
        call()
    told = str(caught.value)
    assert not short_of_memory(caught.value), "a limit refuses; that there is no memory is no sentence about a file"
    assert re.search(sentence, told), told
    assert told.isprintable() and len(told) <= LONGEST + 5
    return told


@contextmanager
def bounded() -> Iterator[None]:
    """Not more than one GiB beyond what this process has now, and five seconds of computing."""
    kept = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(re.findall(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    started = time.process_time()
    resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, kept)
    assert time.process_time() - started < SECONDS


def png(width: int = 8, height: int = 8, *chunks: tuple[bytes, bytes], pixels: bytes | None = None) -> bytes:
    """A gray PNG whose header says what it is told to, with other chunks before the pixels."""
    rows = b"".join(b"\x00" + bytes(width) for _ in range(height)) if pixels is None else pixels
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def encoded(form: str = "PNG", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    """An honest image."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


def folder(root: Path, **files: bytes) -> Path:
    """Two class folders of honest images; `files` are put into the first one, with dots for `__`."""
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for k in range(2):
            (root / label / f"{k}.png").write_bytes(encoded(size=(8, 8)))
    for name, content in files.items():
        (root / "cat" / name.replace("__", ".")).write_bytes(content)
    return root


def npy(header: str, body: bytes = b"", *, version: bytes = b"\x01\x00") -> bytes:
    """An array file with this text as its header."""
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text + body


def array(value: Any) -> bytes:
    """An honest array file; objects are pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value), allow_pickle=True)
    return buffer.getvalue()


def zipped(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """An archive of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def images_npz(path: Path, **others: bytes) -> Path:
    """An `.npz` of four honest images in two classes, with members added or in place of its own."""
    honest = {"x": array(np.zeros((4, 8, 8, 3), np.uint8)), "y": array(np.array([0, 1, 0, 1]))}
    return zipped(path.with_suffix(".npz"), {f"{k}.npy": v for k, v in {**honest, **others}.items()})


def tarred(path: Path, *members: tuple[str, bytes]) -> Path:
    """A shard."""
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for name, content in members:
            told = tarfile.TarInfo(name)
            told.size = len(content)
            archive.addfile(told, io.BytesIO(content))
    return path.with_suffix(".tar")


def written(path: Path, text: str | bytes) -> Path:
    """A file with this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    return path


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of `size` bytes that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path
