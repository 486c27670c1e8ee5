"""The loop, its schedule, the job, and the loss of E2ABL by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather, shuffled
from antibackdoor.data.core import Data, Spec
from antibackdoor.defenses import Partition
from antibackdoor.defenses.dual_head import Dual
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.defenses.trap import Trap
from antibackdoor.errors import InputError
from antibackdoor.files import load_state, save_state
from antibackdoor.models import create
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Fit, Progress, Recipe
from antibackdoor.training.objectives import Augment, CrossEntropy, Objective, Step
from antibackdoor.training.scores import entropies, logits_of, losses
from tiny import FABRIC
from toy import toy_images, toy_series


class Watcher(Objective):
    """Trains one number towards 1 and notes every batch."""

    def __init__(self, loss: float = 1.0):
        self.loss, self.batches, self.records = loss, [], []  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        self.batches.append(batch.rows.tolist())
        weight = next(model.parameters())
        return Step(((weight - 1) ** 2).sum() * self.loss, {"seen": batch.rows.float()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        self.records.append(records["seen"].clone())
        return {"main_loss": self.loss}


def fit(objective: Objective, *, n: int = 50, rows: Tensor | None = None, **recipe: object) -> Fit:
    settings = {"epochs": 2, "min_steps": 0, "batch_size": 8, "augment": "none", **recipe}
    return Fit("stage", nn.Linear(1, 1), objective, toy_images(n), Recipe(**settings), rows=rows, fabric=FABRIC)


def run(stage: Fit) -> list[dict[str, object]]:
    return [stage.run_epoch(Progress()) for _ in range(stage.epochs)]


def ordered(batches: list[list[int]]) -> list[int]:
    return sorted(chain.from_iterable(batches))


def test_every_row_once_an_epoch_in_another_order_each_time() -> None:
    watcher = Watcher()
    stage = fit(watcher)
    history = run(stage)
    first, second = watcher.batches[: stage.steps], watcher.batches[stage.steps :]
    assert ordered(first) == ordered(second) == list(range(50)) and first != second
    assert {len(batch) for batch in first} == {7, 8}
    assert [row["steps"] for row in history] == [stage.steps, 2 * stage.steps]
    assert torch.equal(watcher.records[0], torch.arange(50.0))


def test_only_the_given_rows_are_trained_on() -> None:
    watcher, rows = Watcher(), torch.tensor([3, 30, 31, 49])
    run(fit(watcher, rows=rows, epochs=1))
    assert ordered(watcher.batches) == rows.tolist()
    assert watcher.records[0].isnan().sum() == 46
    with pytest.raises(InputError, match="no samples are left for the stage 'stage'"):
        fit(watcher, rows=torch.tensor([], dtype=torch.int64))


def test_the_global_random_state_does_not_matter() -> None:
    first, second = Watcher(), Watcher()
    torch.manual_seed(0)
    run(fit(first))
    torch.seed()
    run(fit(second))
    assert first.batches == second.batches


def test_divergence_is_told() -> None:
    with pytest.raises(InputError, match="diverged in stage 'stage', epoch 1"):
        run(fit(Watcher(loss=math.inf)))


def test_hooks_come_in_order_and_gradients_may_be_changed() -> None:
    calls: list[str] = []

    class Hooked(Watcher):
        def prepare(self, plain: Batch, augment: Augment, rng: torch.Generator) -> Batch:
            calls.append("prepare")
            return augment(plain, rng)

        def before_epoch(self, model: nn.Module, epoch: int) -> None:
            calls.append(f"epoch {epoch}")
            assert model.training

        def before_step(self, model: nn.Module) -> None:
            calls.append("before")
            for parameter in model.parameters():
                parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)

        def after_step(self, model: nn.Module) -> None:
            calls.append("after")

    stage = fit(Hooked(), n=8, epochs=2, weight_decay=0)
    weights = [p.detach().clone() for p in stage.model.parameters()]
    run(stage)
    one = ["prepare", "before", "after"]
    assert calls == ["epoch 0", *one, "epoch 1", *one]
    assert all(torch.equal(p, q) for p, q in zip(weights, stage.model.parameters(), strict=True))


def test_a_stage_that_needs_no_more_stays_ended(tmp_path: Path) -> None:
    class Enough(Watcher):
        def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
            self.finished = epoch == 3
            return {}

    recipe = Recipe(epochs=9, min_steps=0, augment="none")
    for _ in range(2):
        job = Job(toy_images(20), model=nn.Linear(1, 1), fabric=FABRIC, folder=tmp_path)
        job.fit("stage", job.model(), Enough(), recipe)
        assert [row["epoch"] for row in job.history] == [1, 2, 3]


@pytest.mark.parametrize(("n", "size"), [(2, 2), (3, 2), (5, 2), (33, 16), (129, 128), (64, 16)])
def test_no_batch_of_one(n: int, size: int) -> None:
    data = toy_images(n)
    batches = list(shuffled(data, torch.arange(n), size, torch.Generator().manual_seed(0), torch.device("cpu")))
    assert min(len(batch.rows) for batch in batches) >= 2
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(n))
    assert all(torch.equal(batch.y, data.y[batch.rows]) for batch in batches)


def test_batch_sizes_and_epochs_for_small_sets() -> None:
    recipe = Recipe(epochs=12, min_steps=400, batch_size=128)
    assert [recipe.batch_for(n) for n in (10, 320, 500, 2560, 50_000)] == [16, 16, 25, 128, 128]
    assert recipe.epochs_for(50_000) == 12
    assert recipe.epochs_for(500) == 20  # 20 batches of 25
    assert recipe.epochs_for(10) == 400
    assert Recipe(epochs=3, min_steps=0).epochs_for(10) == 3


def test_schedules() -> None:
    cosine, constant = Recipe(schedule="cosine"), Recipe(schedule="constant")
    assert [round(cosine.factor(done), 6) for done in (0, 0.25, 0.5, 1)] == [1, 0.853553, 0.5, 0]
    assert [constant.factor(done) for done in (0, 0.5, 1)] == [1, 1, 1]


def test_learning_rates_by_group_and_step() -> None:
    rates: list[list[float]] = []

    class Noting(Watcher):
        def __call__(self, model: nn.Module, batch: Batch) -> Step:
            rates.append([group["lr"] for group in stage.optimizer.param_groups])
            return super().__call__(model, batch)

    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "learning_rate": 0.5}]
    recipe = Recipe(epochs=2, min_steps=0, batch_size=25, learning_rate=0.1, augment="none")
    stage = Fit("s", model, Noting(), toy_images(50), recipe, parameters=groups, fabric=FABRIC)
    run(stage)
    factors = [recipe.factor(step / len(rates)) for step in range(len(rates))]
    assert len(rates) == 2 * stage.steps
    assert rates == [[pytest.approx(0.1 * f), pytest.approx(0.5 * f)] for f in factors]
    assert "learning_rate" in groups[1], "the caller's groups were changed"


def test_cross_entropy_records_each_sample() -> None:
    data = toy_images(6, size=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    batch = gather(data, torch.tensor([4, 1, 3]), torch.device("cpu"))
    step = CrossEntropy()(model, batch)
    by_hand = -model(batch.x).log_softmax(1)[torch.arange(3), batch.y]
    torch.testing.assert_close(step.records["main"], by_hand.detach())
    torch.testing.assert_close(step.loss, by_hand.mean())


def test_losses_and_entropies_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [1000.0, 0.0]])
    assert losses(logits, torch.tensor([1, 0])).tolist() == pytest.approx([-math.log(0.75), 0])
    mixed = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropies(logits).tolist() == pytest.approx([mixed, 0])


def test_scoring_leaves_the_mode_alone_and_does_not_depend_on_the_batch() -> None:
    data = toy_series(10, unequal=True)
    model = create("resnet18-w4", data.spec).train()
    whole = logits_of(model, data, FABRIC)
    assert model.training and whole.shape == (10, 3)
    rows = torch.tensor([7, 2, 2])
    torch.testing.assert_close(logits_of(model, data, FABRIC, rows, size=2), whole[rows])
    assert logits_of(model, data, FABRIC, rows[:0]).shape == (0, 3)


class Scene:
    """E2ABL's dual objective on eight samples: 0-3 clean, 4-7 isolated, of which 6 and 7 are recovered as class 2."""

    isolated = torch.tensor([False] * 4 + [True] * 4)
    recovered = torch.tensor([False] * 6 + [True] * 2)

    def __init__(self, kind: str, **options: object):
        data = toy_images(8) if kind == "image" else toy_series(8, classes=4)
        job = Job(data, model="resnet18-w4", fabric=FABRIC)
        self.model = job.model()
        self.batch = gather(data, torch.tensor([5, 0, 7, 2, 6, 1]), torch.device("cpu"))
        self.tap = Tap(self.model, None, 4, self.batch.x).eval()
        method = E2ABL(recovery_delay=0, **options)
        self.dual = Dual(method, job, Trap(method, job))
        self.labels = torch.where(self.recovered, 2, data.y)
        self.dual._set(Partition(0, self.isolated, self.recovered, self.labels))
        for module in self.tap.modules():  # statistics that differ from what a fresh network has
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]

    def cross_entropies(self) -> tuple[Tensor, Tensor]:
        """Of the main head with the labels to learn, and of the second with the labels given: `(6,)` each."""
        with torch.no_grad():
            first, second = self.model(self.batch.x), self.tap.shallow(self.batch.x)
        places = torch.arange(6)
        main = -first.log_softmax(1)[places, self.labels[self.batch.rows]]
        return main, -second.log_softmax(1)[places, self.batch.y]


