"""Folders that somebody else filled: links and pipes where we write, copies of data where we look for our own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antibackdoor.api import train
from antibackdoor.data import copies, decoding, load
from antibackdoor.data.arrays import write_npz
from antibackdoor.data.copies import copies_of, keep_only, stamp
from antibackdoor.data.core import Splits
from antibackdoor.data.truth import read_targets, read_truth
from antibackdoor.errors import InputError
from antibackdoor.exports import export_run
from antibackdoor.files import append_to, at_once, atomically, load_state, lock
from antibackdoor.limits import inside
from antibackdoor.report.run import read_run
from antibackdoor.review.export import export
from antibackdoor.review.session import open_session
from antibackdoor.runs import open_folder, read_suspects
from antibackdoor.scanning import scan
from hostile_files import refused, written
from toy import toy_images
from toy_files import write_images
from toy_review import toy_run_of

TINY = {"model": "resnet18-w1", "epochs": 1, "device": "cpu"}
SHORT = {"recipe.min_steps": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTIBACKDOOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user's that nothing may touch."""
    written(tmp_path / "victim" / "sub" / "letter", "dear diary")
    written(tmp_path / "victim" / "0.bin", "dear diary")
    return tmp_path / "victim"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", count=3)


@pytest.fixture
def array(tmp_path: Path) -> Path:
    write_npz(tmp_path / "set.npz", Splits(toy_images(12)))
    return tmp_path / "set.npz"


@pytest.mark.parametrize("source", ["photos", "array"])
def test_copies_lie_where_no_author_of_data_can_plant_them(
    source: str, request: pytest.FixtureRequest, victim: Path, own_cache: Path
) -> None:
    """What lies beside the data, whatever it is called, is neither read nor removed."""
    path: Path = request.getfixturevalue(source)
    before, name = contents(victim), f".{path.name}.cache"
    path.with_name(name).symlink_to(victim)
    beside = set(path.parent.iterdir())
    want = load.load(path, memory_map=False).train.fingerprint()
    for _ in range(2):
        assert load.load(path, memory_map=True).train.fingerprint() == want
    assert contents(victim) == before and set(path.parent.iterdir()) - {own_cache} == beside
    assert list(own_cache.rglob("*.bin"))


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("source", ["photos", "array"])
def test_a_link_inside_the_cache(level: int, source: str, request: pytest.FixtureRequest, victim: Path) -> None:
    path: Path = request.getfixturevalue(source)
    load.load(path, memory_map=True)
    place = next(copies_of(path, ()).parent.iterdir())
    place = (place, place.parent, place.parent.parent)[level]
    shutil.rmtree(place)
    place.symlink_to(victim)
    before = contents(victim)
    refused(lambda: load.load(path, memory_map=True), "is a link, but copies of data are kept in plain folders only")
    assert contents(victim) == before


@pytest.mark.parametrize("source", ["photos", "array"])
def test_a_link_in_place_of_a_copy(source: str, request: pytest.FixtureRequest, victim: Path) -> None:
    path: Path = request.getfixturevalue(source)
    want = load.load(path, memory_map=True).train.fingerprint()
    folder = next(copies_of(path, ()).parent.iterdir())
    copy = next(path for path in folder.iterdir() if path.suffix == ".bin")
    copy.rename(victim / "moved")
    copy.symlink_to(victim / "moved")
    before = contents(victim)
    if source == "array":
        refused(lambda: load.load(path, memory_map=True), "is a link, a folder, a pipe or a device")
    else:
        assert load.load(path, memory_map=True).train.fingerprint() == want and not copy.is_symlink()
    assert contents(victim) == before


def test_only_folders_of_copies_are_removed(array: Path, victim: Path) -> None:
    folder = copies_of(array, ["new"])
    others = [folder.parent / name for name in ("notes", "0" * 31, "0" * 33)]
    for other in (*others, folder, old := folder.with_name("0" * 32)):
        written(other / "file", "x")
    (link := folder.with_name("1" * 32)).symlink_to(victim)
    before = contents(victim)
    keep_only(folder)
    assert not old.exists() and all((other / "file").exists() for other in others)
    assert link.is_symlink() and contents(victim) == before


