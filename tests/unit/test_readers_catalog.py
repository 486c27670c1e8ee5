import numpy as np
import pytest

from antibackdoor.data import catalog
from antibackdoor.data.arrays import write_npz
from antibackdoor.data.catalog import CATALOG, load_named, read_cifar10
from antibackdoor.data.core import check_trainable
from antibackdoor.data.load import load
from antibackdoor.errors import InputError


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.delenv("ANTIBACKDOOR_DATA", raising=False)
    monkeypatch.setenv("ANTIBACKDOOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def toy():
    return {"x": np.zeros((4, 3, 3, 3), dtype=np.uint8), "y": np.array([0, 1, 0, 1])}


def test_embedded_sets():
    digits = load("digits")
    assert (len(digits.train), len(digits.test)) == (1297, 500) and digits.train.spec.shape == (3, 16, 16)
    assert int(digits.train.x.max()) == 255 and digits.test.y.bincount().min() >= 47
    vowels = load("japanese_vowels")
    assert (len(vowels.train), len(vowels.test)) == (270, 370) and vowels.train.spec.shape == (12, 29)
    assert vowels.train.lengths.max() == 26 and len(vowels.train.spec.classes) == 9
    for splits in (digits, vowels):
        check_trainable(splits.train)


def test_signs_and_digits_are_never_mirrored_also_after_a_round_trip(tmp_path):
    np.savez(tmp_path / "gtsrb.npz", **toy())
    np.savez(tmp_path / "cifar10.npz", **toy())
    assert load("cifar10", data_root=tmp_path).train.spec.mirror
    signs = load("gtsrb", data_root=tmp_path)
    write_npz(tmp_path / "mine.npz", signs)
    again = load(tmp_path / "mine.npz")
    assert not signs.train.spec.mirror and not again.train.spec.mirror and not load("digits").test.spec.mirror
    told = load(tmp_path / "mine.npz", mirror=True)
    assert told.train.spec.mirror and told.source["mirror"] is True
    assert again.train.fingerprint() == signs.train.fingerprint() != told.train.fingerprint()


def test_entries_tell_what_they_are():
    assert all(entry.description and entry.source and entry.terms for entry in CATALOG.values())


def test_local_file_goes_first(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10.npz", **toy())
    assert len(load("cifar10", data_root=tmp_path).train) == 4
    monkeypatch.setenv("ANTIBACKDOOR_DATA", str(tmp_path))
    assert len(load("cifar10").train) == 4


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean 'imagenette'"):
        load("imagenete")
    with pytest.raises(InputError, match="no file or folder"):
        load("missing/file.npz")


def test_failed_download_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)
    with pytest.raises(
        InputError, match=r"cifar10 could not be downloaded \(network is unreachable\); put cifar10.npz"
    ):
        load("cifar10")
    with pytest.raises(InputError, match=r"uwave_extended cannot be downloaded; put uwave_extended\.npz"):
        load("uwave_extended")


def test_download_is_kept(monkeypatch, tmp_path):
    entry = CATALOG["cifar10"]
    calls = []
    monkeypatch.setitem(
        CATALOG,
        "cifar10",
        catalog.Entry("cifar10", entry.kind, "", "", "", lambda folder: calls.append(folder) or load_named("digits")),
    )
    first, second = load("cifar10"), load("cifar10", memory_map=True)
    assert len(calls) == 1 and first.train.fingerprint() == second.train.fingerprint()


def test_cifar_batches(tmp_path):
    rows = np.zeros((2, 3073), dtype=np.uint8)
    rows[:, 0], rows[:, 1], rows[:, 1 + 1024] = (3, 9), 7, 8
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        rows.tofile(tmp_path / name)
    splits = read_cifar10(tmp_path)
    assert splits.train.y.tolist() == [3, 9] * 5 and splits.train.x[0, :, 0, 0].tolist() == [7, 8, 0]


def test_options_that_do_not_apply(tmp_path):
    np.savez(tmp_path / "a.npz", **toy())
    for name in ("a.txt", "a.ts"):
        (tmp_path / name).write_text("x")
    for source, options, gist in (
        ("a.npz", {"image_size": 8}, "image_size is for image files"),
        ("a.npz", {"test": "gone.npz"}, "gone.npz does not exist"),
        ("a.npz", {"test": tmp_path}, "give both in one format"),
        ("digits", {"test": "a.npz"}, "has its own test set"),
        ("a.txt", {}, "no format that can be read"),
        ("a.ts", {"memory_map": True}, "can be memory-mapped from an .npz file only"),
    ):
        with pytest.raises(InputError, match=gist):
            load(source, **options)
