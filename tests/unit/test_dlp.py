"""DLP in parts: who is on which side, when unlearning stops, and what each order of stages leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from antibackdoor.bench.judge import Experiment, selection_measures, stage_measures
from antibackdoor.data.batches import gather
from antibackdoor.data.core import Truth
from antibackdoor.defenses import make_defense
from antibackdoor.defenses.dlp import DLP, Watched, two_sides
from antibackdoor.detectors import make_detector
from antibackdoor.errors import InputError
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import logits_of
from antibackdoor.training.unlearning import Ascent, Unlearn
from tiny import FABRIC, same_weights, short, train
from toy import toy_images, toy_series


def test_the_poisoned_side_is_overall_and_the_clean_side_by_class() -> None:
    scores = torch.tensor([9.0, 8, 7, 1, 2, 3, 6, 0])
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    poisoned, clean = two_sides(scores, torch.zeros(8), y, 3, 2)
    assert poisoned.tolist() == [0, 1, 2]
    assert sorted(clean.tolist()) == [3, 4, 7]  # of class 0 only one is left; 4 and 7 are the lowest of class 1


def test_equal_scores_are_ordered_by_loss_and_then_by_row() -> None:
    scores, loss = torch.zeros(6), torch.tensor([3.0, 1, 2, 1, 5, 4])
    poisoned, clean = two_sides(scores, loss, torch.zeros(6, dtype=torch.long), 3, 2)
    assert poisoned.tolist() == [1, 3, 2] and sorted(clean.tolist()) == [4, 5]


def test_a_class_gives_half_at_most_and_nothing_where_all_is_poisoned() -> None:
    scores = torch.tensor([5.0, 4, 3, 2, 1, 0, -1])
    y = torch.tensor([2, 2, 0, 0, 0, 0, 0])
    poisoned, clean = two_sides(scores, torch.zeros(7), y, 2, 100)
    assert poisoned.tolist() == [0, 1] and sorted(clean.tolist()) == [4, 5, 6]


@pytest.mark.parametrize(("n", "rate", "sizes"), [(40, 0.01, (8, 4 * 5)), (200, 0.2, (40, 40))])
def test_counts_have_floors(n: int, rate: float, sizes: tuple[int, int]) -> None:
    job = Job(toy_images(n), model="resnet18-w4", fabric=FABRIC)
    method = DLP(filter_rate=rate, clean_floor=5 if rate < 0.1 else 4)
    sides = method.split(job, job.model(), Watched(n, "entropy"))
    assert (len(sides["poisoned"]), len(sides["clean"])) == sizes
    assert not set(sides["poisoned"].tolist()) & set(sides["clean"].tolist())


@pytest.mark.parametrize("filter_by", ["entropy", "loss"])
def test_the_filter_by_hand(filter_by: str) -> None:
    data = toy_series(60)
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    model = job.model()
    p = logits_of(model, job.data, FABRIC).double().softmax(1)
    want = {"entropy": (p * p.log()).sum(1), "loss": p[torch.arange(60), data.y].log()}[filter_by]
    sides = DLP(filter=filter_by, look="end").split(job, model, Watched(60, filter_by))
    torch.testing.assert_close(sides["scores"], want)


@pytest.mark.parametrize("filter_by", ["activation_clustering", "spectral_signatures"])
@pytest.mark.parametrize("look", ["end", "epochs"])
def test_a_filter_on_features_scores_as_the_detector_of_that_name(filter_by: Any, look: Any) -> None:
    data = toy_series(60)
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    model = job.model()
    sides = DLP(filter=filter_by, look=look, poisoned_floor=6).split(job, model, Watched(60, filter_by))
    want = make_detector(filter_by).run(Job(data, fabric=FABRIC), model).scores
    assert want.unique().numel() > 50 and torch.equal(sides["scores"], want)
    assert set(sides["poisoned"].tolist()) == set(want.topk(6).indices.tolist())


def test_features_that_are_not_finite_are_told() -> None:
    job = Job(toy_images(20), model="resnet18-w4", fabric=FABRIC)
    model = job.model()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        DLP(filter="activation_clustering").split(job, model, Watched(20, "loss"))


def test_epochs_are_averaged_in_logarithms() -> None:
    job = Job(toy_images(4, size=4), model="resnet18-w4", fabric=FABRIC)
    watched, model = Watched(4, "entropy"), job.model()
    values = torch.tensor([[0.5, 0.1, 0.0, 1.0], [0.5, 0.9, 0.0, 1.0]])
    for epoch, entropy in enumerate(values):
        watched.after_epoch(model, epoch, {"entropy": entropy, "main": torch.zeros(4)})
    scores = DLP().split(job, model, watched)["scores"]
    torch.testing.assert_close(scores, -(values.double() + 0.01).log().mean(0))
    step = watched(model, gather(job.data, torch.arange(4), FABRIC.device))
    p = model(gather(job.data, torch.arange(4), FABRIC.device).x).softmax(1)
    torch.testing.assert_close(step.records["entropy"], -(p * p.log()).sum(1))
    torch.testing.assert_close(step.loss, -p[torch.arange(4), job.data.y].log().mean())


def climber(rate: float, n: int = 24, **guards: Any) -> tuple[nn.Module, Unlearn, Job, Ascent]:
    """A network that has learned the toy images, about to unlearn the first 8."""
    job = Job(toy_images(n), model="resnet18-w4", fabric=FABRIC)
    model = job.model()
    job.fit("learning", model, CrossEntropy(), Recipe(epochs=4, min_steps=20, augment="none"))
    return model, Unlearn(**guards), job, Ascent(learning_rate=rate, epochs=3, min_steps=0)


def test_unlearning_raises_the_loss_and_leaves_batch_statistics_alone() -> None:
    rows = torch.arange(8)
    for guarded in (True, False):
        model, climb, job, recipe = climber(1e-3, guarded=guarded)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        job.fit("unlearning", model, climb, recipe, rows=rows)
        after = model.state_dict()
        kept = [torch.equal(before[name], after[name]) for name in before if "running" in name]
        assert all(kept) if guarded else not any(kept)
        loss = [row["unlearned"] for row in job.history if row["stage"] == "unlearning"]
        assert loss == sorted(loss) and loss[-1] > loss[0]


def test_a_gradient_is_clipped_when_guarded() -> None:
    norms = []
    for guarded in (True, False):
        model, climb, job, _ = climber(1e-3, guarded=guarded, clip=1e-3)
        climb(model, gather(job.data, torch.arange(8), FABRIC.device)).loss.backward()
        climb.before_step(model)
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))
    assert norms[0] == pytest.approx(1e-3, rel=0.01) and norms[1] > 0.01


@pytest.mark.parametrize(("guarded", "hits", "ends"), [(True, 1, True), (True, 2, False), (False, 0, False)])
def test_the_stop_rule(guarded: bool, hits: int, ends: bool) -> None:
    hit = torch.full((20,), torch.nan)
    hit[:8] = (torch.arange(8) < hits).float()
    climb = Unlearn(guarded=guarded, enough=1 / 8)  # half of chance among four classes
    numbers = climb.after_epoch(nn.Linear(1, 1), 1, {"hit": hit, "unlearned": hit})
    assert climb.finished is ends and numbers["still_as_labeled"] == hits / 8


@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_not_finite_is_taken_back(guarded: bool) -> None:
    model, climb, job, recipe = climber(1e-4, guarded=guarded)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def ruin(model: nn.Module) -> None:
        next(model.parameters()).data.fill_(torch.inf)

    climb.after_step = ruin  # type: ignore[method-assign]
    job.fit("unlearning", model, climb, recipe, rows=torch.arange(8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    rows = [row for row in job.history if row["stage"] == "unlearning"]
    assert len(rows) == 1 and rows[0]["rolled_back"] == 1


def test_a_literal_run_at_a_huge_rate_ends_finite_and_resumes(tmp_path: Path) -> None:
    options = {**short("dlp", 4), "order": "sl-au", "guards": "literal", "unlearning.learning_rate": 1e30}
    outcome, job = train(toy_series(48), "dlp", options, folder=tmp_path)
    assert all(value.isfinite().all() for value in outcome.model.state_dict().values())
    assert [row["rolled_back"] for row in job.history if "rolled_back" in row] == [1]
    assert same_weights(outcome.model, train(toy_series(48), "dlp", options, folder=tmp_path)[0].model)


def test_few_samples_are_one_batch_and_get_their_steps() -> None:
    def plan(n: int, **numbers: int) -> tuple[int, int, int]:
        recipe = Ascent(**numbers)
        return recipe.batch_for(n), recipe.passes_for(n), recipe.epochs_for(n)

    assert plan(8) == (128, 4, 100) and plan(500) == (128, 1, 100)
    assert plan(500, min_steps=0) == (128, 1, 20)  # the paper's


ORDERS = ["sl-au-assft", "sl-au", "sl-assft", "sl-assft-au"]


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: str) -> None:
    data, test = toy_images(48), toy_images(24, seed=1)
    outcome, job = train(data, "dlp", {**short("dlp", 1), "order": order})
    assert list(outcome.stages) == order.upper().split("-")
    names = {"sl": "supervised", "au": "unlearning", "assft": "fine-tuning"}
    assert [row["stage"] for row in job.history] == [names[stage] for stage in order.split("-")]
    last = list(outcome.stages.values())[-1]
    assert all(torch.equal(value, last[name]) for name, value in outcome.model.state_dict().items())
    targets = torch.zeros(len(test), dtype=torch.long)
    truth = Truth(torch.zeros(48, dtype=torch.bool), torch.zeros(48, dtype=torch.bool), data.y, torch.zeros(48))
    measured = stage_measures(outcome, test, Experiment(truth, test, targets), FABRIC)
    assert list(measured) == list(outcome.stages)
    assert {"clean_accuracy", "attack_success_rate"} <= measured["SL"].keys()
    assert stage_measures(outcome, test, None, FABRIC)["SL"]["clean_accuracy"] == measured["SL"]["clean_accuracy"]


def test_the_poisoned_side_may_be_left_out_of_the_pool() -> None:
    data = toy_images(48)
    seen = []
    for keep in (True, False):
        options = {"keep_poisoned_side": keep, "tuning.ratio": 1, "filter_rate": 0.4}
        _, job = train(data, "dlp", {**short("dlp", 1), **options})
        seen.append([row["steps"] for row in job.history if row["stage"] == "fine-tuning"])
    assert seen == [[2], [1]]  # the poisoned side has 19 samples, a batch 16


def test_selections_are_measured() -> None:
    y = torch.tensor([0, 0, 1, 1])
    truth = Truth(torch.tensor([True, False, False, False]), torch.zeros(4, dtype=torch.bool), y.flip(0), y)
    measures = selection_measures(torch.tensor([True, False, True, True]), y, truth)
    assert measures["poisoned"] == {"value": 1 / 3, "count": 1, "n": 3} and measures["labels_true"]["count"] == 0


def test_the_paper_profile_is_literal() -> None:
    paper = make_defense("dlp:paper")
    assert isinstance(paper, DLP)
    assert (paper.guards, paper.supervised.epochs, paper.unlearning.epochs) == ("literal", 10, 20)
    assert (paper.supervised.learning_rate, paper.unlearning.learning_rate, paper.filter_rate) == (0.01, 0.01, 0.01)