HONEST = {"size": [16, 16], "counts": [9], "bad": [{}]}
PACKS: dict[str, str] = {
    "no JSON": "{",
    "a list": "[]",
    "nested without end": "[" * 100_000,
    "size of words": json.dumps({**HONEST, "size": ["a", 1]}),
    "another size": json.dumps({**HONEST, "size": [16, 17]}),
    "negative size": json.dumps({**HONEST, "size": [-16, -16]}),
    "endless size": '{"size": [1e999, 1], "counts": [9], "bad": [{}]}',
    "more rows": json.dumps({**HONEST, "counts": [10]}),
    "more splits": json.dumps({**HONEST, "counts": [9, 9], "bad": [{}, {}]}),
    "no splits": json.dumps({**HONEST, "counts": [], "bad": []}),
    "bad rows that are not there": json.dumps({**HONEST, "bad": [{"99": "x"}]}),
    "bad rows that are words": json.dumps({**HONEST, "bad": [{"a": "x"}]}),
    "no list of bad rows": json.dumps({**HONEST, "bad": 3}),
    "another key": json.dumps({**HONEST, "run": "me"}),
}


@pytest.mark.parametrize("case", PACKS)
def test_a_damaged_copy_of_images_is_made_anew(photos: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = load.load(photos, memory_map=True).train.fingerprint()
    pack = next(copies_of(photos, ()).parent.rglob("pack.json"))
    assert json.loads(pack.read_text()) == HONEST
    written(pack, PACKS[case])
    calls: list[Path] = []
    decode = decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *given: calls.append(photos) or decode(*given))
    assert load.load(photos, memory_map=True).train.fingerprint() == want
    assert len(calls) == 9 and json.loads(pack.read_text()) == HONEST
    load.load(photos, memory_map=True)
    assert len(calls) == 9


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_damaged_copy_of_arrays_is_made_anew(array: Path, content: bytes) -> None:
    want = load.load(array, memory_map=True).train.fingerprint()
    [copy] = copies_of(array, ()).parent.rglob("*.bin")
    written(copy, content)
    assert load.load(array, memory_map=True).train.fingerprint() == want


@pytest.mark.parametrize("source", ["photos", "array"])
def test_a_change_that_presets_size_and_time_is_seen(
    source: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(source)
    load.load(path, memory_map=True)
    file = path if path.is_file() else path / "red" / "00.png"
    found, content = file.stat(), bytearray(file.read_bytes())
    before = stamp(file)
    file.write_bytes(bytes(content))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert stamp(file)[:2] == before[:2] and stamp(file) != before
    made: list[str] = []
    real = copies.atomically
    monkeypatch.setattr(copies, "atomically", lambda *given: made.append("array") or real(*given))
    decode = decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *given: made.append("image") or decode(*given))
    load.load(path, memory_map=True)
    assert made


