"""Tables, ONNX, trackers, references: a run for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import antibackdoor
from antibackdoor.data.core import Splits
from antibackdoor.data.folders import folder_names
from antibackdoor.errors import InputError
from antibackdoor.exports import export_onnx, export_run
from antibackdoor.files import check_replaceable, write_csv
from antibackdoor.findings import Result
from antibackdoor.models import create
from antibackdoor.runs import read_suspects
from antibackdoor.threats import ALWAYS, POISONED, references
from antibackdoor.tracking import Tracking, check_trackers
from antibackdoor.training.loop import Progress
from antibackdoor.verdict import Verdict
from toy import toy_images, toy_series

FAST: dict[str, Any] = {
    "defense": "none", "options": {"recipe.min_steps": 0}, "model": "resnet18-w8", "epochs": 2, "device": "cpu"
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("run")
    data = toy_images(24)
    named = type(data)(data.x, data.y, data.spec, ["=1+1", "two\nlines", "'q'", *data.ids[3:]])
    return antibackdoor.train(Splits(named, toy_images(8, seed=1)), **FAST, out=out / "r"), out / "r"


def test_tables(finished: tuple[Result, Path], tmp_path: Path) -> None:
    result, folder = finished
    pd.testing.assert_frame_equal(read_suspects(folder), result.suspects, check_dtype=False)
    pytest.importorskip("pyarrow", reason="the extra `hf` is not installed")
    assert export_run(folder, tmp_path / "deep" / "s.parquet").startswith("24 rows")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "deep" / "s.parquet"), result.suspects, check_dtype=False)
    export_run(folder, tmp_path / "s.csv", "issues")
    assert list(pd.read_csv(tmp_path / "s.csv"))[1:] == list(result.issues())
    with pytest.raises(InputError, match="should end in one of"):
        export_run(folder, tmp_path / "s.xlsx")
    with pytest.raises(InputError, match=r"no suspects\.csv"):
        export_run(tmp_path, tmp_path / "t.csv")


def test_issues_are_as_cleanlab_has_them(finished: tuple[Result, Path]) -> None:
    result, _ = finished
    issues = result.issues()
    assert list(issues.index) == list(result.data.ids)
    assert list(issues) == ["is_backdoor_issue", "backdoor_score", "given_label", "predicted_label"]
    assert issues["backdoor_score"].between(0, 1).all() and issues["is_backdoor_issue"].dtype == bool
    table = result.suspects.set_index("id")
    assert (issues["backdoor_score"] == 1 - table.loc[issues.index, "probability"]).all()


@pytest.mark.long
@pytest.mark.parametrize("data", [toy_images(4), toy_series(4)], ids=["image", "series"])
def test_onnx_gives_the_same_logits(tmp_path: Path, data: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    torch.manual_seed(0)
    model = create("resnet18-w8", data.spec).eval()
    export_onnx(model, data.spec, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = data.spec.decode(data.x[torch.arange(4)])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).numpy(), atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == list(data.spec.classes) and json.loads(told["kind"]) == data.spec.kind
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_that_differs_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

    class Odd(torch.nn.Module):
        """Another function on every call that is not traced."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shift = 0.0 if torch.compiler.is_exporting() else 1.0
            return x.flatten(1)[:, :4] + shift

    with pytest.raises(InputError, match="nothing was written"):
        export_onnx(Odd(), toy_images(4).spec, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_history_as_a_table(finished: tuple[Result, Path]) -> None:
    result, folder = finished
    assert pd.read_csv(folder / "history.csv")["epoch"].tolist() == [row["epoch"] for row in result.history]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: list[int] = []
    antibackdoor.train(
        Splits(toy_images(24), toy_images(8, seed=1)),
        **FAST,
        out=tmp_path / "run",
        track=["tensorboard"],
        progress=Progress(epoch=lambda row: told.append(row["epoch"])),
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert told == [1, 2] and "clean_accuracy" in names
    losses = [name for name in names if name.endswith("_loss")]
    assert losses and len(events.Scalars(losses[0])) == 2


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning", reason="the extra `mlflow` is not installed")
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra `mlflow` is not installed")
    pytest.importorskip("alembic", reason="the extra `mlflow` is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for epoch in (1, 2):
        tracking = Tracking(["mlflow"], tmp_path / "run")
        tracking.begin({"seed": 0})
        tracking.watch(None).epoch({"stage": "main", "epoch": epoch, "steps": 10 * epoch, "main_loss": 1 / epoch})
        tracking.end({"clean_accuracy": {"value": 0.5, "count": 1, "n": 2}, "cost": {"seconds": 1}})
    runs = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    losses = runs.get_metric_history(name, "main/main_loss")
    assert [(m.step, m.value) for m in losses] == [(10, 1.0), (20, 0.5)]
    assert runs.get_run(name).data.metrics["clean_accuracy"] == 0.5


def test_wandb_goes_on_in_the_same_run_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning", reason="the extra `wandb` is not installed")
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for epoch in (1, 2):
        (tmp_path / "run").mkdir(exist_ok=True)
        tracking = Tracking(["wandb"], tmp_path / "run")
        tracking.begin({"seed": 0})
        tracking.watch(None).epoch({"stage": "main", "epoch": epoch, "steps": 10 * epoch, "main_loss": 1 / epoch})
        tracking.end({"clean_accuracy": {"value": 0.5, "count": 1, "n": 2}, "cost": {"seconds": 1}})
        ids.append(json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"])
        assert wandb.run is None, "the next run of this program would be told to the same tracker"
    kept = [path.read_bytes() for path in (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb")]
    assert ids[0] == ids[1] and kept and all(b"main/main_loss" in told for told in kept)
    assert b"clean_accuracy" in kept[-1]


def test_unknown_trackers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'mlflow'"):
        check_trackers(["mlfow"], tmp_path)
    with pytest.raises(InputError, match="needs a run folder"):
        check_trackers(["tensorboard"], None)
    assert Tracking([], None).watch(None) and not list(tmp_path.iterdir())


def test_references() -> None:
    found = Verdict(True, 0.9, ["cat"], 0.1, []).as_json()["references"]
    assert [row["id"] for row in found][:2] == ["AML.T0020", "AML.T0018.000"]
    assert len({row["id"] for row in found}) == len(found) == len(POISONED) + len(ALWAYS)
    clean = Verdict(False, 0.5).as_json()["references"]
    assert [row["id"] for row in clean] == ["AML.M0007", "MEASURE 2.7"]
    assert all(row["url"].endswith(row["id"]) for row in references(True) if row["framework"] == "MITRE ATLAS")


def test_tables_replace_their_like_and_nothing_else(tmp_path: Path) -> None:
    mine, ours = tmp_path / "mine.csv", tmp_path / "ours.csv"
    mine.write_text("path,label\na.png,cat\n")
    write_csv(ours, pd.DataFrame({"id": ["a"], "label": ["cat"], "score": [0.5]}))
    with pytest.raises(InputError, match=r"mine\.csv is there already and is no such table"):
        check_replaceable(mine, ["id", "label"])
    check_replaceable(ours, ["id", "label"])
    check_replaceable(tmp_path / "new.csv", ["id", "label"])
    (tmp_path / "photo.png").write_bytes(b"png")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"data\.parquet is there already"):
        check_replaceable(tmp_path / "data.parquet", ["id", "label"])
    with pytest.raises(InputError, match=r"photo\.png is there already"):
        check_replaceable(tmp_path / "photo.png", ["id", "predicted"])


def test_class_names_become_folders_that_no_file_system_confuses() -> None:
    assert folder_names(["x_-2", "x!", "x?"]) == ["x_-2", "x_", "x_-3"]
    assert folder_names(["\u732b", "\u72ac", "../up", "a/b", "A_B", ""]) == [
        "\u732b",
        "\u72ac",
        "_up",
        "a_b",
        "A_B-4",
        "_",
    ]
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert len(set(folder_names([composed, apart]))) == 2, "one name on some systems"
    many = folder_names(["?"] * 3000 + [f"_-{k}" for k in range(3000)])
    assert len({name.casefold() for name in many}) == 6000
