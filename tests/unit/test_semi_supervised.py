"""FixMatch by hand: what is labeled, what counts, what is averaged; and that a cut run ends with the same weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather
from antibackdoor.data.core import Data
from antibackdoor.errors import InputError
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress, Recipe
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import logits_of
from antibackdoor.training.semi_supervised import Average, FixMatch, SemiSupervised, semi_supervised
from tiny import FABRIC, same_weights
from toy import toy_images, toy_series

SHORT = SemiSupervised(epochs=4, min_steps=0, ratio=2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fixed(nn.Module):
    """Logits are the first values of a sample, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x[:, 0, :3]


def batch_of(known: Tensor, easy: Tensor, hard: Tensor, y: Tensor) -> Batch:
    return Batch(torch.cat([known, easy, hard])[:, None], y, torch.arange(len(easy)), None)


@pytest.mark.parametrize("joint", [True, False])
def test_loss_and_mask_by_hand(joint: bool) -> None:
    p = torch.tensor([[0.96, 0.03, 0.01], [0.2, 0.5, 0.3], [0.01, 0.95, 0.04], [0.05, 0.94, 0.01]])
    hard = torch.tensor([[1.0, 0, 0], [0, 0, 5], [0, 2, 0], [0, 0, 1]])
    known, y = torch.tensor([[0.0, 1, 0]]), torch.tensor([2])
    data, model = toy_series(8), Fixed()
    recipe = SemiSupervised(threshold=0.949, unlabeled_weight=0.5, joint=joint)
    match = FixMatch(Job(data, fabric=FABRIC), model, recipe, torch.tensor([0]))
    step = match(model, batch_of(known, p.log(), hard, y))
    each = -hard.log_softmax(1)[torch.arange(4), torch.tensor([0, 1, 1, 1])]
    labeled = -known.log_softmax(1)[0, 2]
    torch.testing.assert_close(step.loss, labeled + 0.5 * (each[0] + each[2]) / 4)  # rows 1 and 3 are not sure
    torch.testing.assert_close(step.records["unlabeled"], each)
    torch.testing.assert_close(step.records["confidence"], p.amax(1))
    assert step.records["pseudo"].tolist() == [0, 1, 1, 1]
    numbers = match.after_epoch(model, 1, step.records)
    assert numbers["confident"] == 0.5 and numbers["labeled_loss"] == pytest.approx(float(labeled))
    assert numbers["unlabeled_loss"] == pytest.approx(float(each[0] + each[2]) / 4)


def test_no_gradient_through_pseudo_labels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    easy = torch.tensor([[9.0, 0, 0]], requires_grad=True)
    match = FixMatch(Job(toy_series(8), fabric=FABRIC), model, SemiSupervised(threshold=0), torch.tensor([0]))
    match(model, batch_of(torch.zeros(1, 3), easy, torch.ones(1, 3), torch.tensor([0]))).loss.backward()
    assert easy.grad is not None and not easy.grad.any()


def test_a_temperature_sharpens_what_the_threshold_sees() -> None:
    model, easy = Fixed(), torch.tensor([[1.0, 0, 0]])
    confidence = []
    for temperature in (1.0, 0.2):
        recipe = SemiSupervised(temperature=temperature)
        match = FixMatch(Job(toy_series(8), fabric=FABRIC), model, recipe, torch.tensor([0]))
        step = match(model, batch_of(easy, easy, easy, torch.tensor([0])))
        confidence.append(float(step.records["confidence"]))
    assert confidence == pytest.approx([math.e / (math.e + 2), math.exp(5) / (math.exp(5) + 2)])


def test_views_are_labeled_weak_unlabeled_weak_unlabeled_strong() -> None:
    data = toy_images(40)
    labeled, labels = torch.tensor([3, 9, 30]), (data.y + 1) % 4
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    recipe = replace(SHORT, augment="none", operations=0, hole=0, mirror=False)
    match = FixMatch(job, job.model(), recipe, labeled, labels)
    plain = gather(job.data, torch.tensor([7, 1, 30, 5]), FABRIC.device)
    batch = match.prepare(plain, lambda b, _: b, rng())
    assert len(batch.x) == 2 + 4 + 4 and torch.equal(batch.rows, plain.rows)
    assert torch.equal(batch.x[2:6], plain.x)
    assert not torch.equal(batch.x[6:], plain.x)  # shifted at least
    known = [
        next(int(r) for r in labeled if torch.equal(gather(data, r[None], FABRIC.device).x[0], x)) for x in batch.x[:2]
    ]
    assert len(set(known)) == 2 and torch.equal(batch.y, labels[known])


def test_labeled_rows_are_drawn_evenly() -> None:
    job = Job(toy_images(40), model="resnet18-w4", fabric=FABRIC)
    match = FixMatch(job, job.model(), SHORT, torch.tensor([4, 8, 11]))
    for seed in range(5):
        drawn = match._draw(8, rng(seed)).tolist()
        assert sorted(drawn.count(row) for row in (4, 8, 11)) == [2, 3, 3]


def test_no_labeled_or_unlabeled_samples() -> None:
    job = Job(toy_images(40), model="resnet18-w4", fabric=FABRIC)
    nobody = torch.zeros(0, dtype=torch.long)
    with pytest.raises(InputError, match="at least one labeled"):
        semi_supervised(job, "a", job.model(), SHORT, nobody, torch.arange(40))
    with pytest.raises(InputError, match="no samples are left for the stage 'b'"):
        semi_supervised(job, "b", job.model(), SHORT, torch.arange(4), nobody)


