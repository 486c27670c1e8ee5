from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from antibackdoor.data.core import Data, Splits, check_trainable
from antibackdoor.data.rows import MemoryMap, Overlay, View
from antibackdoor.errors import InputError
from tiny import stored
from toy import toy_images, toy_series


def test_memory_map_gathers_copies_in_the_given_order() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # (n, T, C)
    rows = MemoryMap(array, (0, 2, 1))
    assert tuple(rows.shape) == (2, 4, 3) and rows.dtype == torch.float32 and len(rows) == 2
    got = rows[torch.tensor([1, 1])]
    assert got.is_contiguous() and got[0].tolist() == array[1].T.tolist()
    got.zero_()
    assert array[1].any()


def test_overlay_leaves_its_source_alone() -> None:
    source, rows = torch.zeros(5, 2), torch.tensor([1, 3])
    overlay = Overlay(source, rows, torch.ones(2, 2))
    for asked in (torch.arange(5), torch.tensor([3]), torch.tensor([3, 1, 0, 3])):
        got = overlay[asked]
        assert got[:, 0].tolist() == [float(row in {1, 3}) for row in asked.tolist()]
        got.fill_(7)
    assert not source.any() and overlay[torch.tensor([1])].eq(1).all()


@pytest.mark.parametrize("data", [toy_images(9), toy_series(9, unequal=True)])
def test_take_keeps_everything_together(data: Data) -> None:
    rows = torch.tensor([8, 2, 2])
    for source in (data, replace(data, x=MemoryMap(stored(data).numpy()))):
        taken = source.take(rows)
        assert torch.equal(stored(taken), data.x[rows]) and torch.equal(taken.y, data.y[rows])
        assert taken.ids == [data.ids[i] for i in rows.tolist()]
        assert data.lengths is None or torch.equal(taken.lengths, data.lengths[rows])
    assert isinstance(source.take(rows).x, View)


def test_fingerprint_sees_every_part() -> None:
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
    assert data.fingerprint() == replace(data, x=MemoryMap(stored(data).numpy())).fingerprint()


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
