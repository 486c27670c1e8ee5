"""Several devices do what one does: the same batches, losses, partitions and, up to rounding, weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data
from antibackdoor.defenses import DEFENSES, make_defense
from antibackdoor.models import create
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy, forward
from antibackdoor.training.scores import features_of, logits_of
from antibackdoor.training.team import Split, scored, shared_out
from ranks import fine_numbers, on_devices
from tiny import FABRIC, clean_for, short
from toy import toy_images, toy_series

MODEL = "resnet18-w4"
PHOTOS, SERIES = toy_images(41), toy_series(50, unequal=True)  # made in float32, as all data


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with fine_numbers():
        yield


def trained(name: str, data: Data, fabric: Fabric, epochs: int = 2) -> dict[str, Any]:
    """All that a defense found, as arrays, and how often a network saw a share of its batch."""
    shares = 0
    before = Split._before

    def counted(split: Split, *given: Any) -> Any:
        nonlocal shares
        found = before(split, *given)
        shares += found is not None
        return found

    Split._before = counted  # type: ignore[method-assign]
    try:
        job = Job(data, model=MODEL, fabric=fabric, extras=clean_for(data, name))
        outcome = make_defense(name, short(name, epochs)).run(job)
    finally:
        Split._before = before  # type: ignore[method-assign]
    return {
        "weights": {key: value.numpy() for key, value in outcome.model.state_dict().items()},
        "history": [{key: value for key, value in row.items() if key != "seconds"} for row in job.history],
        "partitions": [
            [p.epoch, p.isolated.numpy(), p.recovered.numpy(), p.labels.numpy()] for p in outcome.partitions
        ],
        "flagged": outcome.flagged.numpy(),
        "scores": outcome.scores.numpy(),
        "shares": shares,
    }


def check_same(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    """Partitions and flags exactly, weights and losses up to rounding; all devices have the same bits."""
    for found in several:
        assert len(found["partitions"]) == len(one["partitions"])
        for mine, theirs in zip(one["partitions"], found["partitions"], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert np.array_equal(one["flagged"], found["flagged"])
        np.testing.assert_allclose(found["scores"], one["scores"], rtol=1e-6, atol=1e-6)  # kept in float32
        for mine, theirs in zip(one["history"], found["history"], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(mine[k] == theirs[k] or mine[k] == pytest.approx(theirs[k], rel=1e-6) for k in mine)
        for name, value in one["weights"].items():
            np.testing.assert_allclose(found["weights"][name], value, rtol=1e-6, atol=1e-6, err_msg=name)
            assert np.array_equal(found["weights"][name], several[0]["weights"][name])


def test_defenses_find_the_same_on_two_devices() -> None:
    sets = {"none": PHOTOS, "e2abl": PHOTOS}

    def run(fabric: Fabric) -> dict[str, Any]:
        return {name: trained(name, data, fabric) for name, data in sets.items()}

    one, two = run(FABRIC), on_devices(run)
    for name in sets:
        check_same(one[name], [found[name] for found in two])
        assert all(found[name]["shares"] == two[0][name]["shares"] > 0 for found in two) and not one[name]["shares"]


@pytest.mark.slow
@pytest.mark.parametrize("data", [PHOTOS, SERIES], ids=["photos", "unequal series"])
@pytest.mark.parametrize("name", [*(entry.name for entry in DEFENSES), "e2abl:paper", "abl:code"])
def test_so_does_every_defense(name: str, data: Data) -> None:
    check_same(trained(name, data, FABRIC), on_devices(lambda fabric: trained(name, data, fabric)))


class Drop(nn.Module):
    """Noise that differs from sample to sample."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) * self.scale


