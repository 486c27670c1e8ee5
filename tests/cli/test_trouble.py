"""Full disks, folders without permission, data that vanish, signals and second programs: one sentence, nothing lost."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antibackdoor.cli import frame
from antibackdoor.data.arrays import write_npz
from antibackdoor.data.copies import keep_rows
from antibackdoor.data.core import Splits
from antibackdoor.data.load import load
from antibackdoor.data.rows import FileRows
from antibackdoor.errors import InputError
from antibackdoor.files import LOCK, at_once, lock, save_state, sweep, write_text
from antibackdoor.review.decisions import DROP, KEEP, UNDECIDED
from antibackdoor.review.session import open_session
from antibackdoor.training.job import Job
from toy import toy_images
from toy_files import TINY, UNDEFENDED, Run, write_images
from toy_review import toy_run_of

ROOT = Path(__file__).parents[2]
CAP_DAC_OVERRIDE = 1 << 1
TRAIN = (*TINY, *UNDEFENDED, "--quiet")
SCAN = (*TINY, "--quiet", "--detector", "loss", "--set", "recipe.min_steps=0")
GRID = """
[[cells]]
data = ["digits"]
train_size = 40
attacks = ["none"]
defenses = ["none"]
defense_options = { "recipe.min_steps" = 0 }
models = ["resnet18-w1"]
epochs = 1
seeds = [0]
"""


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the error comes in the middle of a write, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Nothing in `folder` can be changed: its permissions say so, and they bind this process too, root or not.

    Only the right to pass over permissions is laid down, not the user: the code itself may lie where only root reads.
    """
    before = capabilities()
    folder.chmod(0o555)
    try:
        capabilities(before & ~CAP_DAC_OVERRIDE)
        yield
    finally:
        capabilities(before)
        folder.chmod(0o755)


def capabilities(new: int | None = None) -> int:
    """The first 32 effective capabilities of this thread; sets them to `new` where given (capget, capset of Linux)."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    library = ctypes.CDLL(None, use_errno=True)
    assert library.capget(header, data) == 0, ctypes.get_errno()
    if new is not None:
        data[0] = new
        assert library.capset(header, data) == 0, ctypes.get_errno()
    return int(data[0])


def sentence(told: str) -> str:
    """What was printed, which must be one sentence."""
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes() + (folder / "suspects.csv").read_bytes()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("set") / "images", count=12)


def undisturbed(command: str, images: Path, out: Path, *words: str) -> Path:
    from typer.testing import CliRunner

    from antibackdoor.cli import app

    done = CliRunner().invoke(app, [command, str(images), "--out", str(out), *words])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    return undisturbed("train", images, tmp_path_factory.mktemp("run") / "whole", *TRAIN)


@pytest.fixture(scope="module")
def scanned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed scan."""
    return undisturbed("scan", images, tmp_path_factory.mktemp("scan") / "whole", *SCAN)


