"""Recordings, one a file: what loggers write, in class folders or listed by a manifest."""

import numpy as np
import pytest
import torch

from antibackdoor import limits
from antibackdoor.data import recordings, text
from antibackdoor.data.load import load, load_samples
from antibackdoor.data.recordings import read_recording
from antibackdoor.errors import InputError, LeftOut

GYRO = "time,x,y\n0.0,1,10\n0.1,2,20\n0.2,3,30\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set" / "walk" / "a.csv", "x,y\n1,10\n2,20\n3,30\n")
    write(tmp_path / "set" / "walk" / "b.csv", "x,y\n4,40\n5,50\n")
    write(tmp_path / "set" / "run" / "c.csv", "x,y\n-1,0.5\n-2,1.5\n-3,2.5\n")
    return tmp_path / "set"


def test_class_folders_of_tables(folder):
    train = load(folder).train
    assert train.spec.kind == "series" and train.spec.shape == (2, 3) and train.spec.classes == ("run", "walk")
    assert train.ids == ["run/c.csv", "walk/a.csv", "walk/b.csv"] and train.y.tolist() == [0, 1, 1]
    assert train.x[1].tolist() == [[1, 2, 3], [10, 20, 30]] and train.x[2].tolist() == [[4, 5, 0], [40, 50, 0]]
    assert train.lengths.tolist() == [3, 3, 2]


@pytest.mark.parametrize(
    ("name", "text", "channels", "values"),
    [
        ("comma.csv", "x,y\n1,10\n2,20\n", ("x", "y"), [[1, 2], [10, 20]]),
        ("no_header.csv", "1,10\n2,20\n", ("0", "1"), [[1, 2], [10, 20]]),
        ("tabs.tsv", "x\ty\n1\t10\n2\t20\n", ("x", "y"), [[1, 2], [10, 20]]),
        ("blanks.txt", "1   10\n 2 20\n", ("0", "1"), [[1, 2], [10, 20]]),
        ("semicolons.csv", "x;y\n1,5;10\n2;20,25\n", ("x", "y"), [[1.5, 2], [10, 20.25]]),
        ("quotes.csv", '"x","y"\r\n"1","10"\r\n\r\n"2","20"\r\n', ("x", "y"), [[1, 2], [10, 20]]),
        ("a_column.txt", "1\n2\n3\n", ("0",), [[1, 2, 3]]),
        ("a_line.csv", "1,2,3\n", ("0",), [[1, 2, 3]]),
        ("time.csv", GYRO, ("x", "y"), [[1, 2, 3], [10, 20, 30]]),
        ("dates.csv", "Timestamp,x\n2026-01-01 00:00,1\n2026-01-01 00:01,2\n", ("x",), [[1, 2]]),
        ("pandas.csv", ",x,y\n0,1,10\n1,2,20\n", ("x", "y"), [[1, 2], [10, 20]]),
        ("pandas_unnamed.csv", ",0,1\n0,1,10\n1,2,20\n", ("0", "1"), [[1, 2], [10, 20]]),
        ("pandas_bare.csv", "0,1,2\n1,10,5\n2,20,6\n", ("0", "1", "2"), [[1, 2], [10, 20], [5, 6]]),
        ("pandas_again.csv", "Unnamed: 0,x,y\n0,1,10\n1,2,20\n", ("x", "y"), [[1, 2], [10, 20]]),
        ("mark_of_order.csv", "\ufeffx,y\n1,10\n2,20\n", ("x", "y"), [[1, 2], [10, 20]]),
    ],
)
def test_texts(tmp_path, name, text, channels, values):
    found = read_recording(write(tmp_path / name, text))
    assert found.channels == channels and found.values.tolist() == values and found.values.dtype == np.float32


def test_arrays(tmp_path):
    for k, label in enumerate(("a", "b")):
        (tmp_path / label).mkdir()
        np.save(tmp_path / label / "one.npy", np.arange(8).reshape(2, 4) + k)
    train = load(tmp_path).train
    assert train.x[1].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and train.lengths is None
    np.save(tmp_path / "a" / "one.npy", np.arange(4.0))
    np.save(tmp_path / "b" / "one.npy", np.arange(4.0))
    assert load(tmp_path).train.spec.shape == (1, 4)


def test_what_is_no_channel_is_told(folder):
    for path in folder.rglob("*.csv"):
        path.write_text(GYRO)
    with pytest.warns(LeftOut, match="columns called time are not read: they are no channels"):
        splits = load(folder)
    assert splits.train.spec.shape == (2, 3) and "time" in splits.notes[0]


def test_splits_and_manifests_give_the_same_set(folder, tmp_path):
    for part in ("train", "test"):
        for path in sorted(folder.rglob("*.csv")):
            write(tmp_path / "both" / part / path.relative_to(folder), path.read_text())
    both = load(tmp_path / "both")
    assert both.test is not None and torch.equal(both.train.x, both.test.x)
    assert torch.equal(load(folder, test=folder).test.x, both.test.x)
    listed = [f"{part}/{path.relative_to(folder)},{path.parent.name},{part}" for part in ("train", "test")
              for path in sorted(folder.rglob("*.csv"))]  # fmt: skip
    manifest = write(tmp_path / "both" / "list.csv", "\n".join(["path,label,split", *listed]) + "\n")
    assert load(manifest).train.fingerprint() == both.train.fingerprint()