def pieces(fabric: Fabric) -> dict[str, Any]:
    """Small questions about one device of three, or about the only one."""
    found: dict[str, Any] = {}
    data = SERIES
    model = create("resnet18-w4", data.spec)
    for n in (2, 7, 50):  # rows: fewer than devices x batches, and not divisible by them
        rows = torch.arange(n).flip(0)
        answer = torch.cat(list(scored(lambda batch: batch.rows[:, None].float(), data, rows, 4, fabric)))
        found[f"rows {n}"] = answer.flatten().tolist()
    torch.manual_seed(0)
    found["logits"] = logits_of(model, data, fabric, torch.arange(13), size=4).numpy()
    found["features"] = features_of(model, data, fabric, size=7).numpy()
    batch = next(iter_batches(data, 11))
    for count in (11, 5):  # with five samples, a share would have less than two
        x, lengths = batch.x[:count].requires_grad_(), batch.lengths
        assert lengths is not None
        with shared_out(model, fabric)():
            out = model.train()(x, lengths[:count])
            slope = torch.autograd.grad((out**2).mean(), x)[0]
        found[f"slope {count}"] = slope.numpy()
    tap = Tap(create("resnet18-w4", data.spec), None, 3, batch.x[:2], batch.lengths[:2])  # type: ignore[index]
    for used in (0, 1, 6, 8):
        with shared_out(tap, fabric)():
            main, second = tap.train()(batch.x, batch.lengths, main=torch.arange(11) >= 11 - used)
        found[f"tap {used}"] = main.detach().numpy(), second.detach().numpy()
    found["statistics"] = {name: value.numpy() for name, value in tap.state_dict().items() if "running" in name}
    drop = Drop()
    with shared_out(drop, fabric)():
        first, again = drop(torch.ones(12, 8)), drop(torch.ones(12, 8))
    found["dropped"], found["dropped again"] = first.tolist(), again.tolist()
    return found


def iter_batches(data: Data, size: int) -> Iterator[Batch]:
    rows = torch.arange(size)
    yield Batch(
        data.spec.decode(data.x[rows]), data.y[rows], rows, None if data.lengths is None else data.lengths[rows]
    )


def test_what_is_split_and_what_is_gathered() -> None:
    torch.manual_seed(0)
    one = pieces(FABRIC)
    torch.manual_seed(0)
    three = on_devices(pieces, 3)
    for n in (2, 7, 50):
        assert all(found[f"rows {n}"] == list(range(n))[::-1] for found in three)
    for found in three:
        assert np.array_equal(found["logits"], one["logits"]) and np.array_equal(found["features"], one["features"])
        for count in (11, 5):  # the mean over devices, of which each knows the slope of its own samples
            np.testing.assert_allclose(found[f"slope {count}"], one[f"slope {count}"], atol=1e-12)
        for used in (0, 1, 6, 8):
            for mine, theirs in zip(one[f"tap {used}"], found[f"tap {used}"], strict=True):
                np.testing.assert_allclose(theirs, mine, atol=1e-9)
        for name, value in one["statistics"].items():
            np.testing.assert_allclose(found["statistics"][name], value, rtol=1e-9, err_msg=name)
        dropped = found["dropped"]
        assert dropped == three[0]["dropped"] != found["dropped again"]
        assert dropped[:4] != dropped[4:8] != dropped[8:]  # no two devices drop the same


class Cut(Exception):
    """In place of a power failure."""


def resumed(folder: Path, fabric: Fabric) -> dict[str, np.ndarray]:
    """A run that is cut within its second stage, and goes on; only the first device has a folder."""
    data = PHOTOS

    def run(progress: Progress) -> Job:
        own = folder if fabric.global_rank == 0 else None
        job = Job(data, model=MODEL, fabric=fabric, folder=own, progress=progress)
        job.checkpoint_seconds = -1.0
        model = job.model()
        job.fit("first", model, CrossEntropy(), Recipe(epochs=1, min_steps=0))
        kept = job.keep("kept", lambda: {"sum": float(logits_of(model, data, fabric).sum())})
        job.fit("second", model, CrossEntropy(), Recipe(epochs=3, min_steps=0))
        ends.append({"kept": np.array(kept["sum"]), **{k: v.numpy() for k, v in model.state_dict().items()}})
        return job

    ends: list[dict[str, np.ndarray]] = []

    def cut(row: dict[str, Any]) -> None:
        if row["stage"] == "second" and row["epoch"] == 2:
            raise Cut

    try:
        run(Progress(epoch=cut))
    except Cut:
        torch.seed()
        assert [row["epoch"] for row in run(Progress()).history] == [1, 1, 2, 3]
    return ends[0]


def test_a_run_on_two_devices_resumes_to_the_weights_of_one(tmp_path: Path) -> None:
    two = on_devices(lambda fabric: resumed(tmp_path, fabric))
    one = resumed(tmp_path / "alone", FABRIC)
    for name, value in one.items():
        assert np.array_equal(two[0][name], two[1][name])
        np.testing.assert_allclose(two[0][name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_hooks_of_an_objective_see_the_whole_batch() -> None:
    data = PHOTOS

    def seen(fabric: Fabric) -> int:
        sizes: list[int] = []
        model = create(MODEL, data.spec)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        batch = next(iter_batches(data, 16))
        with shared_out(model, fabric)():
            handle = last.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
            assert len(forward(model, batch)) == 16
            handle.remove()
            assert len(forward(model, batch)) == 16
        return sizes[0]

    assert on_devices(seen) == [16, 16]