@pytest.mark.parametrize("kind", ["image", "series"])
@pytest.mark.parametrize(("control", "sign"), [("recover", 1), ("unlearn", -1), ("nothing", 0)])
def test_dual_loss_is_equation_4(kind: str, control: str, sign: int) -> None:
    scene = Scene(kind, control=control)
    main, second = scene.cross_entropies()
    # rows 5, 0, 7, 2, 6, 1: D_c holds places 1, 3, 5; D_p places 0, 2, 4; D* places 2, 4
    want = main[[1, 3, 5]].sum() + second[[0, 2, 4]].sum() + sign * main[[2, 4]].sum()
    step = scene.dual(scene.tap, scene.batch)
    torch.testing.assert_close(step.loss, want / 6)
    torch.testing.assert_close(step.records["second"], second)
    assert step.records["main"].isnan().tolist() == [
        True,
        False,
        control == "nothing",
        False,
        control == "nothing",
        False,
    ]


@pytest.mark.parametrize(("gradient", "reaches"), [("shared", True), ("detached", False)])
def test_whether_the_second_head_moves_the_shallow_layers(gradient: str, reaches: bool) -> None:
    scene = Scene("image", control="nothing", stem_gradient=gradient)
    isolated = gather(scene.dual.job.data, torch.tensor([4, 5]), torch.device("cpu"))
    scene.dual(scene.tap, isolated).loss.backward()
    stem = [p for name, p in scene.model.named_parameters() if name in scene.tap._stem]
    assert len(stem) > 3 and all((p.grad is not None and bool(p.grad.any())) == reaches for p in stem)
    assert all(p.grad is not None for p in scene.tap.head.parameters())