def test_an_account_without_a_home(array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ANTIBACKDOOR_CACHE")
    monkeypatch.setattr(copies.Path, "home", homeless)
    assert not copies.can_keep()
    refused(lambda: load.load(array, memory_map=True), r"no home folder; name a folder for copies .*ANTIBACKDOOR_CACHE")
    assert len(load.load(array).train) == 12


# Everything that a command writes in a run folder, by name.

BY_TRAIN = {
    "config.json", "source.json", "data.json", "history.jsonl", "model.safetensors", "model.json", "suspects.csv",
    "history.csv", "gallery.npz", "verdict.json", "metrics.json", "env.json", "report.html", "result.json", ".lock",
}  # fmt: skip
BY_REVIEW = {"review.jsonl", ".review.lock"}
FOLDERS = {"cleaned-npz", ".cleaned-npz.part", ".cleaned-npz.old"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run and its data."""
    root = tmp_path_factory.mktemp("trained")
    write_npz(root / "set.npz", Splits(toy_images(32), toy_images(8, seed=1)))
    again(root / "set.npz", root / "run", resume=False)
    return root / "set.npz", root / "run"


def again(data: Path, out: Path, *, resume: bool = True) -> None:
    """Nothing is computed where the stages are there; everything is written."""
    train(load.load(data), defense="none", options=SHORT, out=out, resume=resume, **TINY)  # type: ignore[arg-type]


def link_out(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "sub" / "letter" if "." in path.name[1:] or "lock" in path.name else victim)


def link_inside(path: Path, victim: Path) -> None:
    written(path.parent / "inside", "dear diary")
    path.symlink_to(path.parent / "inside")


def pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [link_out, link_inside, pipe])
@pytest.mark.parametrize("name", sorted(BY_TRAIN))
def test_nothing_but_plain_files_is_written_by_a_run(
    trained: tuple[Path, Path], tmp_path: Path, victim: Path, name: str, plant: Callable[[Path, Path], None]
) -> None:
    data, whole = trained
    assert {path.name for path in whole.iterdir()} == BY_TRAIN | {"stages"}, "a new file: name it above"
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / name).unlink(missing_ok=True)
    plant(run / name, victim)
    before = contents(victim)
    told = refused(lambda: again(data, run), "link|pipe|cannot read")
    assert contents(victim) == before and str(run) in told
    assert not (run / "inside").exists() or (run / "inside").read_text() == "dear diary"
    if plant is link_out:
        assert "is a link out of the run folder; remove it" in told
        refused(lambda: scan(load.load(data), out=run, resume=True, detector="loss", **TINY), "link out of the run")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(BY_REVIEW | FOLDERS))
@pytest.mark.parametrize("plant", [link_out, link_inside, pipe])
def test_nothing_but_plain_files_is_written_by_a_review(
    tmp_path: Path, array: Path, victim: Path, name: str, plant: Callable[[Path, Path], None]
) -> None:
    run = toy_run_of(load.load(array), tmp_path / "run")
    plant(run / name, victim)
    before = contents(victim)

    def review() -> None:
        session = open_session(run)
        session.decisions.hold()
        try:
            session.decisions.decide([0], "drop")
            export(session, run / "cleaned-npz", "npz", replace=True)
        finally:
            session.decisions.release()

    refused(review, "link|plain folder|pipe|cannot write|exists")
    assert contents(victim) == before
    assert not (run / "inside").exists() or (run / "inside").read_text() == "dear diary"


def test_stages_are_written_inside_the_run_folder(trained: tuple[Path, Path], tmp_path: Path, victim: Path) -> None:
    data, whole = trained
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "stages")
    (run / "stages").symlink_to(victim)
    before = contents(victim)
    refused(lambda: again(data, run), "stages is a link out of the run folder; remove it")
    assert contents(victim) == before


def test_links_that_stay_inside_are_no_harm(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Trackers make such."""
    data, whole = trained
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    written(run / "wandb" / "run-1" / "log", "x")
    (run / "wandb" / "latest-run").symlink_to("run-1")
    again(data, run)


WRITERS: dict[str, Callable[[Path], object]] = {
    "atomically": lambda path: atomically(path, lambda part: part.write_text("new")),
    "append_to": lambda path: append_to(path).close(),
    "lock": lambda path: lock(path).__enter__(),
    "export": lambda path: export_run(path.parent / "run", path),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("plant", ["link", "dangling", "pipe", "folder"])
def test_only_plain_files_are_written_to(tmp_path: Path, array: Path, victim: Path, how: str, plant: str) -> None:
    toy_run_of(load.load(array), tmp_path / "run")
    path = tmp_path / "out.csv"
    {
        "link": lambda: path.symlink_to(victim / "0.bin"),
        "dangling": lambda: path.symlink_to(victim / "new"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[plant]()
    before, kind = contents(victim), path.lstat().st_mode
    refused(lambda: WRITERS[how](path), "out.csv is a (link, a folder, a pipe or a device; only plain files|folder)")
    assert contents(victim) == before and path.lstat().st_mode == kind


def test_a_lock_cuts_nothing_off(tmp_path: Path) -> None:
    path = written(tmp_path / "file", "dear diary")
    with lock(path, wait=False) as mine:
        assert mine
    assert path.read_text() == "dear diary"


def test_a_link_where_the_half_written_file_goes(tmp_path: Path, victim: Path) -> None:
    before = contents(victim)
    (tmp_path / f".file.{os.getpid()}.part").symlink_to(victim / "0.bin")
    atomically(tmp_path / "file", lambda part: part.write_text("new"))
    assert (tmp_path / "file").read_text() == "new" and contents(victim) == before
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / "link").symlink_to(victim)
    with at_once(tmp_path / "out") as made:
        (made / "a").touch()
    assert contents(victim) == before and [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    (tmp_path / ".new.part").symlink_to(victim)
    with pytest.raises(InputError, match="is no plain folder; remove it"), at_once(tmp_path / "new"):
        raise AssertionError("it would be emptied")
    assert contents(victim) == before


# Everything that is read from a run folder or a truth, as something that never ends.

READERS: dict[str, Callable[[Path], object]] = {
    "suspects.csv": read_suspects,
    "suspects.csv of a report": read_run,
    "suspects.csv of a review": open_session,
    "review.jsonl": open_session,
    "truth.csv": lambda run: read_truth(run / "truth.csv", toy_images(12)),
    "triggered.csv": lambda run: read_targets(run / "triggered.csv", toy_images(12)),
    "stage.safetensors": lambda run: load_state(run / "stage.safetensors"),
    "source.json": open_session,
    "config.json": lambda run: open_folder(run, {}, resume=True).__enter__(),
}


@pytest.mark.parametrize("plant", ["pipe", "device", "huge"])
@pytest.mark.parametrize("case", READERS)
def test_nothing_is_read_without_end(tmp_path: Path, array: Path, case: str, plant: str) -> None:
    run = toy_run_of(load.load(array), tmp_path / "run")
    written(run / "verdict.json", "{}")
    path = run / case.split(" ", maxsplit=1)[0]
    path.unlink(missing_ok=True)
    if plant == "pipe":
        os.mkfifo(path)
    elif plant == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    refused(
        lambda: READERS[case](run), r"pipe, a device|holds no|does not tell|link out of|are read|cannot read the state"
    )


REVIEWS: dict[str, tuple[str, str, str]] = {
    "settings that are a list": ("config.json", "[]", "should hold a JSON object, not list"),
    "settings that are a number": ("config.json", "3", "should hold a JSON object, not int"),
    "settings without data": ("config.json", "{}", "not the data that the run"),
    "decisions nested without end": ("review.jsonl", "[" * 100_000, "line 1 is nested too deeply"),
    "decisions about nobody": ("review.jsonl", "3\n", "line 1 names a sample that is not"),
    "a source that is a list": ("source.json", "[]", "should hold a JSON object"),
    "a source that is a number": ("source.json", '{"source": 5}', "how to read the data: source"),
    "no source": ("source.json", "{}", "does not tell where its data are; name them with --data"),
    "a test set that is a number": ("source.json", '{"source": "digits", "test": 5}', "how to read the data: test"),
    "gaps that are words": (
        "source.json",
        '{"source": "digits", "missing": "run me"}',
        "how to read the data: missing",
    ),
    "a size that is text": (
        "source.json",
        '{"source": "digits", "image_size": "x"}',
        "how to read the data: image_size",
    ),
    "a source that is gone": ("source.json", '{"source": "/nowhere"}', r"not here any more \(/nowhere\); name them"),
}


@pytest.mark.parametrize("case", REVIEWS)
def test_tampered_reviews(tmp_path: Path, array: Path, case: str) -> None:
    name, text, sentence = REVIEWS[case]
    run = toy_run_of(load.load(array), tmp_path / "run")
    written(run / name, text)
    refused(lambda: open_session(run), sentence)


def test_a_review_downloads_nothing_that_its_user_did_not_name(
    tmp_path: Path, array: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run_of(load.load(array), tmp_path / "run")
    written(run / "source.json", '{"source": "cifar10"}')
    monkeypatch.delenv("ANTIBACKDOOR_DATA", raising=False)
    asked: list[str] = []
    monkeypatch.setattr(load, "load_named", lambda name, **_: asked.append(name) or load.load(array))
    refused(lambda: open_session(run), r"not here any more \(cifar10\); name them with --data")
    assert not asked
    open_session(run, source="cifar10")
    (tmp_path / "cache").mkdir()
    write_npz(tmp_path / "cache" / "cifar10.npz", Splits(toy_images(12)))
    open_session(run)
    assert asked == ["cifar10", "cifar10"]


def test_tables_by_any_separator(tmp_path: Path) -> None:
    """Names hold no formula for a spreadsheet that takes the semicolon for the separator of `drop.csv`."""
    data = toy_images(4)
    names = ["a;=1+1|cmd", 'b;"=1', "c; -1", "d;e"]
    write_npz(tmp_path / "set.npz", Splits(type(data)(data.x, data.y, data.spec, names)))
    session = open_session(toy_run_of(load.load(tmp_path / "set.npz"), tmp_path / "run", flagged=2))
    export(session, tmp_path / "out", "npz")
    rows = (tmp_path / "out" / "drop.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 and all(row.startswith("\"'\\") and r"\x3b" in row and ";" not in row for row in rows)
    refused(lambda: export(session, tmp_path / "csv", "csv"), "could run as a formula")
    session.decisions.decide([0, 1, 2], "drop")
    export(session, tmp_path / "csv", "csv")
    assert (tmp_path / "csv" / "labels.csv").read_text().splitlines()[1] == '"d;e","class 3","train"'
    assert np.all(session.decisions.codes[:3] == -3)


def test_a_name_too_long_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        inside(tmp_path / ("a" * 5000), tmp_path)
