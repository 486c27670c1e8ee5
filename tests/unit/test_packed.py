"""Images larger than memory: packed once into a file, read as needed, the same results as in memory."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antibackdoor.data import decoding, packed
from antibackdoor.data.copies import copies_of
from antibackdoor.data.core import Splits
from antibackdoor.data.load import load
from antibackdoor.data.rows import FileRows, View
from antibackdoor.errors import InputError
from tiny import same_weights, train
from toy_files import write_images


def on_disk(splits: Splits) -> bool:
    found = [data.x.source if isinstance(data.x, View) else data.x for data in (splits.train, splits.test) if data]
    return all(isinstance(x, FileRows) for x in found)


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every image that is decoded."""
    calls: list[int] = []
    real = decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 20), ("test", 5)):
        write_images(tmp_path / "photos" / part, count=count)
    return tmp_path / "photos"


def shard(folder: Path) -> Path:
    """The same images as a tar shard."""
    with tarfile.open(folder.with_name("photos.tar"), "w") as archive:
        for number, file in enumerate(sorted(folder.glob("train/*/*.png"))):
            for ending, content in (("png", file.read_bytes()), ("cls", file.parent.name.encode())):
                entry = tarfile.TarInfo(f"{number:03d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return folder.with_name("photos.tar")


def test_the_same_set_as_in_memory_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (folder, shard(folder)):
        memory = load(source)
        assert isinstance(memory.train.x, torch.Tensor)
        calls = decoded(monkeypatch)
        first = load(source, memory_map=True)
        count = len(calls)
        again = load(source, memory_map=True)
        assert count == sum(len(data) for data in (memory.train, memory.test) if data) == len(calls)
        for mapped in (first, again):
            assert on_disk(mapped) and mapped.train.fingerprint() == memory.train.fingerprint()
            assert mapped.test is None or mapped.test.fingerprint() == memory.test.fingerprint()  # type: ignore[union-attr]


def test_the_same_weights_as_in_memory(folder: Path) -> None:
    memory, mapped = (train(load(folder, memory_map=where).train, seed=3)[0] for where in (False, True))
    assert same_weights(memory.model, mapped.model)


def test_the_copy_follows_the_files(folder: Path) -> None:
    load(folder, memory_map=True)
    victim = folder / "train" / "red" / "03.png"
    Image.fromarray(np.full((16, 16, 3), 7, dtype=np.uint8)).save(victim)
    os.utime(victim, ns=(1, 1))
    mapped = load(folder, memory_map=True).train
    assert mapped.x[torch.tensor([mapped.ids.index("train/red/03.png")])].eq(7).all()
    smaller = load(folder, memory_map=True, image_size=8)
    assert smaller.train.fingerprint() == load(folder, image_size=8).train.fingerprint()
    assert len(list(copies_of(folder, ()).parent.iterdir())) == 1, "the outdated copies are gone"


def test_damaged_files_are_told_each_time(folder: Path) -> None:
    (folder / "train" / "red" / "03.png").write_bytes(b"nonsense")
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 of 75 files .*red/03\.png"):
            load(folder, memory_map=True)
        with pytest.warns(UserWarning, match="left out"):
            mapped = load(folder, memory_map=True, skip_unreadable=True)
        with pytest.warns(UserWarning, match="left out"):
            memory = load(folder, memory_map=False, skip_unreadable=True)
        assert on_disk(mapped) and len(mapped.train) == 59
        assert mapped.train.fingerprint() == memory.train.fingerprint()


def test_what_would_fill_the_memory_goes_to_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANTIBACKDOOR_CACHE", str(tmp_path / "elsewhere"))
    want = load(folder).train.fingerprint()
    assert not (tmp_path / "elsewhere").exists() or not any((tmp_path / "elsewhere").rglob("*.bin"))
    monkeypatch.setattr(packed, "memory", lambda: 4 * 30 * 16 * 16 * 3)  # room for 30 of the 60
    monkeypatch.setattr(packed, "BLOCK", 10 * 16 * 16 * 3)
    for _ in range(2):
        splits = load(folder)
        assert isinstance(splits.train.x, FileRows) and splits.train.fingerprint() == want
    assert any((tmp_path / "elsewhere").rglob("*.bin"))
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("elsewhere", "photos")] == []
    assert isinstance(load(folder, memory_map=False).train.x, torch.Tensor)


def test_a_failed_copy_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed.np, "ascontiguousarray", full)
        with pytest.raises(InputError, match="No space left on device; free space"):
            load(folder, memory_map=True)
    assert not [file for file in copies_of(folder, ()).parent.rglob("*") if file.is_file()]
    assert on_disk(load(folder, memory_map=True))