def test_the_warm_up_is_cross_entropy_of_the_second_head() -> None:
    scene = Scene("image")
    _, second = scene.cross_entropies()
    step = scene.dual.trap(scene.tap, scene.batch)
    torch.testing.assert_close(step.loss, second.mean())
    torch.testing.assert_close(step.records["second"], second)


def test_dual_training_goes_on_from_its_state(tmp_path: Path) -> None:
    one, two = Scene("image"), Scene("image")
    one.dual.backdoor_class, one.dual.asked, one.dual.rest = 3, torch.arange(8), (2, 5)
    one.dual._set(Partition(1, ~Scene.isolated, Scene.recovered, one.labels))
    one.dual._set(Partition(2, ~Scene.isolated, ~Scene.recovered, one.labels.flip(0), torch.arange(8.0)))
    one.dual.trap.ranking.add(torch.arange(8.0))
    save_state(tmp_path / "state", one.dual.state())
    two.dual.load(load_state(tmp_path / "state"))
    for name in ("asked", "in_main", "labels", "isolated", "sign"):
        assert torch.equal(getattr(two.dual, name), getattr(one.dual, name)), name
    assert two.dual.backdoor_class == 3 and tuple(two.dual.rest) == (2, 5)
    assert [p.epoch for p in two.dual.partitions] == [0, 1, 2]
    assert [p.scores is None for p in two.dual.partitions[:2]] == [True, True]
    assert two.dual.partitions[2].scores is not None and two.dual.partitions[2].scores.tolist() == [*range(8)]
    assert torch.equal(two.dual.trap.ranking.scores(), one.dual.trap.ranking.scores())


