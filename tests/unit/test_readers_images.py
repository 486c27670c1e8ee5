import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from antibackdoor.data.core import check_trainable
from antibackdoor.data.decoding import MAX_PIXELS, decode_image
from antibackdoor.data.load import load, load_samples
from antibackdoor.errors import InputError
from antibackdoor.runs import describe_data


def save(path, size=(8, 6), color=(200, 10, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for label in ("cat", "dog"):
        for name in ("a.png", "b.bmp", "c.ppm"):
            save(tmp_path / "set" / label / name)
    return tmp_path / "set"


def test_folder_in_sorted_order(folder):
    save(folder / "cat" / "deeper" / "d.webp")
    save(folder / "dog" / "grey.pgm", mode="L")
    (folder / "cat" / ".hidden").write_text("x")
    (folder / "Thumbs.db").write_text("x")
    train = load(folder).train
    assert train.spec.classes == ("cat", "dog") and train.spec.shape == (3, 6, 8)
    assert train.ids[:5] == ["cat/a.png", "cat/b.bmp", "cat/c.ppm", "cat/deeper/d.webp", "dog/a.png"]
    assert train.y.tolist() == [0] * 4 + [1] * 4
    assert train.x[0, :, 0, 0].tolist() == [200, 10, 30] and len(set(train.x[7, :, 0, 0].tolist())) == 1


@pytest.mark.parametrize("size", [0, -3, (0, 4), (4, -1)])
def test_sizes_that_no_image_has(folder, size):
    with pytest.raises(InputError, match="is not a number of pixels; give 1 or more"):
        load(folder, image_size=size)


def test_sizes(folder):
    save(folder / "cat" / "large.png", size=(300, 200))
    assert load(folder).train.spec.shape == (3, 6, 8)
    assert load(folder, image_size=5).train.spec.shape == (3, 5, 5)
    for label in ("cat", "dog"):
        for k in range(9):
            save(folder / label / f"wide{k}.png", size=(100, 40))
    assert load(folder).train.spec.shape == (3, 40, 64)


def test_split_folders_and_a_class_absent_from_the_test_set(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "both" / "train")
    shutil.copytree(folder / "dog", tmp_path / "both" / "val" / "dog")
    splits = load(tmp_path / "both")
    assert splits.test is not None and splits.test.y.tolist() == [1, 1, 1]
    assert splits.train.ids[0] == "train/cat/a.png" and splits.test.ids[0] == "val/dog/a.png"
    assert splits.test.spec.classes == ("cat", "dog")
    assert len(load(folder, test=tmp_path / "both" / "val").test) == 3


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val"])
def test_names_of_the_test_folder(folder, tmp_path, name):
    for split in ("train", name):
        shutil.copytree(folder, tmp_path / "both" / split)
    splits = load(tmp_path / "both")
    assert splits.train.spec.classes == ("cat", "dog") and len(splits.test) == len(splits.train)


def test_of_two_test_sets_one_is_read_and_the_other_told(folder, tmp_path):
    for split in ("train", "test", "val"):
        shutil.copytree(folder, tmp_path / "both" / split)
    with pytest.warns(UserWarning, match="val is not read: the test set is"):
        splits = load(tmp_path / "both")
    assert len(splits.test) == len(splits.train) and "val is not read" in splits.notes[0]


@pytest.mark.parametrize("train, other", [("Train", "Test"), ("training", "testing"), ("train", "holdout")])
def test_splits_are_never_read_as_classes(folder, tmp_path, train, other):
    for split in (train, other):
        shutil.copytree(folder, tmp_path / "both" / split)
    with pytest.raises(InputError, match=f"{train} holds folders as .* so does .*{other}: call them"):
        load(tmp_path / "both")


def test_a_class_may_be_called_train(folder):
    (folder / "cat").rename(folder / "train")
    assert load(folder).train.spec.classes == ("dog", "train")
    save(folder / "train" / "steam" / "engine.png")
    assert "train/steam/engine.png" in load(folder).train.ids


def test_a_training_set_called_otherwise_is_no_class(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all" / "Training")
    with pytest.raises(InputError, match="and it lies alone: call them"):
        load(tmp_path / "all")


def test_unknown_class_in_test_is_refused(folder, tmp_path):
    save(tmp_path / "other" / "bird" / "a.png")
    with pytest.raises(InputError, match="'bird', which the training set does not have"):
        load(folder, test=tmp_path / "other")


def test_unreadable_files_are_counted_named_and_left_out_if_wanted(folder):
    whole = save(folder / "cat" / "noise.png", size=(50, 50))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:3000])
    (folder / "cat" / "text.png").write_text("not an image")
    (folder / "dog" / "notes.txt").write_text("text")
    (folder / "README.md").write_text("text")
    with pytest.raises(InputError, match=r"4 of 10 files.*README.md: it is in no class.*--skip-unreadable") as caught:
        load(folder)
    assert all(name in str(caught.value) for name in ("cat/noise.png", "cat/text.png", "dog/notes.txt"))
    with pytest.warns(UserWarning, match="4 of 10 files"):
        splits = load(folder, skip_unreadable=True)
    train = splits.train
    assert len(splits.notes) == 1 and describe_data(splits)["notes"][0].startswith("4 of 10 files")
    assert len(train) == 6 and train.x.shape[0] == 6 and "cat/text.png" not in train.ids


def test_damaged_checksum_is_seen(folder):
    path = folder / "cat" / "a.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") - 6] ^= 1  # a bit of the header's checksum
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cat/a\.png"):
        load(folder)


