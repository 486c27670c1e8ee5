"""The Python surface, where the command line's tests do not go."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import antibackdoor
from antibackdoor import InputError
from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.judge import Experiment
from antibackdoor.data.batches import gather
from antibackdoor.data.core import Splits
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.defenses.trap import Trap
from antibackdoor.models import create
from antibackdoor.models.tap import Tap
from antibackdoor.review.session import open_session
from antibackdoor.training.job import Job
from antibackdoor.training.ranking import LossDrop
from tiny import FABRIC, stored
from toy import toy_images, toy_series

TINY: dict[str, Any] = {"defense": "none", "options": {"recipe.min_steps": 0}, "epochs": 1, "device": "cpu"}
SMALL = {**TINY, "model": "resnet18-w4"}
FAST = {"warm_up.epochs": 1, "warm_up.min_steps": 0, "main.min_steps": 0}


def test_metrics_are_written_when_nothing_is_flagged(tmp_path: Path) -> None:
    """Shares of nothing have no value; a run judged against the truth must end all the same."""
    clean, test = toy_images(60), toy_images(60, seed=1)
    attack = ATTACKS["badnets"].make()
    data, truth = attack.poison(clean, {}, 0)
    result = antibackdoor.train(
        Splits(data, test),
        defense="e2abl",
        options={**FAST, "control": "nothing"},
        model="resnet18-w8",
        epochs=1,
        device="cpu",
        out=tmp_path / "run",
        experiment=Experiment(truth, *attack.triggered(test, {})),
    )
    assert not result.suspects["flagged"].any()
    assert result.metrics["detection"]["flagged_precision"] == {"value": None, "count": 0, "n": 0}
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("mixing", [True, False])
def test_the_loss_drop_has_one_history(mixing: bool) -> None:
    job = Job(toy_images(60), model="resnet18-w8", fabric=FABRIC)
    options = E2ABL(ranking="loss_drop", mixing=mixing)
    trap = Trap(options, job)
    tap = Tap(job.model(), None, 4, gather(job.data, torch.arange(2), FABRIC.device).x)
    trap.look(tap, 0)
    assert isinstance(trap.ranking, LossDrop) and trap.ranking.seen == 1


def test_images_are_predicted_as_stored_or_as_floats_and_never_guessed() -> None:
    data = toy_images(40)
    result = antibackdoor.train(data, **SMALL)
    x, expected = stored(data), result.predict(data)
    assert (result.predict(x) == expected).all() and (result.predict(x.numpy()) == expected).all()
    assert (result.predict(x / 255) == expected).all() and (result.predict(x.numpy() / 255) == expected).all()
    for wrong in (x.float(), x.long(), x / 255 - 0.5):
        with pytest.raises(InputError, match="uint8, or floats in \\[0, 1\\]"):
            result.predict(wrong)
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="NaN, infinite"):
            result.predict(torch.full((2, 3, 12, 12), value))


def test_series_are_predicted_as_they_are() -> None:
    data = toy_series(40)
    result = antibackdoor.train(data, **SMALL)
    beyond = replace(data, x=stored(data) * 5)
    assert (result.predict(beyond.x) == result.predict(beyond)).all()
    with pytest.raises(InputError, match="NaN, infinite"):
        result.predict(stored(data) / 0)


@pytest.mark.parametrize(
    "run",
    [partial(antibackdoor.train, defense="none"), partial(antibackdoor.scan, detector="loss")],
    ids=["train", "scan"],
)
def test_numbers_of_numpy_and_devices_of_torch_are_taken(tmp_path: Path, run: Callable[..., Any]) -> None:
    given = {"epochs": np.int64(1), "seed": np.int64(3), "device": torch.device("cpu"), "out": tmp_path / "run"}
    run(toy_images(24), model="resnet18-w4", options={"recipe.min_steps": 0}, **given)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["epochs"], config["seed"]) == (1, 3)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"epochs": "1"}, "epochs must be a whole number, not str"),
        ({"epochs": 1.5}, "epochs must be a whole number, not float"),
        ({"seed": None}, "seed must be a whole number"),
        ({"device": None}, "device must be"),
        ({"options": [1]}, "options must be a dictionary"),
        ({"model": torch.relu}, "model must be the name of a model, or a torch module"),
        ({"track": "tensorboard"}, "track must be a list"),
        ({"model": nn.Linear(7, 4)}, "does not take these samples"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(432, 5))}, "gives 5 logits a sample, but the data have 4"),
        ({"data": None}, "NoneType is no data set"),
        ({"data": pd.DataFrame({"x": [1, 2]})}, "DataFrame is no data set"),
        ({"clean": 3}, "int is no data set"),
    ],
)
def test_arguments_of_another_kind_are_told_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        antibackdoor.train(**{"data": toy_images(24), **SMALL, "out": tmp_path / "run", **given})
    assert not (tmp_path / "run").exists()


def test_a_network_to_judge_with_is_a_module_that_fits(tmp_path: Path) -> None:
    for network, sentence in (("run", "network must be a torch module"), (nn.Linear(7, 4), "does not take")):
        with pytest.raises(InputError, match=sentence):
            antibackdoor.scan(toy_images(24), detector="loss", network=network, device="cpu", out=tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_scan_goes_on_only_with_the_network_that_it_began_with(tmp_path: Path) -> None:
    data = toy_images(24)
    first, second = (create("resnet18-w4", data.spec) for _ in range(2))
    scan = partial(antibackdoor.scan, data, detector="loss", device="cpu", out=tmp_path / "run")
    scan(network=first)
    written = (tmp_path / "run" / "suspects.csv").read_bytes()
    with pytest.raises(InputError, match="other data or settings"):
        scan(network=second, resume=True)
    scan(network=copy.deepcopy(first), resume=True)
    assert (tmp_path / "run" / "suspects.csv").read_bytes() == written


def test_what_is_saved_later_is_the_folder_that_out_makes(tmp_path: Path) -> None:
    data = toy_images(40)
    result = antibackdoor.train(data, **SMALL, out=tmp_path / "run")
    saved = result.save(tmp_path / "saved")
    for path in (tmp_path / "run").iterdir():
        assert (saved / path.name).exists() == (path.name != "stages")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".csv"):
            assert (saved / path.name).read_bytes() == path.read_bytes()
    assert open_session(saved, Splits(data)).data is data
    with pytest.raises(InputError, match="not empty; choose another folder"):
        antibackdoor.scan(data, detector="loss", model="resnet18-w4", epochs=1, device="cpu").save(saved)
