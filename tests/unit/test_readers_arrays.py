import io
import os
import zipfile

import numpy as np
import pytest
import torch

from antibackdoor.data.arrays import load_npz, write_npz
from antibackdoor.data.copies import copies_of
from antibackdoor.data.core import check_trainable
from antibackdoor.data.load import load
from antibackdoor.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (6, 4, 5, 3), dtype=np.uint8)
SERIES = RNG.normal(size=(6, 2, 7)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def save(path, **members):
    np.savez(path, **members)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.npz"


def tailed():
    x = SERIES.copy()
    x[1, :, 4:], x[3, :, 6:] = np.nan, np.nan
    return x


def test_images(path):
    splits = load(save(path, x_train=IMAGES, y_train=Y, x_test=IMAGES[:2], y_test=Y[:2], classes=["a", "b", "c"]))
    assert splits.train.spec.shape == (3, 4, 5) and splits.train.spec.classes == ("a", "b", "c")
    assert torch.equal(splits.train.x[4], torch.from_numpy(IMAGES[4].transpose(2, 0, 1)))
    assert splits.train.x.is_contiguous() and splits.train.y.dtype == torch.int64
    assert splits.test is not None and splits.test.ids == ["0", "1"]


def test_lengths_from_nan_tails_or_given(path):
    found = load(save(path, x=tailed(), y=Y)).train
    assert found.lengths.tolist() == [7, 4, 7, 6, 7, 7] and not found.x[1, :, 4:].any()
    given = load(save(path, x=tailed(), y=Y, lengths=np.array([7, 4, 7, 6, 7, 7], dtype=np.int16))).train
    assert given.fingerprint() == found.fingerprint()
    assert load(save(path, x=SERIES, y=Y)).train.lengths is None
    both = load(save(path, x_train=SERIES, y_train=Y, x_test=tailed(), y_test=Y))
    assert both.train.lengths.tolist() == [7] * 6


def test_two_dimensions_and_float64(path):
    one = load(save(path, x=SERIES[:, 0].astype(np.float64), y=Y)).train
    assert one.spec.shape == (1, 7) and one.x.dtype == torch.float32


@pytest.mark.parametrize("members", [{"x": IMAGES, "y": Y}, {"x": tailed(), "y": Y}, {"x": SERIES[:, 0], "y": Y}])
@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_memory_map_equals_memory(path, members, pack):
    pack(path, **members)
    want = load(path).train.fingerprint()
    for _ in range(2):  # made, then found
        mapped = load(path, memory_map=True).train
        assert not isinstance(mapped.x, torch.Tensor) and mapped.fingerprint() == want
    assert len(list(copies_of(path, ()).parent.iterdir())) == 1


def test_memory_map_follows_the_file(path):
    load(save(path, x=IMAGES, y=Y), memory_map=True)
    save(path, x=255 - IMAGES, y=Y)
    os.utime(path, ns=(1, 1))
    assert load(path, memory_map=True).train.fingerprint() == load(path).train.fingerprint()
    assert len(list(copies_of(path, ()).parent.iterdir())) == 1


def test_memory_map_keeps_gap_policies_apart(path):
    gap = SERIES.copy()
    gap[0, 0, 2] = np.nan
    save(path, x=gap, y=Y)
    for missing in ("zero", "interpolate"):
        mapped = load(path, memory_map=True, missing=missing).train
        assert mapped.fingerprint() == load(path, missing=missing).train.fingerprint()
    with pytest.raises(InputError, match="missing values"):
        load(path, memory_map=True)


def test_other_test_file(path, tmp_path):
    save(path, x=IMAGES, y=Y, classes=["a", "b", "c"])
    other = save(tmp_path / "other.npz", x_train=IMAGES[:3], y_train=Y[:3])
    assert len(load(path, test=other).test) == 3
    save(other, x=IMAGES[:3], y=Y[:3], classes=["b", "a", "c"])
    with pytest.raises(InputError, match="same classes"):
        load(path, test=other)


def test_round_trip_keeps_ids_and_range(path):
    save(path, x_train=SERIES, y_train=Y, ids_train=[f"s{k}" for k in range(6)], value_range=[-9.0, 9.0])
    splits = load(path)
    assert splits.train.ids[5] == "s5" and splits.train.spec.low == -9
    write_npz(path.with_name("again.npz"), splits)
    assert load_npz(path.with_name("again.npz")).train.fingerprint() == splits.train.fingerprint()
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.npz", "set.npz"]


INF, NAN = SERIES.copy(), SERIES.copy()
INF[2, 0, 0], NAN[2, 0, 3] = np.inf, np.nan


@pytest.mark.parametrize(
    ("members", "gist"),
    [
        ({}, "needs the arrays x_train and y_train.*holds nothing"),
        ({"x": IMAGES}, "needs the arrays.*holds x"),
        ({"x": np.array([{}] * 6, dtype=object), "y": Y}, "pickled"),
        ({"x": IMAGES, "y": np.array([0, 1, None, 0, 1, 2], dtype=object)}, "pickled"),
        ({"x": IMAGES.transpose(0, 3, 1, 2), "y": Y}, "move the channels last"),
        ({"x": IMAGES[..., 0], "y": Y}, "must be of shape"),
        ({"x": IMAGES / np.float32(255), "y": Y}, "must be images, uint8"),
        ({"x": IMAGES.astype(np.int64), "y": Y}, "must be images, uint8"),
        ({"x": IMAGES[:5], "y": Y}, "x holds 5 samples, but y has 6"),
        ({"x": IMAGES, "y": Y.astype(np.float32)}, "one integer for each sample"),
        ({"x": IMAGES, "y": Y[:, None]}, "one integer for each sample"),
        ({"x": IMAGES, "y": Y, "classes": ["a", "b"]}, "label 2, outside 0..1"),
        ({"x": IMAGES, "y": Y.astype(np.int64) - 1}, "set.npz: a label is -1; number the classes"),
        ({"x": IMAGES, "y": Y.astype(np.int64) * 10**9}, "a label is 2000000000"),
        ({"x": IMAGES, "y": Y, "classes": ["a", "a", "b"]}, "different names"),
        ({"x": IMAGES, "y": Y, "ids": ["a"] * 6}, "twice"),
        ({"x": INF, "y": Y}, "sample '2' holds infinite"),
        ({"x": NAN, "y": Y}, "sample '2' holds missing values"),
        ({"x": SERIES * np.nan, "y": Y}, r"sample '0' \(and 5 more\).*no values at all"),
        ({"x": SERIES, "y": Y, "lengths": np.full(6, 8)}, "length outside 1..7"),
        ({"x": SERIES, "y": Y, "lengths": np.full(5, 3)}, "but lengths has 5"),
        ({"x": SERIES, "y": Y, "value_range": [0.0, 1.0]}, "value_range"),
        ({"x_train": IMAGES, "y_train": Y, "x_test": IMAGES[:, :2], "y_test": Y}, "in one shape"),
        ({"x_train": SERIES, "y_train": Y, "x_test": SERIES[:, :, :3], "y_test": Y}, "in one shape"),
        (
            {"x_train": IMAGES, "y_train": Y, "x_test": IMAGES, "y_test": Y + 1},
            "y_test has the label 3, which the training set does not have",
        ),
    ],
)
@pytest.mark.parametrize("memory_map", [False, True])
def test_bad_arrays(path, members, gist, memory_map):
    with pytest.raises(InputError, match=gist):
        load(save(path, **members), memory_map=memory_map)


def test_one_class_and_no_samples(path):
    with pytest.raises(InputError, match="one class"):
        check_trainable(load(save(path, x=IMAGES, y=Y * 0)).train)
    with pytest.raises(InputError, match="no samples"):
        check_trainable(load(save(path, x=IMAGES[:0], y=Y[:0])).train)
    measured = np.arange(30)
    with pytest.raises(InputError, match="30 classes among 30 training samples: labels that differ"):
        check_trainable(load(save(path, x=np.zeros((30, 1, 5), np.float32), y=measured)).train)
    check_trainable(load(save(path, x=np.zeros((60, 1, 5), np.float32), y=np.repeat(measured, 2))).train)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage" * 9])
def test_zip_garbage(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not an \.npz file"):
        load(path)


@pytest.mark.parametrize("memory_map", [False, True])
def test_damage_inside_of_a_zip(path, memory_map):
    save(path, x=IMAGES, y=Y)
    data = bytearray(path.read_bytes())
    data[300] ^= 255  # a pixel: the checksum of the member no longer fits
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot read the array 'x'"):
        load(path, memory_map=memory_map)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY nonsense")
        buffer = io.BytesIO()
        np.save(buffer, Y)
        archive.writestr("y.npy", buffer.getvalue())
    with pytest.raises(InputError, match="cannot read the array 'x'"):
        load(path, memory_map=memory_map)


def test_classes_are_the_labels_that_occur(tmp_path):
    path = tmp_path / "set.npz"
    save(path, x_train=SERIES, y_train=[1, 1, 9, 9, 10, 10], x_test=SERIES[:2], y_test=[10, 1])
    splits = load_npz(path)
    assert splits.train.spec.classes == ("1", "9", "10") and splits.train.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.test.y.tolist() == [2, 0]
