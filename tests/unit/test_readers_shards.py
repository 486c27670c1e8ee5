import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from antibackdoor.data.load import load
from antibackdoor.errors import InputError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (6, 10, 8, 3), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            entry.size = len(content or b"")
            archive.addfile(entry, io.BytesIO(content or b""))
    return path


def images(rows, start=0):
    return [
        pair
        for k in rows
        for pair in ((f"{k + start:04d}.png", png(PIXELS[k])), (f"{k + start:04d}.cls", b"%d" % (k % 3)))
    ]


def test_images(tmp_path):
    data = load(shard(tmp_path / "set.tar", images(range(6)))).train
    assert data.spec.shape == (3, 10, 8) and data.spec.classes == ("0", "1", "2")
    assert data.y.tolist() == [0, 1, 2, 0, 1, 2] and data.ids[5] == "0005"
    assert torch.equal(data.x[torch.arange(6)], torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()))


def test_shards_and_splits(tmp_path):
    shard(tmp_path / "train-000000.tar", images(range(4)))
    shard(tmp_path / "train-000001.tar", images(range(2)))
    shard(tmp_path / "val" / "000000.tar", images(range(3)))
    splits = load(tmp_path)
    assert splits.train.ids == [f"train-000000.tar/{k:04d}" for k in range(4)] + [
        f"train-000001.tar/{k:04d}" for k in range(2)
    ]
    assert splits.test.y.tolist() == [0, 1, 2] and splits.test.ids[0] == "0000"
    assert len(load(tmp_path / "train-000000.tar", test=tmp_path / "val" / "000000.tar").test) == 3


def test_series_and_json(tmp_path):
    rows = [RNG.normal(size=(2, 7 - k % 2)) for k in range(4)]
    members = [
        pair
        for k, row in enumerate(rows)
        for pair in ((f"a/b.c/{k}.json", json.dumps({"label": "xy"[k % 2]}).encode()), (f"a/b.c/{k}.npy", npy(row)),
                     (f"a/b.c/{k}.pth", b"never read"))
    ]  # fmt: skip
    data = load(shard(tmp_path / "set.tar", members)).train
    assert data.spec.shape == (2, 7) and data.spec.classes == ("x", "y") and data.lengths.tolist() == [7, 6, 7, 6]
    assert data.ids == [f"a/b.c/{k}" for k in range(4)]


PNG = png(PIXELS[0])


@pytest.mark.parametrize(
    ("members", "gist"),
    [
        ([], "no samples"),
        ([("a.png", PNG)], "'a' has no label"),
        ([("a.cls", b"1")], "'a' has no image"),
        ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"1")], "several samples"),
        ([("a.png", PNG), ("a.cls", b"")], "its .cls holds no label"),
        ([("a.png", PNG), ("a.cls", b"\xff\xfe")], "its .cls holds no label"),
        ([("a.png", PNG), ("a.json", b"{")], "its .json holds no label"),
        ([("a.png", PNG), ("a.json", b'{"x": 1}')], "its .json holds no label"),
        ([("a.png", PNG), ("a.json", b'{"label": [1]}')], "its .json holds no label"),
        ([*images([0]), *images([1]), *images([0])], "'0000' twice"),
        ([*images([0]), ("b.npy", npy(np.zeros(3))), ("b.cls", b"1")], "some samples are images"),
        (
            [("b.npy", npy(np.array([{}], dtype=object), allow_pickle=True)), ("b.cls", b"1")],
            "sample 'b' cannot be read",
        ),
        ([("b.npy", b"\x93NUMPY nonsense"), ("b.cls", b"1")], "sample 'b' cannot be read"),
        ([("b.npy", npy(np.zeros((2, 2, 2)))), ("b.cls", b"1")], "sample 'b' is no series"),
        ([("a.png", b"nonsense"), ("a.cls", b"1")], "1 of 1 images"),
        ([("a.png", None), ("a.cls", b"1")], "'a' has no image"),
    ],
)
def test_bad_shards(tmp_path, members, gist):
    with pytest.raises(InputError, match=gist):
        load(shard(tmp_path / "set.tar", members))


def test_names_lead_nowhere(tmp_path):
    members = [("../../escaped.png", PNG), ("../../escaped.cls", b"0"), ("/abs.png", PNG), ("/abs.cls", b"1")]
    data = load(shard(tmp_path / "in" / "set.tar", members)).train
    assert data.ids == ["../../escaped", "abs"] and sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_damage(tmp_path):
    path = shard(tmp_path / "set.tar", images(range(6)))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for end in range(0, 8000, 517):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            load(path)
    for _ in range(60):
        torn = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            torn[place] = rng.integers(256)
        path.write_bytes(torn)
        try:
            load(path)
        except InputError as error:
            assert str(error)


def test_huge_members_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("antibackdoor.data.shards.MAX_SAMPLE", 100)
    with pytest.raises(InputError, match="at most 64 MiB"):
        load(shard(tmp_path / "set.tar", images(range(2))))
