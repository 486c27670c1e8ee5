"""Decisions that survive, and the cleaned set that follows from them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Splits
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from antibackdoor.files import csv_cell, from_csv_cell
from antibackdoor.review.decisions import DROP, KEEP, UNDECIDED, Decisions
from antibackdoor.review.export import export
from antibackdoor.review.session import Session, open_session
from toy import toy_images, toy_series
from toy_files import write_images
from toy_review import toy_run_of


@pytest.fixture
def session(tmp_path: Path) -> Session:
    write_npz(tmp_path / "set.npz", Splits(toy_images(20), toy_images(8, seed=1)))
    return open_session(toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run"))


@pytest.fixture
def files(tmp_path: Path) -> Session:
    """Ids are paths of real image files."""
    return open_session(toy_run_of(load(write_images(tmp_path / "data", count=4)), tmp_path / "run"))


def test_decisions_survive(session: Session) -> None:
    session.decisions.decide([0, 3], "drop")
    session.decisions.decide([3], "keep")
    session.decisions.decide([1], "relabel", "class 3")
    session.decisions.decide([2], "drop")
    session.decisions.decide([2], "undecided")
    again = Decisions(session.folder, session.data)
    assert again.codes[:5].tolist() == [DROP, 3, UNDECIDED, KEEP, UNDECIDED]


def test_decisions_are_taken_back_after_a_restart_too(session: Session) -> None:
    session.decisions.decide([0], "drop")
    session.decisions.decide([1], "relabel", "class 3")
    session.decisions.decide([0], "keep")
    assert session.decisions.undo() == 0
    again = Decisions(session.folder, session.data)
    assert again.codes[:2].tolist() == [DROP, 3]
    assert [again.undo(), Decisions(session.folder, session.data).undo()] == [1, 0], "not what was taken back itself"
    last = Decisions(session.folder, session.data)
    assert last.undo() is None and (last.codes == UNDECIDED).all()


def test_a_line_cut_off_costs_only_itself(session: Session) -> None:
    session.decisions.decide([0], "drop")
    whole = session.decisions.path.read_bytes()
    session.decisions.decide([1], "drop")
    both = session.decisions.path.read_bytes()
    for end in range(len(whole), len(both)):
        session.decisions.path.write_bytes(both[:end])
        again = Decisions(session.folder, session.data)
        assert again.codes[0] == DROP and again.codes[1] in (UNDECIDED, DROP)
        again.decide([2], "keep")
        assert Decisions(session.folder, session.data).codes[[0, 2]].tolist() == [DROP, KEEP]


@pytest.mark.long
def test_killed_while_deciding_nothing_said_is_lost(session: Session, tmp_path: Path) -> None:
    """Every decision that was reported is there after a kill."""
    code = (
        "import sys; from pathlib import Path; from antibackdoor.review.session import open_session\n"
        "s = open_session(Path(sys.argv[1]))\n"
        "for k in range(10_000):\n"
        "    s.decisions.decide([k % 20], 'drop' if k // 20 % 2 == 0 else 'keep'); print(k, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code, str(session.folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(50)]
    process.kill()
    told += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    process.stdout.close()
    wanted = {k % 20: (DROP if k // 20 % 2 == 0 else KEEP) for k in told}
    last = told[-1] + 1  # on the disk, perhaps, without having been told
    codes = Decisions(session.folder, session.data).codes
    assert all(codes[row] == code for row, code in wanted.items() if row != last % 20)


@pytest.mark.parametrize(
    ("line", "gist"),
    [
        ('{"id": "nobody", "decision": "drop"}', "line 1 names a sample"),
        ('{"id": "0/1.png", "decision": "burn"}', "line 1: a decision is"),
        ('{"id": "0/1.png", "decision": "relabel"}', "relabel with a class"),
        ('{"id": "0/1.png", "decision": "relabel", "label": "zebra"}', "no class 'zebra'"),
        ('{"id": ["0/1.png"], "decision": "drop"}', "line 1 names a sample"),
        ("[1]", "line 1 names a sample"),
    ],
)
def test_damaged_decisions(session: Session, line: str, gist: str) -> None:
    session.decisions.path.write_text(line + "\n")
    with pytest.raises(InputError, match=gist):
        Decisions(session.folder, session.data)


def test_only_one_program_at_a_time(session: Session) -> None:
    session.decisions.hold()
    other = Decisions(session.folder, session.data)
    with pytest.raises(InputError, match="reviewed by another program"):
        other.hold()
    session.decisions.release()
    other.hold()
    other.release()


def test_what_is_undecided(session: Session) -> None:
    session.decisions.decide([0], "keep")
    session.decisions.decide([1], "relabel", "class 0")
    session.decisions.decide([10], "drop")
    dropped = session.cleaned("drop").train
    assert [n for n in session.data.ids if n not in dropped.ids] == [f"0/{k}.png" for k in (2, 3, 4, 5, 10)]
    assert dropped.y[:2].tolist() == [0, 0]
    assert len(session.cleaned("keep").train) == 19
    suggested = session.cleaned("suggest").train
    assert suggested.y[:7].tolist() == [0, 0, 3, 0, 1, 2, 2]


@pytest.mark.parametrize("form", ["npz", "csv", "folder"])
def test_exports_can_be_trained_on(files: Session, tmp_path: Path, form: str) -> None:
    files.decisions.decide([0, 1], "drop")
    files.decisions.decide([2], "relabel", "red")
    told = export(files, tmp_path / "out", form, "keep")  # type: ignore[arg-type]
    beside = f"; labels.csv is to be put into {tmp_path / 'data'}, whose files it lists" if form == "csv" else ""
    assert told == "10 of 12 samples kept, 2 dropped, 1 relabeled" + beside
    if form == "csv":
        (tmp_path / "out" / "labels.csv").rename(tmp_path / "data" / "labels.csv")
    place = {"npz": "out", "csv": "data/labels.csv", "folder": "out"}[form]
    again = load(tmp_path / place).train
    assert len(again) == 10 and np.bincount(again.y).tolist() == [1, 4, 5]
    kept = (tmp_path / "out" / "keep.txt").read_text().splitlines()
    assert kept == [name for name in files.data.ids if name not in files.data.ids[:2]]
    rows = list(csv.DictReader((tmp_path / "out" / "drop.csv").open(newline="")))
    assert [row["action"] for row in rows] == ["drop", "drop", "relabel"] and rows[2]["new_label"] == "red"
    if form == "folder":  # the files themselves, not decoded pixels
        assert len(list((tmp_path / "out" / "data" / "red").iterdir())) == 5  # two of them were called 02.png
        first = (tmp_path / "data" / "green" / "00.png").read_bytes()
        assert (tmp_path / "out" / "data" / "green" / "00.png").read_bytes() == first
    with pytest.raises(InputError, match="not empty"):
        export(files, tmp_path / "out", form)  # type: ignore[arg-type]


def test_images_of_arrays_become_files(session: Session, tmp_path: Path) -> None:
    export(session, tmp_path / "out", "folder")
    again = load(tmp_path / "out" / "data")
    assert len(again.train) == 14 and again.test is not None and len(again.test) == 8
    assert torch.equal(again.train.x.sum(), session.cleaned().train.x[torch.arange(14)].sum())  # type: ignore[attr-defined]


def test_series_stay_arrays(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", Splits(toy_series(20, unequal=True)))
    session = open_session(toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run"))
    export(session, tmp_path / "out", "npz")
    again = load(tmp_path / "out" / "data.npz").train
    assert again.fingerprint() == session.cleaned().train.fingerprint()
    with pytest.raises(InputError, match="not read from files of their own"):
        export(session, tmp_path / "other", "folder")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_recordings_leave_as_the_files_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(20):
        path = tmp_path / "set" / ("slow", "fast")[k % 2] / f"{k:02d}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n" + "".join(f"{value}\n" for value in rng.normal(size=12)))
    session = open_session(toy_run_of(load(tmp_path / "set"), tmp_path / "run"))
    export(session, tmp_path / "out", "folder")
    again, kept = load(tmp_path / "out" / "data").train, session.cleaned().train
    assert sorted(again.ids) == sorted(kept.ids) and 0 < len(kept) < 20
    first = kept.ids[0]
    assert (tmp_path / "out" / "data" / first).read_bytes() == (tmp_path / "set" / first).read_bytes()


def test_arrays_that_name_files_beside_them_are_no_files(tmp_path: Path) -> None:
    """What was looked at is in the array; a file of the same name may hold anything."""
    data = toy_images(20)
    named = type(data)(data.x, data.y, data.spec, [f"n{k}.png" for k in range(20)])
    write_npz(tmp_path / "set.npz", Splits(named))
    for name in named.ids:
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    session = open_session(toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run"))
    export(session, tmp_path / "out", "folder")
    again, kept = load(tmp_path / "out" / "data").train, session.cleaned().train
    assert sorted(again.x.flatten(1).sum(1).tolist()) == sorted(kept.x.flatten(1).sum(1).tolist())  # type: ignore[attr-defined]


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    """Whatever numbers they are told apart by may be the name of another."""
    places = ["cat/a-2.png", "cat/x/a.png", "cat/y/A.png", "cat/z/a.png", "dog/a.png", "dog/b.png", "dog/c.png"]
    for shade, place in enumerate(places):
        (tmp_path / "set" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / "set" / place)
    session = open_session(toy_run_of(load(tmp_path / "set"), tmp_path / "run", flagged=0))
    export(session, tmp_path / "out", "folder")
    assert sorted(load(tmp_path / "out" / "data").train.x[:, 0, 0, 0].tolist()) == list(range(len(places)))


def test_a_test_set_from_another_folder_leaves_from_there(tmp_path: Path) -> None:
    for part, side in (("set", 0), ("held", 100)):
        for k in range(8):
            (tmp_path / part / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (side + k, 0, 0)).save(tmp_path / part / "ab"[k % 2] / f"{k}.png")
    session = open_session(toy_run_of(load(tmp_path / "set", test=tmp_path / "held"), tmp_path / "run", flagged=0))
    export(session, tmp_path / "out", "folder")
    test = load(tmp_path / "out" / "data").test
    assert test is not None and sorted(test.x[:, 0, 0, 0].tolist()) == list(range(100, 108))
    with pytest.raises(InputError, match="held, out of reach of a list in"):
        export(session, tmp_path / "list", "csv")


HOSTILE = ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'quoted", '<img src=x>"', "ok"]


def test_no_formula_leaves(tmp_path: Path) -> None:
    data = toy_images(10)
    names = [f"{name}" for name in HOSTILE]
    spec = type(data.spec)(data.spec.kind, data.spec.shape, ("=a", "+b", "-c", "@d"))
    write_npz(tmp_path / "set.npz", Splits(type(data)(data.x, data.y, spec, names)))
    session = open_session(toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run", flagged=10))
    session.decisions.decide([9], "keep")
    export(session, tmp_path / "out", "npz")
    rows = list(csv.reader((tmp_path / "out" / "drop.csv").open(newline="")))[1:]
    assert not [cell for row in rows for cell in row[:4] if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")]
    assert [from_csv_cell(row[0]) for row in rows] == names[:9]
    with pytest.raises(InputError, match="formula"):
        export(session, tmp_path / "csv", "csv")
    session.decisions.decide([6], "keep")
    export(session, tmp_path / "again", "npz")
    assert (tmp_path / "again" / "keep.txt").read_text() == json.dumps("\n=1") + "\nok\n"


@pytest.mark.parametrize("text", [*HOSTILE, "", "''"])
def test_cells_come_back(text: str) -> None:
    assert from_csv_cell(csv_cell(text)) == text


def test_a_run_on_reviewed_data_is_reviewed_in_turn(session: Session, tmp_path: Path) -> None:
    session.decisions.decide([0], "keep")
    second = toy_run_of(session.cleaned("drop"), tmp_path / "second")
    reviewed = open_session(second)
    assert len(reviewed.data) == 15 and reviewed.splits.test is not None
    reviewed.decisions.decide([0], "drop")
    third = toy_run_of(reviewed.cleaned("keep"), tmp_path / "third")
    for splits in (None, load(tmp_path / "set.npz"), session.cleaned("drop"), reviewed.cleaned("keep")):
        assert len(open_session(third, splits).data) == 14, "whichever of the reviews they went through before"
    assert len(open_session(third, source=str(tmp_path / "set.npz")).data) == 14
    session.decisions.decide([1], "keep")
    with pytest.raises(InputError, match=r"the run in .*second was made on .* same decisions of earlier reviews"):
        open_session(third)


def test_other_data_are_refused(session: Session, tmp_path: Path) -> None:
    write_npz(tmp_path / "other.npz", Splits(toy_images(20, seed=5)))
    with pytest.raises(InputError, match="not the data"):
        open_session(session.folder, source=str(tmp_path / "other.npz"))
    (session.folder / "source.json").unlink()
    with pytest.raises(InputError, match="name them with --data"):
        open_session(session.folder)
    assert len(open_session(session.folder, source=str(tmp_path / "set.npz")).data) == 20
    with pytest.raises(InputError, match=r"no config\.json"):
        open_session(tmp_path)
