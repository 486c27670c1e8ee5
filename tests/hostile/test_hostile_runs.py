"""Run folders, models, settings and grids that somebody tampered with."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from antibackdoor.bench.declared import tables_text
from antibackdoor.bench.grid import read_grid
from antibackdoor.data.core import Spec
from antibackdoor.files import load_state, read_json
from antibackdoor.models import create
from antibackdoor.models.pretrained import read_weights
from antibackdoor.report.run import read_run
from antibackdoor.runs import load_model, read_suspects, save_model
from antibackdoor.settings import read_settings
from hostile_files import array, bounded, npy, refused, sparse, written, zipped


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    spec = Spec("image", (3, 8, 8), ("a", "b"))
    save_model(folder, create("resnet18-w1", spec), "resnet18-w1", spec)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((honest / name).read_bytes())
    return tmp_path


CARDS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no JSON": ("{", "Expecting property name"),
    "not an object": ("[]", "not a model card"),
    "nested without end": ("[" * 200_000, "nested too deeply"),
    "another key": ({"__class__": "os.system"}, "not a model card: __class__"),
    "kind of nonsense": ({"kind": "pickle"}, "not a model card: kind"),
    "architecture of another package": ({"architecture": "os.system"}, "unknown model"),
    "architecture is a path": ({"architecture": "../../evil"}, "unknown model"),
    "architecture is a list": ({"architecture": ["resnet18"]}, "not a model card: architecture"),
    "architecture of other weights": ({"architecture": "resnet34-w1"}, "weights have other names or shapes"),
    "width of 1,025": ({"architecture": "resnet18-w1025"}, r"must be in 1\.\.1024"),
    "width of a trillion": ({"architecture": "resnet18-w1000000000000"}, r"must be in 1\.\.1024"),
    "width that the file does not have": ({"architecture": "resnet18-w1024"}, "weights have other names or shapes"),
    "a million channels": ({"shape": [1_000_000, 8, 8]}, "weights have other names or shapes|no such network"),
    "2**40 channels": ({"shape": [2**40, 8, 8]}, "has 3 axes of"),
    "negative shape": ({"shape": [3, -8, 8]}, "has 3 axes of"),
    "shape without an axis": ({"shape": []}, "has 3 axes of"),
    "shape of a series": ({"shape": [3, 8]}, "has 3 axes of"),
    "no classes": ({"classes": []}, "classes of different names"),
    "another number of classes": ({"classes": ["a", "b", "c"]}, "weights have other names or shapes"),
    "classes of one name": ({"classes": ["a", "a"]}, "classes of different names"),
    "100,001 classes": ({"classes": [str(k) for k in range(100_001)]}, "classes of different names"),
    "range of NaN": ('{"low": NaN}', "not a model card: low"),
    "range without end": ('{"high": Infinity}', "not a model card: high"),
    "range upside down": ({"low": 2.0, "high": 1.0}, "low is above high"),
    "images for series": ({"kind": "series", "shape": [3, 8]}, "weights have other names or shapes"),
}


@pytest.mark.parametrize("case", CARDS)
def test_tampered_cards(folder: Path, case: str) -> None:
    change, sentence = CARDS[case]
    card = json.loads((folder / "model.json").read_text())
    if isinstance(change, dict):
        text = json.dumps({**card, **change})
    else:  # a number that JSON does not know goes into the honest card
        text = json.dumps({**card, **json.loads(change)}) if "{" in change and len(change) > 1 else change
    (folder / "model.json").write_text(text)
    refused(lambda: load_model(folder), sentence)


def header(told: object, body: bytes = b"", size: int | None = None) -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def tensor(shape: list[int], end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot read the weights"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "cannot read the weights"),
    "a zip as torch.save writes it": (b"PK\x03\x04" + bytes(100), "cannot read the weights"),
    "header of 2**63 bytes": (header(b"", size=2**63), "cannot read the weights"),
    "header beyond the file": (header({}, size=10**6), "cannot read the weights"),
    "header that is no JSON": (header(b"{" * 50), "cannot read the weights"),
    "header nested without end": (header(b"[" * 100_000), "cannot read the weights"),
    "offsets beyond the file": (header({"a": tensor([4], 16)}), "cannot read the weights"),
    "offsets that do not fit the shape": (header({"a": tensor([2**40], 16)}, bytes(16)), "cannot read the weights"),
    "shape that overflows": (header({"a": tensor([2**62, 2**62], 16)}, bytes(16)), "cannot read the weights"),
    "negative shape": (header({"a": tensor([-4], 16)}, bytes(16)), "cannot read the weights"),
    "unknown type": (header({"a": tensor([4], 16, "PYOBJ")}, bytes(16)), "cannot read the weights"),
    "bytes beyond the tensors": (header({"a": tensor([4], 16)}, bytes(64)), "cannot read the weights"),
    "other tensors": (header({"evil\x1b[2J": tensor([4], 16)}, bytes(16)), "weights have other names or shapes"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_tampered_weights(folder: Path, case: str) -> None:
    content, sentence = WEIGHTS[case]
    written(folder / "model.safetensors", content)
    refused(lambda: load_model(folder), sentence)
    if "cannot" in sentence:
        refused(lambda: read_weights(folder / "model.safetensors"), sentence)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors")
    refused(lambda: load_model(folder), f"weights that are not finite, in '{name}'")


def test_weights_that_are_missing_or_endless(folder: Path) -> None:
    sparse(folder / "model.safetensors", 2**43)
    refused(lambda: load_model(folder), "at most 17,179,869,184 are read")
    (folder / "model.safetensors").unlink()
    refused(lambda: load_model(folder), "holds no model.safetensors")
    sparse(folder / "model.json", 2**40)
    refused(lambda: load_model(folder), "at most 67,108,864 are read")


STATES: dict[str, bytes] = {
    "no header": b"",
    "no tree": header({"a": tensor([1], 4)}, bytes(4)),
    "tree that names no tensor": header({"__metadata__": {"tree": '{"tensor": "9"}'}, "a": tensor([1], 4)}, bytes(4)),
    "tree of nothing": header({"__metadata__": {"tree": "{}"}, "a": tensor([1], 4)}, bytes(4)),
    "tree without end": header({"__metadata__": {"tree": '{"list": [' * 20_000}, "a": tensor([1], 4)}, bytes(4)),
}


@pytest.mark.parametrize("case", STATES)
def test_tampered_stages(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "main.safetensors", STATES[case])
    refused(lambda: load_state(path), "cannot read the state in .*; delete it to start that stage again")


SUSPECTS = "id,label,score,probability,flagged,suggested_label,reason\na,x,1.0,0.5,True,y,because\n"


def run(root: Path, **files: str | bytes) -> Path:
    for name, content in {"verdict__json": "{}", "suspects__csv": SUSPECTS, **files}.items():
        written(root / name.replace("__", "."), content)
    return root


def gallery(**members: bytes) -> Callable[[Path], Path]:
    return lambda root: zipped(run(root) / "gallery.npz", members).parent


RUNS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "verdict that is no JSON": (lambda root: run(root, verdict__json="{"), "cannot read .*verdict.json"),
    "verdict that is a list": (lambda root: run(root, verdict__json="[]"), "should hold a JSON object"),
    "verdict nested without end": (lambda root: run(root, verdict__json="[" * 200_000), "nested too deeply"),
    "verdict with a number of 10,000 digits": (
        lambda root: run(root, verdict__json="9" * 10_000),
        "verdict.json: Exceeds the limit",
    ),
    "verdict that is no text": (
        lambda root: run(root, verdict__json=b"\xff\xfe"),
        "verdict.json: .*can't decode byte 0xff",
    ),
    "metrics that are no object": (lambda root: run(root, metrics__json="3"), "should hold a JSON object"),
    "history that is no JSON": (lambda root: run(root, history__jsonl="{\n{}\n"), "history.jsonl, line 1"),
    "history nested without end": (
        lambda root: run(root, history__jsonl="[" * 200_000 + "\n{}\n"),
        "history.jsonl, line 1",
    ),
    "suspects without a column": (
        lambda root: run(root, suspects__csv="id,label\na,b\n"),
        "cannot read .*suspects.csv",
    ),
    "suspects without reasons": (
        lambda root: run(root, suspects__csv="id,label,score,flagged\na,b,1,True\n"),
        "no column 'probability'",
    ),
    "suspects with words for scores": (
        lambda root: run(root, suspects__csv=SUSPECTS.replace("1.0", "x")),
        "cannot read .*suspects.csv",
    ),
    "suspects with a quote that never ends": (
        lambda root: run(root, suspects__csv=SUSPECTS + '"a'),
        "cannot read .*suspects.csv",
    ),
    "pickled gallery": (
        gallery(**{"ids.npy": array(np.array([{}], dtype=object))}),
        "gallery.npz.*it holds pickled Python objects",
    ),
    "gallery that declares a petabyte": (
        gallery(
            **{
                "ids.npy": array(["a"]),
                "x.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624,), }"),
            }
        ),
        "gallery.npz.*it declares more values than its",
    ),
    "gallery that is no archive": (lambda root: run(root, gallery__npz="hello"), "cannot read .*gallery.npz"),
    "gallery of other samples": (
        gallery(**{"ids.npy": array(["a", "b"]), "x.npy": array(np.zeros((1, 4, 4, 3), np.uint8))}),
        "cannot read .*gallery.npz",
    ),
    "pickled attention": (
        lambda root: zipped(run(root) / "attention.npz", {"suspects.npy": array(np.array([{}], dtype=object))}).parent,
        "attention.npz.*it holds pickled Python objects",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_tampered_runs(tmp_path: Path, case: str) -> None:
    make, sentence = RUNS[case]
    root = make(tmp_path / "run")
    refused(lambda: read_run(root), sentence)


def test_a_gallery_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antibackdoor.limits.UNPACKED", 2**20)
    root = run(tmp_path)
    import zipfile

    zipped(root / "gallery.npz", {"x.npy": array(np.zeros(2**22, np.uint8))}, zipfile.ZIP_DEFLATED)
    refused(lambda: read_run(root), "it is a bomb")


def test_a_table_of_suspects_that_somebody_else_wrote(tmp_path: Path) -> None:
    written(tmp_path / "suspects.csv", "a,b\n1,2\n")
    refused(lambda: read_suspects(tmp_path), "cannot read .*suspects.csv")
    for quoted in ("", '"line\n",'):
        written(tmp_path / "suspects.csv", "id,label\n\n" + quoted + "0," * 500_000 + "0\n")
        with bounded():
            refused(lambda: read_suspects(tmp_path), r"its first row has 500,00[12] fields, its header 2")
    written(tmp_path / "suspects.csv", ("id," * 2**24 + "label\n") * 2)  # of 48 MiB no more than one is looked at
    with bounded():
        refused(lambda: read_suspects(tmp_path), r"it has 349,526 columns, more than 1,000")


SETTINGS: dict[str, tuple[str | bytes, str]] = {
    "no TOML": ("=", "cannot read the settings"),
    "no text": (b"\xff\xfe", "cannot read the settings"),
    "nested without end": ("a = " + "[" * 100_000, "nested too deeply"),
    "tables without end": (
        "a." * 20_000 + "b = 1",
        "a key has more than 64 parts",
    ),
    "unknown option": ("outt = 1", "did you mean 'out'"),
    "option that is a table": ("[out]\na = 1", "takes a value, not a table"),
    "set that is a list": ("set = [1]", "must be a table"),
    "option with a terminal escape": ('"\\u001b[2J" = 1', r"unknown option .*\\\\x1b|unknown option"),
    "number of 10,000 digits": ("out = " + "9" * 10_000, "cannot read the settings"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_hostile_settings(tmp_path: Path, case: str) -> None:
    text, sentence = SETTINGS[case]
    refused(lambda: read_settings(written(tmp_path / "s.toml", text), ["out", "epochs"]), sentence)


LISTS = "".join(
    f"{name} = [{', '.join(map(repr, range(40)))}]\n" for name in ("data", "models", "attacks", "defenses", "rates")
)
GRIDS: dict[str, tuple[str | bytes, str]] = {
    "no TOML": ("=", "is not a grid"),
    "no blocks": ("[cells]\na = 1", "must consist of"),
    "no text": (b"\xff\xfe", "is not a grid"),
    "nested without end": ("cells = " + "[" * 100_000, "nested too deeply"),
    "cells without end": ("[[cells]]\n" + LISTS, "makes more than 100,000 cells"),
    "tables without end": ("[[cells]]\n" + "a . " * 20_000 + "b = 1", "a key has more than 64 parts"),
    "cells that are numbers": ("cells = [1, 2]", "must be a table"),
    "lists that are numbers": ("[[cells]]\ndata = 3", "must be a list"),
    "entries without a name": ("[[cells]]\ndata = [{label = 'a'}]", "needs a `name`"),
    "entries of lists": ("[[cells]]\ndata = [[['a']]]", "data: an entry needs a `name`"),
    "options that are text": (
        "[[cells]]\ndata = ['digits']\nattacks = [{name = 'badnets', options = 'x'}]",
        "attacks: options must be a",
    ),
    "shared options that are text": (
        "[[cells]]\ndata = ['digits']\nattacks = ['badnets']\nattack_options = 'x'",
        "attack_options must be a table",
    ),
    "seeds that are dates": ("[[cells]]\ndata = ['digits']\nseeds = [2020-01-01]", "seeds: an entry needs a `name`"),
    "epochs without end": ("[[cells]]\ndata = ['digits']\nepochs = inf", "epochs=inf is not valid"),
    "override of nothing": (
        "[[cells]]\ndata = ['digits']\n[[override]]\nset = 3",
        "override, where must be a table of keys and values",
    ),
    "override with text for options": (
        "[[cells]]\ndata = ['digits']\n[[override]]\nwhere = {data = 'digits'}\nset = {epochs = {a = 1}}",
        "epochs=.* is not valid",
    ),
    "exclusion without a reason": (
        "[[cells]]\ndata = ['digits']\n[[exclude]]\nwhere = {data = 'digits'}",
        "needs `where`",
    ),
    "profile that is text": ("profile = 'x'\n[[cells]]\ndata = ['digits']", "must consist of"),
    "rules that are text": ("override = 'x'\n[[cells]]\ndata = ['digits']", "must be a table"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_hostile_grids(tmp_path: Path, case: str) -> None:
    text, sentence = GRIDS[case]
    refused(lambda: read_grid(written(tmp_path / "grid.toml", text)).cells(), sentence)


CELL = '{"data": "d", "model": "m", "attack": "a", "attack_options": {}, "defense": "none", "seed": 0}'
RECORDS: dict[str, tuple[str, str]] = {
    "record that is a number": ("3", "cell.json should hold a JSON object, not int"),
    "record without a cell": ('{"measures": {}}', "cell.json is no record of a cell: cell: Field required"),
    "record with text for a rate": (
        f'{{"cell": {CELL}, "measures": {{"clean_accuracy": {{"value": "x"}}}}}}',
        "cell.json is no record of a cell: measures.clean_accuracy.value: ",
    ),
    "record with a rate without end": (
        f'{{"cell": {CELL}, "measures": {{"clean_accuracy": {{"value": Infinity}}}}}}',
        "measures.clean_accuracy.value: Input should be a finite number",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_hostile_records(tmp_path: Path, case: str) -> None:
    text, sentence = RECORDS[case]
    written(tmp_path / "cell.json", text)
    refused(lambda: tables_text(None, tmp_path, "markdown"), sentence)


def test_json_that_is_endless_or_a_device(tmp_path: Path) -> None:
    refused(lambda: read_json(sparse(tmp_path / "big.json", 2**40)), "at most 67,108,864 are read")
    refused(lambda: read_json(Path("/dev/zero")), "pipe, a device or a socket")


def test_nothing_is_left_of_a_model_that_was_refused(folder: Path) -> None:
    (folder / "model.json").write_text("[]")
    before = torch.get_rng_state()
    refused(lambda: load_model(folder), "not a model card")
    assert torch.equal(before, torch.get_rng_state())