def test_average_by_hand() -> None:
    model = nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(2)
        average = Average(model, 0.3)
        model.weight.fill_(5)
        model.running_mean.fill_(1)  # type: ignore[union-attr]
        model.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    average.update(model)
    first = 2 / 11  # (1 + 1) / (10 + 1) < 0.3
    assert float(average.values["weight"]) == pytest.approx(first * 2 + (1 - first) * 5)
    assert float(average.values["running_mean"]) == pytest.approx(1 - first)
    assert int(average.values["num_batches_tracked"]) == 7
    for _ in range(20):
        average.update(model)
    before = float(average.values["weight"])
    with torch.no_grad():
        model.weight.fill_(0)
    average.update(model)
    assert float(average.values["weight"]) == pytest.approx(0.3 * before)


def test_budgets() -> None:
    def plan(n: int, **numbers: Any) -> tuple[int, int, int]:
        recipe = SemiSupervised(**numbers)
        return recipe.batch_for(n), recipe.passes_for(n), recipe.epochs_for(n)

    assert plan(49_500, epochs=1, min_steps=2**13) == (448, 1, 74)  # 111 steps a pass
    assert plan(49_500, epochs=1, min_steps=2**16) == (448, 6, 99)
    assert plan(475, epochs=30, min_steps=1000) == (161, 4, 84)  # 3 steps a pass
    assert plan(100, epochs=5, min_steps=0) == (112, 1, 5)
    assert plan(100, epochs=300, min_steps=0) == (112, 1, 300)
    assert SemiSupervised().factor(1) == pytest.approx(math.cos(7 * math.pi / 16)) and SemiSupervised().factor(0) == 1


def test_an_epoch_of_several_passes_sees_every_row_as_often() -> None:
    counted = torch.zeros(40)

    class Counting(CrossEntropy):
        def __call__(self, model: nn.Module, batch: Batch) -> Any:
            counted.index_add_(0, batch.rows, torch.ones(len(batch.rows)))
            return super().__call__(model, batch)

    class Thrice(Recipe):
        def passes_for(self, n: int) -> int:
            return 3

    job = Job(toy_images(40), model="resnet18-w4", fabric=FABRIC)
    job.fit("x", job.model(), Counting(), Thrice(epochs=2, min_steps=0))
    assert counted.tolist() == [6] * 40 and [row["steps"] for row in job.history] == [9, 18]


SETS = {"image": toy_images, "unequal series": lambda n: toy_series(n, unequal=True)}


def tune(
    data: Data, folder: Path | None = None, cut: int = 99, recipe: SemiSupervised = SHORT, seed: int = 0
) -> tuple[nn.Module, FixMatch, Job]:
    """Interrupted, if at all, before the state after epoch `cut` is saved."""

    def interrupt(row: dict[str, Any]) -> None:
        if row["epoch"] == cut:
            raise KeyboardInterrupt

    job = Job(data, model="resnet18-w4", fabric=FABRIC, folder=folder, progress=Progress(epoch=interrupt), seed=seed)
    job.checkpoint_seconds = -1.0
    model = job.model()
    match = semi_supervised(job, "tuning", model, recipe, torch.arange(12), torch.arange(6, 48))
    return model, match, job


@pytest.mark.parametrize("kind", SETS)
def test_given_labels_of_unlabeled_samples_do_not_matter(kind: str) -> None:
    data, recipe = SETS[kind](48), replace(SHORT, epochs=2, threshold=0)
    other, wrong = data.y.clone(), data.y.clone()
    other[12:] = 0
    wrong[3] = (wrong[3] + 1) % 3
    model = tune(data, recipe=recipe)[0]
    assert same_weights(model, tune(replace(data, y=other), recipe=recipe)[0])
    assert not same_weights(model, tune(replace(data, y=wrong), recipe=recipe)[0])


@pytest.mark.parametrize("kind", SETS)
def test_a_run_cut_in_the_middle_ends_with_the_same_weights(kind: str, tmp_path: Path) -> None:
    data, recipe = SETS[kind](48), replace(SHORT, threshold=0.3, joint=kind == "image")
    whole, match, job = tune(data, recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        tune(data, tmp_path, 3, recipe)
    torch.seed()
    for _ in range(2):  # goes on; then finds it done
        resumed, again, second = tune(data, tmp_path, recipe=recipe)
        assert same_weights(whole, resumed)
        assert [{**row, "seconds": 0} for row in job.history] == [{**row, "seconds": 0} for row in second.history]
        assert all(torch.equal(match.seen[name].nan_to_num(-1), again.seen[name].nan_to_num(-1)) for name in match.seen)
    assert not same_weights(whole, tune(data, recipe=recipe, seed=1)[0])


def test_the_result_is_the_average_with_its_batch_statistics() -> None:
    model, match, _ = tune(toy_images(48))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in match.average.values.items())
    assert int(state["stem.norm.num_batches_tracked"]) == match.average.steps
    assert match.seen["pseudo"][:6].isnan().all() and match.seen["pseudo"][6:].isfinite().all()


def test_few_labels_and_the_rest_without_teach_the_classes() -> None:
    data, test = (toy_series(120, seed=seed) for seed in (0, 1))
    recipe = SemiSupervised(epochs=1, min_steps=50, ratio=3)
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    model = job.model()
    match = semi_supervised(job, "tuning", model, recipe, torch.arange(9), torch.arange(120))
    assert (logits_of(model, test, FABRIC).argmax(1) == test.y).float().mean() > 0.9
    assert (match.seen["pseudo"] == data.y).float().mean() > 0.9
