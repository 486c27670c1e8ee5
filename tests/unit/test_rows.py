from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from antibackdoor.data.core import Data, Splits, check_trainable
from antibackdoor.data.rows import FileRows, Overlay, View
from antibackdoor.errors import InputError
from tiny import stored
from toy import toy_images, toy_series


def on_disk(array: np.ndarray, folder: Path, order: tuple[int, ...] | None = None) -> FileRows:
    array.tofile(folder / "rows.bin")
    return FileRows(folder / "rows.bin", array.shape, array.dtype, order)


def test_rows_of_a_file_are_read_in_the_given_order(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)  # (n, T, C)
    rows = on_disk(array, tmp_path, (0, 2, 1))
    assert tuple(rows.shape) == (5, 4, 3) and rows.dtype == torch.float32 and len(rows) == 5
    for asked in ([1, 1], [], [4], [0, 1, 2, 3, 4], [2, 3, 0, 1, 1, 2], [4, 3]):
        got = rows[torch.tensor(asked, dtype=torch.int64)]
        assert got.is_contiguous() and got.tolist() == array[asked].transpose(0, 2, 1).tolist()
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            rows[torch.tensor([0, wrong])]


def test_rows_of_a_file_travel_to_other_processes_by_name(tmp_path: Path) -> None:
    rows = on_disk(np.arange(2**16, dtype=np.uint8).reshape(2**10, -1), tmp_path)
    packed = pickle.dumps(rows)
    assert len(packed) < 500 and torch.equal(pickle.loads(packed)[torch.arange(9)], rows[torch.arange(9)])


@pytest.mark.parametrize("system", ["this", "one without preadv"])
def test_threads_read_the_rows_that_they_asked_for(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system != "this":
        monkeypatch.delattr("os.preadv", raising=False)
    array = np.arange(2**14, dtype=np.float32).reshape(2**10, -1)
    rows, order = on_disk(array, tmp_path), torch.randperm(2**10)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(rows.__getitem__, order.split(8)))
    assert torch.equal(torch.cat(got), torch.from_numpy(array)[order])


def test_a_file_that_changes_is_told_in_a_sentence(tmp_path: Path) -> None:
    """The system ends a process that has mapped a file which becomes shorter."""
    array = np.ones((8, 2**10), dtype=np.float32)
    rows = on_disk(array, tmp_path)
    os.truncate(tmp_path / "rows.bin", 2**14)
    assert rows[torch.tensor([3])].all()
    with pytest.raises(InputError, match=r"cannot read .*rows\.bin: it was cut short while it was read"):
        rows[torch.tensor([3, 4])]
    with pytest.raises(InputError, match=r"rows\.bin holds 16,384 bytes, not 32,768; remove it"):
        FileRows(tmp_path / "rows.bin", array.shape, array.dtype)
    (tmp_path / "rows.bin").unlink()
    with pytest.raises(InputError, match=r"cannot read .*rows\.bin: No such file"):
        FileRows(tmp_path / "rows.bin", array.shape, array.dtype)


def test_overlay_leaves_its_source_alone() -> None:
    source, rows = torch.zeros(5, 2), torch.tensor([1, 3])
    overlay = Overlay(source, rows, torch.ones(2, 2))
    for asked in (torch.arange(5), torch.tensor([3]), torch.tensor([3, 1, 0, 3])):
        got = overlay[asked]
        assert got[:, 0].tolist() == [float(row in {1, 3}) for row in asked.tolist()]
        got.fill_(7)
    assert not source.any() and overlay[torch.tensor([1])].eq(1).all()


@pytest.mark.parametrize("data", [toy_images(9), toy_series(9, unequal=True)])
def test_take_keeps_everything_together(data: Data, tmp_path: Path) -> None:
    rows = torch.tensor([8, 2, 2])
    for source in (data, replace(data, x=on_disk(stored(data).numpy(), tmp_path))):
        taken = source.take(rows)
        assert torch.equal(stored(taken), data.x[rows]) and torch.equal(taken.y, data.y[rows])
        assert taken.ids == [data.ids[i] for i in rows.tolist()]
        assert data.lengths is None or torch.equal(taken.lengths, data.lengths[rows])
    assert isinstance(source.take(rows).x, View)


def test_fingerprint_sees_every_part(tmp_path: Path) -> None:
    data = toy_series(9, unequal=True)
    assert data.lengths is not None
    x = stored(data).clone()
    x[4, 0, 0] += 1
    others = [
        replace(data, x=x),
        replace(data, y=data.y.flip(0)),
        replace(data, ids=[*data.ids[1:], data.ids[0]]),
        replace(data, lengths=data.lengths.clamp(max=30)),
        replace(data, spec=replace(data.spec, high=99.0)),
        data.take(torch.arange(8)),
    ]
    prints = [data.fingerprint(), *(other.fingerprint() for other in others)]
    assert len(set(prints)) == len(prints)
    assert data.fingerprint() == replace(data, x=on_disk(stored(data).numpy(), tmp_path)).fingerprint()


def test_images_are_clipped_before_they_are_quantized() -> None:
    spec = toy_images().spec
    assert spec.encode(torch.tensor([-0.5, 0.0, 0.502, 1.0, 1.02, 9.0])).tolist() == [0, 0, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(spec.encode(spec.decode(every)), every)


BAD = {
    "numbers must be equal": {"y": torch.zeros(3, dtype=torch.int64)},
    "outside 0..3": {"y": torch.full((9,), 4)},
    "must be torch.uint8": {"x": torch.zeros(9, 3, 12, 12)},
    "of shape": {"x": torch.zeros(9, 3, 12, 11, dtype=torch.uint8)},
    "lengths must be 9 numbers": {"lengths": torch.zeros(9, dtype=torch.int64)},
}


@pytest.mark.parametrize("words", BAD)
def test_data_that_do_not_fit_together_are_refused(words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(toy_images(9), **BAD[words])


def test_what_cannot_be_trained_on_is_refused() -> None:
    data = toy_series(9)
    x = stored(data).clone()
    x[5, 1, 7] = float("nan")
    one = torch.zeros(9, dtype=torch.int64)
    short = replace(data, x=stored(data)[..., :1], spec=replace(data.spec, shape=(2, 1)))
    for bad, words in (
        (data.take(torch.arange(0)), "no samples"),
        (replace(data, y=one), "one class"),
        (short, "length 1"),
        (replace(data, x=x), "'0/5' holds NaN"),
    ):
        with pytest.raises(InputError, match=words):
            check_trainable(bad)
    check_trainable(data)


def test_splits_must_agree() -> None:
    with pytest.raises(InputError, match="shape"):
        Splits(toy_images(9), toy_images(9, size=8))
    with pytest.raises(InputError, match="same classes"):
        Splits(toy_images(9), toy_images(9, classes=3))