@pytest.mark.parametrize("kind", ["image", "series"])
def test_isolated_rows_do_not_touch_the_deep_part(kind: str) -> None:
    scene = Scene(kind, control="nothing")
    deep = [module for name in ("layer3", "layer4") for module in scene.model.get_submodule(name).modules()]
    norms = [module for module in deep if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.train()
    before = [module.running_mean.clone() for module in norms]  # type: ignore[union-attr]

    def statistics(x: Tensor) -> list[Tensor]:
        for module, mean in zip(norms, before, strict=True):
            module.running_mean.copy_(mean)  # type: ignore[union-attr]
        scene.dual(scene.tap, Batch(x, scene.batch.y, scene.batch.rows, None)).loss.backward()
        return [module.running_mean.clone() for module in norms]  # type: ignore[union-attr]

    hostile = scene.batch.x.clone()
    hostile[scene.isolated[scene.batch.rows]] = 1e3
    plain, attacked = statistics(scene.batch.x), statistics(hostile)
    assert all(torch.equal(one, two) for one, two in zip(plain, attacked, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(plain, before, strict=True))


def test_dual_training_of_a_batch_that_is_isolated_as_a_whole() -> None:
    scene = Scene("image", control="nothing")
    batch = gather(scene.dual.job.data, torch.tensor([4, 5]), torch.device("cpu"))
    step = scene.dual(scene.tap.train(), batch)
    step.loss.backward()
    assert step.loss.isfinite() and scene.model.fc.weight.grad is None and step.records["main"].isnan().all()


@pytest.mark.parametrize("rows", [[0, 4, 5], [4, 5]])
def test_one_or_no_main_row_on_a_single_pixel_map(rows: list[int]) -> None:
    data = toy_images(8, size=4)  # one pixel is left behind layer3
    method = E2ABL(control="nothing")
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    batch = gather(data, torch.tensor(rows), torch.device("cpu"))
    tap, dual = Tap(job.model(), None, 4, batch.x), Dual(method, job, Trap(method, job))
    dual._set(Partition(0, Scene.isolated, Scene.recovered, data.y))
    assert dual(tap.train(), batch).loss.isfinite()


def test_a_stage_name_is_used_once(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        job = Job(toy_images(8), model="resnet18-w4", fabric=FABRIC, folder=folder)
        job.keep("same", lambda: 1)
        with pytest.raises(RuntimeError, match="'same' is used twice"):
            job.keep("same", lambda: 2)


def test_what_is_kept_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, Tensor]:
        calls.append(1)
        return {"x": torch.arange(3)}

    first, second = (Job(toy_images(8), fabric=FABRIC, folder=tmp_path).keep("x", make) for _ in range(2))
    assert len(calls) == 1 and torch.equal(first["x"], second["x"])


def test_a_model_depends_on_the_seed_and_normalizes_by_the_data() -> None:
    data = toy_series(40, unequal=True)
    one, two, other = (Job(data, model="resnet18-w4", seed=seed, fabric=FABRIC).model() for seed in (0, 0, 1))
    assert torch.equal(one.fc.weight, two.fc.weight) and not torch.equal(one.fc.weight, other.fc.weight)
    assert data.lengths is not None
    valid = (torch.arange(40) < data.lengths[:, None]).flatten()
    x = data.x[torch.arange(40)].transpose(0, 1).flatten(1)[:, valid]
    torch.testing.assert_close(one.normalize.mean.flatten(), x.mean(1))
    torch.testing.assert_close(one.normalize.std.flatten(), x.std(1, correction=0))


def test_a_module_of_ones_own_is_copied() -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 4))
    job = Job(toy_images(8), model=own, fabric=FABRIC)
    job.fit("training", model := job.model(), CrossEntropy(), Recipe(epochs=1, min_steps=0))
    assert not torch.equal(own[1].weight, model[1].weight)


def test_a_constant_channel_keeps_its_scale_and_a_small_one_gets_its_own() -> None:
    x = toy_series(40, channels=3, length=3000).x[torch.arange(40)]
    x[:, 0], x[:, 1], x[:, 2] = 0.3, 0.0, 1e-9 * x[:, 2]  # a mean of 0.3 that is rounded, and volts
    data = Data(x, torch.arange(40) % 2, Spec("series", (3, 3000), ("a", "b"), -2, 2), [str(k) for k in range(40)])
    model = Job(data, model="resnet18-w4", fabric=FABRIC).model().eval()
    dead, empty, small = model.normalize.std.flatten().tolist()
    assert dead == empty == 1 and math.isclose(small, float(x[:, 2].std(correction=0)), rel_tol=1e-3)
    assert model(x[:4]).isfinite().all()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:", "cpu:0", "cpu:1", "auto:0", "cuda:-1"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(InputError, match="unknown device"):
        make_fabric(device)


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("mps", 0), ("mps:1", 1)])
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, device: str, count: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: bool(count))
    with pytest.raises(InputError, match=f"there is no device '{device}' here"):
        make_fabric(device)


def test_a_precision_is_no_line_on_stderr() -> None:
    """A failed command says one sentence there, whatever the processor computes in."""
    words = 'from antibackdoor.training.job import make_fabric; make_fabric("cpu", "bf16-mixed")'
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""