@pytest.mark.parametrize("size", [10, 3_000, 120_000])  # the settings, the history's first, a checkpoint
def test_a_full_disk_in_a_training(run: Run, images: Path, whole: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    with full_disk(size):
        told = sentence(run("train", images, "--out", out, *TRAIN, status=2).output)
    assert "File too large" in told and str(out) in told
    assert not (out / "result.json").exists() and not list(out.rglob(".*.part")) and not list(out.rglob(".tmp*"))
    run("train", images, "--out", out, *TRAIN, "--resume")
    assert weights(out) == weights(whole)


def test_a_full_disk_elsewhere(run: Run, images: Path, whole: Path, tmp_path: Path) -> None:
    words: dict[str, tuple[object, ...]] = {
        "poison": ("poison", "digits", "--attack", "badnets", "--rate", 0.1),
        "folder": ("poison", "digits", "--attack", "badnets", "--rate", 0.1, "--format", "folder"),
        "predict": ("predict", whole, images),
    }
    for name, command in words.items():
        with full_disk(50):
            told = sentence(run(*command, "--out", tmp_path / f"{name}.csv", "--quiet", status=2).output)
        assert "File too large" in told
    with full_disk(50):
        sentence(run("export", whole, tmp_path / "suspects.csv", "--quiet", status=2).output)
        sentence(run("review", whole, "--export", tmp_path / "cleaned", "--quiet", status=2).output)
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


@pytest.mark.parametrize("size", [10, 3_000])
def test_a_full_disk_in_a_scan(run: Run, images: Path, scanned: Path, tmp_path: Path, size: int) -> None:
    with full_disk(size):
        told = sentence(run("scan", images, "--out", tmp_path / "cut", *SCAN, status=2).output)
    assert "File too large" in told and not (tmp_path / "cut" / "result.json").exists()
    run("scan", images, "--out", tmp_path / "cut", *SCAN, "--resume")
    assert (tmp_path / "cut" / "suspects.csv").read_bytes() == (scanned / "suspects.csv").read_bytes()


@pytest.mark.parametrize("size", [10, 500])  # a checkpoint, the record
def test_a_full_disk_in_a_bench(run: Run, tmp_path: Path, size: int) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    words = ("bench", tmp_path / "grid.toml", "--out", tmp_path / "results", "--workers", "0", "--quiet")
    with full_disk(size):
        told = sentence(run(*words, status=2).output)
    assert "File too large" in told or "broke" in told
    assert not [path for path in (tmp_path / "results").rglob("*.json") if not path.name.endswith(".error.json")]
    run(*words)
    assert len(list((tmp_path / "results").glob("*.json"))) == 1 and not list((tmp_path / "results").rglob(".*.part"))


def test_a_full_disk_in_a_review(tmp_path: Path) -> None:
    """A decision that could not be written does not count, and harms none before or after it."""
    write_npz(tmp_path / "set.npz", Splits(toy_images(12)))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run")
    decisions = open_session(folder).decisions
    decisions.decide([0], "drop")
    size = decisions.path.stat().st_size
    for room in (0, 7):
        with full_disk(size + room), pytest.raises(InputError, match=r"cannot write .*File too large"):
            decisions.decide([1], "drop")
        assert decisions.codes[1] == UNDECIDED and (open_session(folder).decisions.codes[:2] == (DROP, UNDECIDED)).all()
    decisions.decide([2], "keep")
    assert open_session(folder).decisions.codes[:3].tolist() == [DROP, UNDECIDED, KEEP]


def test_a_full_disk_while_a_copy_is_made(tmp_path: Path) -> None:
    source = tmp_path / "set.npz"
    source.write_bytes(b"x")

    def keep() -> FileRows:
        return keep_rows(source, "x", (100, 1000), np.float32, lambda: [np.ones((10, 1000))] * 10)

    with full_disk(50_000), pytest.raises(InputError, match="File too large"):
        keep()
    assert keep()[torch.arange(100)].sum() == 100_000


def test_a_folder_without_permission(run: Run, images: Path, whole: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for path in whole.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        images_here = write_images(folder / "images", count=12)
        before = {path.name for path in folder.iterdir()}
        grid = ROOT / "experiments" / "first-results-series.toml"
        for words in (
            ("train", images_here, "--out", folder / "new", *TRAIN),
            ("scan", images_here, "--out", folder / "new", *TINY, "--quiet"),
            ("train", images_here, "--out", folder, *TRAIN, "--resume"),
            ("poison", "digits", "--attack", "badnets", "--out", folder / "new"),
            ("predict", folder, images_here, "--out", folder / "new.csv"),
            ("report", folder),
            ("review", folder, "--export", folder / "new", "--data", images),
            ("review", folder, "--data", images),
            ("export", folder, folder / "new.csv"),
            ("bench", grid, "--out", folder / "new", "--workers", "0", "--quiet"),
        ):
            with nobody(folder):
                assert "ermission denied" in sentence(run(*words, status=2).output), words
        assert {path.name for path in folder.iterdir()} == before


def test_data_that_vanish(run: Run, images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, here, away = tmp_path / "run", tmp_path / "images", tmp_path / "away"
    here.symlink_to(images)
    monkeypatch.setattr(Job, "checkpoint_seconds", -1.0)
    with full_disk(120_000):
        run("train", here, "--out", out, *TRAIN, status=2)
    here.rename(away)
    assert str(here) in sentence(run("train", here, "--out", out, *TRAIN, "--resume", status=2).output)
    away.rename(here)
    run("train", here, "--out", out, *TRAIN, "--resume")
    assert weights(out) == weights(whole)


def test_data_that_vanish_from_a_scan(
    run: Run, images: Path, scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, away = tmp_path / "images", tmp_path / "away"
    here.symlink_to(images)
    monkeypatch.setattr(Job, "checkpoint_seconds", -1.0)
    with full_disk(60_000):  # cut off somewhere on its way
        run("scan", here, "--out", tmp_path / "run", *SCAN, status=2)
    here.rename(away)
    assert str(here) in sentence(run("scan", here, "--out", tmp_path / "run", *SCAN, "--resume", status=2).output)
    away.rename(here)
    run("scan", here, "--out", tmp_path / "run", *SCAN, "--resume")
    assert (tmp_path / "run" / "suspects.csv").read_bytes() == (scanned / "suspects.csv").read_bytes()


def test_data_that_vanish_from_a_review(run: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", Splits(toy_images(12)))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run")
    open_session(folder).decisions.decide([0], "keep")
    (tmp_path / "set.npz").rename(tmp_path / "away.npz")
    words = ("review", folder, "--export", tmp_path / "cleaned")
    told = sentence(run(*words, status=2).output)
    assert "set.npz" in told and "name them with --data" in told and not (tmp_path / "cleaned").exists()
    run(*words, "--data", tmp_path / "away.npz")
    assert len(load(tmp_path / "cleaned").train) == 7  # five of six flagged ones were dropped


def test_data_that_vanish_from_a_poisoning(run: Run, tmp_path: Path) -> None:
    words = ("poison", tmp_path / "set.npz", "--attack", "badnets", "--rate", 0.2, "--out", tmp_path / "poisoned")
    assert "set.npz" in sentence(run(*words, status=2).output)
    assert list(tmp_path.iterdir()) == []
    write_npz(tmp_path / "set.npz", Splits(toy_images(24), toy_images(8, seed=1)))
    run(*words)


def test_data_that_vanish_from_a_bench(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIBACKDOOR_DATA", str(tmp_path))
    (tmp_path / "grid.toml").write_text(GRID.replace("digits", "uwave_extended"))  # one that cannot be downloaded
    words = ("bench", tmp_path / "grid.toml", "--out", tmp_path / "results", "--workers", "0", "--quiet")
    assert "1 of 1 cells broke" in sentence(run(*words, status=2).output)
    (error,) = (tmp_path / "results").glob("*.error.json")
    assert "put uwave_extended.npz into the folder" in error.read_text()
    write_npz(tmp_path / "uwave_extended.npz", Splits(toy_images(40), toy_images(8, seed=1)))
    run(*words)
    assert not error.exists() and len(list((tmp_path / "results").glob("*.json"))) == 1


def test_a_file_that_vanishes_while_the_folder_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened = write_images(tmp_path / "images", count=4), Image.open

    def gone(path: Path, *more: object, **others: object) -> Image.Image:
        (folder / "red" / "03.png").unlink(missing_ok=True)
        return opened(path, *more, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", gone)
    told = sentence(run("train", folder, "--out", tmp_path / "run", *TRAIN, status=2).output)
    assert "03.png" in told and not (tmp_path / "run").exists()


def test_a_second_program_is_refused(run: Run, images: Path, whole: Path, tmp_path: Path) -> None:
    before = weights(whole)
    with lock(whole / LOCK, wait=False) as mine:
        assert mine
        told = sentence(run("train", images, "--out", whole, *TRAIN, "--resume", status=2).output)
        assert "another program is running in" in told
        told = sentence(run("scan", images, "--out", whole, *SCAN, "--resume", status=2).output)
        assert "another program is running in" in told
    out = tmp_path / "poisoned"
    with pytest.raises(KeyError), at_once(out) as part:
        assert part.is_dir() and not out.exists()
        words = ("poison", "digits", "--attack", "badnets", "--out", out)
        assert "another program is writing" in sentence(run(*words, status=2).output)
        raise KeyError
    assert weights(whole) == before and list(tmp_path.iterdir()) == []


def test_one_review_at_a_time(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", Splits(toy_images(12)))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run")
    first, second = open_session(folder).decisions, open_session(folder).decisions
    first.hold()
    with pytest.raises(InputError, match="being reviewed by another program"):
        second.hold()
    first.release()
    second.hold()
    second.release()


def test_a_folder_takes_its_place_in_one_step(tmp_path: Path) -> None:
    out, stale = tmp_path / "out", tmp_path / ".out.part"
    (stale / "half").mkdir(parents=True)  # as a killed program leaves them
    (stale / "half" / "file").touch()
    (tmp_path / ".out.old").mkdir()
    for text in ("first", "second"):
        with at_once(out, replace=True) as part:
            (part / "a").write_text(text)
            assert [path.name for path in part.iterdir() if path.name != LOCK] == ["a"]
        assert (out / "a").read_text() == text and list(out.iterdir()) == [out / "a"]
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(InputError, match="not empty"), at_once(out):
        raise AssertionError("it is in use")
    with pytest.raises(KeyError), at_once(out, replace=True) as part:
        (part / "a").write_text("third")
        raise KeyError
    assert (out / "a").read_text() == "second" and list(tmp_path.iterdir()) == [out]


def test_what_killed_programs_leave_is_swept(tmp_path: Path) -> None:
    for name in ("a", "deep/b"):
        write_text_like_a_killed_program(tmp_path / name)
    save_state(tmp_path / "state", {"x": 1})
    assert len(list(tmp_path.rglob(".*.part"))) == 2
    sweep(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["state"]


def write_text_like_a_killed_program(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, "x")
    path.rename(path.with_name(f".{path.name}.1.part"))


STRUCK = {
    "train": (("train", "{images}", "--out", "{out}", *TRAIN), r"train .* --resume"),
    "scan": (("scan", "{images}", "--out", "{out}", *SCAN), r"scan .* --resume"),
    "bench": (("bench", "{grid}", "--out", "{out}", "--workers", "0", "--quiet"), r"bench .* --quiet"),
}


@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
@pytest.mark.parametrize("command", STRUCK)
def test_a_signal_ends_with_a_sentence(
    run: Run,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    number: int,
    word: str,
    status: int,
) -> None:
    from antibackdoor.cli import end_orderly

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    fit = Job.fit

    def struck(self: Job, *given: object, **more: object) -> None:
        os.kill(os.getpid(), number)
        fit(self, *given, **more)  # type: ignore[arg-type]

    (tmp_path / "grid.toml").write_text(GRID)
    named = {"{images}": images, "{out}": tmp_path / "run", "{grid}": tmp_path / "grid.toml"}
    words = [named.get(word, word) for word in STRUCK[command][0]]
    monkeypatch.setattr(Job, "fit", struck)
    try:
        end_orderly()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
        told = run(*words, status=status).output
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert re.fullmatch(rf"{word}; go on with: antibackdoor {STRUCK[command][1]}\n", told)
    monkeypatch.setattr(Job, "fit", fit)
    run(*words, *(["--resume"] if command != "bench" else []))


@pytest.mark.parametrize(
    ("stop", "word", "status"), [("Terminated", "terminated", 143), ("KeyboardInterrupt", "interrupted", 130)]
)
def test_a_signal_before_the_command_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: str, word: str, status: int
) -> None:
    from antibackdoor import cli

    def struck(*_: object) -> None:
        raise getattr(cli, stop, KeyboardInterrupt)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.Group, "parse_args", struck)
    monkeypatch.setattr(sys, "argv", ["antibackdoor", "list"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == status and capsys.readouterr().err == f"{word}.\n"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_commands_go_on_to_the_same(tmp_path: Path) -> None:
    """A small sample of `benchmarks/kills.py`: real processes, real signals."""
    kinds = "train none image|scan loss series|poison badnets image|review npz|review page"
    words = [sys.executable, "benchmarks/kills.py", "--kills", "8", "--seed", "3", "--only", kinds]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "of 5 cases; 0 problems" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_library_takes_for_a_failure_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """Sent while aeon was imported, it came out as an ImportError, and as the advice to install aeon."""

    def listing(*_: object) -> None:
        try:
            frame.RECEIVED.append(number)
            raise frame.stop_by(number)
        except KeyboardInterrupt:
            raise InputError("it needs the package aeon.") from None

    monkeypatch.setattr("antibackdoor.listing.listing", listing)
    assert "aeon" not in run("list", status=status).output
    monkeypatch.undo()
    run("list", "attacks")