def test_huge_images_are_refused(folder, monkeypatch):
    assert MAX_PIXELS == 64 * 2**20
    monkeypatch.setattr("antibackdoor.data.decoding.MAX_PIXELS", 40)
    with pytest.raises(InputError, match=r"6 of 6 files.*8x6 pixels are more than the limit"):
        load(folder)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 25600, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert decode_image((tmp_path / "deep.png").read_bytes(), (3, 1))[0, :, 0].tolist() == [0, 100, 255]


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    outside = save(tmp_path / "outside" / "secret.png")
    (folder / "cat" / "link.png").symlink_to(outside)
    with pytest.raises(InputError, match="link out of the data set"):
        load(folder)
    (folder / "cat" / "link.png").unlink()
    (folder / "bird").symlink_to(outside.parent)
    with pytest.raises(InputError, match="link out of the data set"):
        load(folder)


def test_folders_without_images(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders with files"):
        load(tmp_path / "empty")
    save(tmp_path / "flat" / "a.png")
    with pytest.raises(InputError, match="no class folders with files"):
        load(tmp_path / "flat")
    shutil.rmtree(folder / "dog")
    with pytest.raises(InputError, match="one class"):
        check_trainable(load(folder).train)


def test_manifest(folder):
    manifest = folder / "list.csv"
    manifest.write_text("path,label,split\ncat/a.png,x,train\ndog/a.png,y,train\ndog/b.bmp,y,test\n")
    splits = load(manifest)
    assert splits.train.ids == ["cat/a.png", "dog/a.png"] and splits.train.spec.classes == ("x", "y")
    assert splits.test is not None and splits.test.y.tolist() == [1]
    manifest.write_text("path,label\ncat/a.png,x\ndog/a.png,y\n")
    assert torch.equal(load(manifest).train.x, splits.train.x) and load(manifest).test is None
    for other in ("\nPath, Label\ncat/a.png,x\ndog/a.png,y\n,\n", "label;path\nx;cat/a.png\ny;dog/a.png\n"):
        manifest.write_text(other)
        assert load(manifest).train.fingerprint() == splits.train.fingerprint()


@pytest.mark.parametrize(
    ("text", "ids", "names"),
    [
        ("path\ncat/a.png\ndog/a.png\n", ["cat/a.png", "dog/a.png"], None),
        ("path,label\ncat/a.png,\ndog/a.png,\n", ["cat/a.png", "dog/a.png"], None),
        ("path,label\ncat/a.png,bird\n", ["cat/a.png"], ["bird"]),
        ("path,label,split\ncat/a.png,x,test\ndog/a.png,y,test\n", ["cat/a.png", "dog/a.png"], ["x", "y"]),
        ("path,label,split\ncat/a.png,x,train\ndog/a.png,y,test\n", ["dog/a.png"], ["y"]),
    ],
)
def test_a_manifest_to_predict_on_needs_neither_labels_nor_training_samples(folder, text, ids, names):
    spec = load(folder).train.spec
    (folder / "list.csv").write_text(text)
    samples, found = load_samples(folder / "list.csv", spec)
    assert list(samples.ids) == ids and found == names and samples.x.shape[1:] == spec.shape


def test_a_manifest_to_predict_on_is_checked_as_any(folder):
    spec = load(folder).train.spec
    for text, gist in {"path\n../set/cat/a.png\n": "leads out of", "path\ngone.png\n": "no such file"}.items():
        (folder / "list.csv").write_text(text)
        with pytest.raises(InputError, match=gist):
            load_samples(folder / "list.csv", spec)


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("path,label\n../set/cat/a.png,x\n", "leads out of"),
        ("path,label\n/etc/passwd,x\n", "leads out of"),
        ("path,label\nout/secret.png,x\n", "leads out of"),
        ("file,label\ncat/a.png,x\n", "line 2: 'cat/a.png' is no number.*a list of files has a column path"),
        ("", "needs the column label, beside path"),
        ("path,label\n", "lists no samples"),
        ("path,label\ncat/a.png\n", "no path or no label"),
        ("path,label\ncat/a.png,x\ncat/a.png,y\n", "second time"),
        ("path,label,split\ncat/a.png,x,dev\n", "the split 'dev'"),
        ("path,label,split\ncat/a.png,x,test\n", "no training samples"),
        ("path,label\ncat/gone.png,x\ndog/a.png,y\n", "1 of 2 files.*no such file"),
    ],
)
def test_bad_manifests(folder, tmp_path, text, gist):
    save(tmp_path / "outside" / "secret.png")
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "list.csv").write_text(text)
    with pytest.raises(InputError, match=gist):
        load(folder / "list.csv")


def test_manifest_cells_may_have_blanks_around_them(folder):
    rows = ["path,label,split", "cat/a.png, cat,", "cat/b.png,cat,train", "dog/a.png,dog ,", "dog/b.png,dog, test"]
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"):
        save(folder / name)
    (folder / "list.csv").write_text("\n".join(rows))
    splits = load(folder / "list.csv")
    assert splits.train.spec.classes == ("cat", "dog") and (len(splits.train), len(splits.test)) == (3, 1)


def test_deep_images_that_would_turn_black_are_refused(folder):
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8)).save(folder / "cat" / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: of 16 bits it uses values up to 47 only"):
        load(folder)
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000).save(folder / "cat" / "deep.png")
    assert int(load(folder).train.x[0].max()) >= 0


def test_an_empty_name_is_not_the_working_folder():
    with pytest.raises(InputError, match="an empty path was given"):
        load("")