def test_gaps_name_the_file(folder):
    (folder / "walk" / "b.csv").write_text("x,y\n4,40\n,50\nNA,?\n7,80\n")
    with pytest.raises(InputError, match=r"sample 'walk/b.csv' holds missing values.*--missing"):
        load(folder)
    assert load(folder, missing="interpolate").train.x[2].tolist() == [[4, 5, 6, 7], [40, 50, 65, 80]]


@pytest.mark.parametrize(
    ("name", "text", "gist"),
    [
        ("b.csv", "x,y\n1,2\n3\n", "line 3 has another number of values .1. than the first .2."),
        ("b.csv", "x,y\n1,2\n3,high\n", "line 3: 'high' is no number"),
        ("b.csv", "x,z\n1,2\n", "it has the channels x, z, where others have x, y"),
        ("b.csv", "", "it holds no values"),
        ("b.csv", "x,y\n", "it holds no values"),
        ("b.csv", "time,date\n1,2\n", r"none of its columns \(time, date\) is a channel"),
        ("b.csv", "x,y\n1,2\0\n", "line"),
        ("b.npy", "no array", "magic string"),
        ("b.doc", "1,2", "not a recording by its name"),
        ("b.csv", "x,y\n1,2\n" + '"' + "1" * 200_000, "field larger than field limit"),
    ],
)
def test_bad_files_are_counted_or_left_out(folder, name, text, gist):
    (folder / "walk" / "b.csv").unlink()
    write(folder / "walk" / name, text)
    with pytest.raises(InputError, match=rf"1 of 3 files in .* cannot be read as recordings \(walk/{name}: .*{gist}"):
        load(folder)
    with pytest.warns(LeftOut, match="they are left out"):
        assert load(folder, skip_unreadable=True).train.ids == ["run/c.csv", "walk/a.csv"]


def test_the_channels_of_most_count(folder):
    """Also where the first file is the odd one."""
    (folder / "run" / "c.csv").write_text("a,b\n1,2\n")
    write(folder / "run" / "d.csv", "x,y\n5,6\n7,8\n")
    with pytest.raises(InputError, match=r"1 of 4 files .*run/c\.csv: it has the channels a, b, where others"):
        load(folder)
    with pytest.warns(LeftOut):
        assert load(folder, skip_unreadable=True).train.ids == ["run/d.csv", "walk/a.csv", "walk/b.csv"]


def test_what_cannot_be_asked_of_them(folder):
    with pytest.raises(InputError, match="holds series; image_size is for images"):
        load(folder, image_size=8)
    with pytest.raises(InputError, match=r"can be memory-mapped from an \.npz file only"):
        load(folder, memory_map=True)
    (folder / "walk" / "picture.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"4 of 4 files .* cannot be read as images"):
        load(folder)


def test_all_unreadable(folder):
    for path in folder.rglob("*.csv"):
        path.write_text("x\nhigh\n")
    with pytest.raises(InputError, match="holds no recording that can be read"):
        load(folder, skip_unreadable=True)


def test_infinite_values_name_the_file(folder):
    (folder / "walk" / "b.csv").write_text("x,y\n1e300,2\n3,4\n")
    with pytest.raises(InputError, match=r"sample 'walk/b.csv' holds infinite values, or values too large"):
        load(folder)


def test_samples_without_labels(folder):
    spec = load(folder).train.spec
    one, names = load_samples(folder / "walk" / "b.csv", spec)
    assert names is None and list(one.ids) == ["b.csv"] and one.x[0].tolist() == [[4, 5], [40, 50]]
    flat, names = load_samples(folder / "walk", spec)
    assert names is None and flat.lengths.tolist() == [3, 2] and list(flat.ids) == ["a.csv", "b.csv"]
    labeled, names = load_samples(folder, spec)
    assert names == ["run", "walk", "walk"] and len(labeled) == 3
    with pytest.raises(InputError, match="the samples have 1 channels, but the model takes 2"):
        load_samples(write(folder.parent / "one.txt", "1\n2\n"), spec)


def test_limits_of_a_line_and_of_channels(folder, monkeypatch):
    (folder / "walk" / "b.csv").write_text("x,y\n1," + "2" * 100 + "\n")
    monkeypatch.setattr(text, "MAX_LINE", 50)
    with pytest.raises(InputError, match="a line has more than 50 characters"):
        load(folder)
    monkeypatch.setattr(recordings, "MAX_CHANNELS", 1)
    np.save(folder / "run" / "d.npy", np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"4 of 4 files .*it has 2 channels, more than 1"):
        load(folder)


def test_links_lead_nowhere_else(folder, tmp_path):
    secret = write(tmp_path / "secret.csv", "x,y\n1,2\n3,4\n")
    (folder / "walk" / "link.csv").symlink_to(secret)
    with pytest.raises(InputError, match=r"link\.csv is a link out of the data set"):
        load(folder)
    manifest = write(folder / "list.csv", "path,label\nwalk/link.csv,walk\nrun/c.csv,run\n")
    with pytest.raises(InputError, match="leads out of"):
        load(manifest)


def test_more_than_the_memory_holds_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: 40)
    with pytest.raises(InputError, match=r"^\S*set would take .* GiB of memory"):
        load(folder, skip_unreadable=True)
