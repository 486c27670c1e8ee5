"""Numbers that run away: each is refused, rolled back or reported, and never a result."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from antibackdoor.api import train
from antibackdoor.data.batches import Batch, steps_per_epoch
from antibackdoor.data.core import Data, Spec, check_trainable
from antibackdoor.errors import InputError
from antibackdoor.scanning import scan
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective, Step
from antibackdoor.training.scores import logits_of
from antibackdoor.training.unlearning import Ascent, Unlearn
from toy import toy_images

CPU = make_fabric("cpu", "32-true")
SHORT = Recipe(epochs=2, min_steps=0, batch_size=16)


class Poisoned(Objective):
    """A loss that is not a number, from one sample on."""

    def __init__(self, value: float):
        self.value = value

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        losses = model(batch.x).square().mean(1)
        return Step(losses.mean() * self.value, {"main": losses.detach() * self.value})

    def after_epoch(self, model: nn.Module, epoch: int, records: dict[str, Tensor]) -> dict[str, float]:
        return {"main_loss": float(records["main"].mean())}


def job(data: Data, **options: object) -> Job:
    return Job(data, model="resnet18-w2", fabric=CPU, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(value: float) -> None:
    run = job(toy_images(32))
    with pytest.raises(InputError, match=r"diverged in stage 'main', epoch 1 .*lower learning rate"):
        run.fit("main", run.model(), Poisoned(value), SHORT)


def test_a_learning_rate_that_explodes_is_told() -> None:
    run = job(toy_images(32))
    with pytest.raises(InputError, match="diverged in stage 'main'"):
        run.fit("main", run.model(), CrossEntropy(), Recipe(epochs=4, min_steps=0, learning_rate=1e30))


@pytest.mark.parametrize("guarded", [True, False])
def test_an_ascent_that_explodes_is_rolled_back(guarded: bool) -> None:
    run = job(toy_images(32))
    model = run.model()
    run.fit("main", model, CrossEntropy(), SHORT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        list(model.parameters())[-1].mul_(1)
    run.fit("unlearn", model, Unlearn(guarded=guarded, clip=1e38), Ascent(epochs=3, min_steps=0, learning_rate=1e38))
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())
    assert any(row.get("rolled_back") for row in run.history)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_class_is_refused_and_a_batch_of_one_class_is_not() -> None:
    data = toy_images(32)
    with pytest.raises(InputError, match="belong to one class"):
        check_trainable(data.take((data.y == 0).nonzero().flatten()))
    run = job(data)
    run.fit("one", run.model(), CrossEntropy(), SHORT, rows=(data.y == 0).nonzero().flatten())
    assert all(math.isfinite(row["main_loss"]) for row in run.history)


def test_no_batch_is_of_one_sample() -> None:
    for n in range(2, 70):
        assert n // steps_per_epoch(n, 16) >= 2
    run = job(toy_images(17))
    run.fit("main", run.model(), CrossEntropy(), SHORT)
    assert math.isfinite(run.history[-1]["main_loss"])


def test_constant_samples_and_constant_channels() -> None:
    y = torch.arange(32) % 2
    flat = Data(
        torch.full((32, 3, 8, 8), 7, dtype=torch.uint8), y, Spec("image", (3, 8, 8), ("a", "b")), list(map(str, y))
    )
    x = torch.randn(32, 2, 12, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 3.0
    series = Data(x, y, Spec("series", (2, 12), ("a", "b"), float(x.min()), float(x.max())), list(map(str, range(32))))
    for data in (flat, series):
        run = job(data)
        model = run.model()
        run.fit("main", model, CrossEntropy(), SHORT)
        assert logits_of(model, data, CPU).isfinite().all()


def test_values_at_the_ends_of_float32() -> None:
    """Series near the largest number: the statistics overflow, which may be refused but may not pass unseen."""
    y = torch.arange(32) % 2
    x = torch.full((32, 1, 12), 3e38) * torch.where(y == 0, 1.0, -1.0)[:, None, None]
    data = Data(x, y, Spec("series", (1, 12), ("a", "b"), -3e38, 3e38), list(map(str, range(32))))
    run = job(data)
    with pytest.raises(InputError, match=r"diverged|finite"):
        run.fit("main", run.model(), CrossEntropy(), SHORT)


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_gives_finite_losses_close_to_full_precision(precision: str) -> None:
    """Tiny losses that 8 bits of mantissa would lose are summed in float32."""
    ends = []
    for chosen in ("32-true", precision):
        run = Job(toy_images(48), model="resnet18-w2", fabric=make_fabric("cpu", chosen))
        run.fit("main", run.model(), CrossEntropy(), Recipe(epochs=3, min_steps=0, batch_size=16))
        ends.append(run.history[-1]["main_loss"])
        assert run.history[-1]["main_loss"] > 0
    assert ends[1] == pytest.approx(ends[0], abs=0.2)


class Sure(nn.Module):
    """Right about every sample, by so much that 8 bits of mantissa hold no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)
        nn.init.constant_(self.layer.weight, 0.0)
        with torch.no_grad():
            self.layer.weight[0] = 4.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(2).mean(2))
        return logits


def test_small_losses_do_not_underflow_in_mixed_precision() -> None:
    """Networks answer in bfloat16, where 1 + e^-12 is 1 and its logarithm 0; the loss is taken of float32."""
    fabric, model, x = make_fabric("cpu", "bf16-mixed"), Sure(), torch.ones(4, 3, 8, 8)
    batch = Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4), None)
    with fabric.autocast():
        assert model(x).dtype == torch.bfloat16
        step = CrossEntropy()(model, batch)
    assert step.loss.dtype == torch.float32
    assert step.records["main"].tolist() == pytest.approx([math.log1p(math.exp(-12))] * 4, rel=1e-2)
    step.loss.backward()
    assert model.layer.weight.grad is not None and model.layer.weight.grad.abs().min() > 0


class Constant(nn.Module):
    """Answers one class, whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor([0.0, 1e4, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.expand(len(x), 4)


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_collapsed_model_is_reported(collapsed: bool) -> None:
    result = train(
        toy_images(64),
        defense="none",
        options={"recipe.min_steps": 40 * (not collapsed)},
        model=Constant() if collapsed else "resnet18-w4",
        epochs=1,
        device="cpu",
    )
    told = "The model collapsed: it takes all 64 training samples that it was asked about for 'class 1'. Do not use it"
    assert result.verdict.evidence[0].startswith(told) == collapsed
    assert collapsed or not any("collapsed" in sentence for sentence in result.verdict.evidence)


class Flat(nn.Module):
    """Has features to judge by, and one answer for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias[1:2], 1e4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_collapsed_network_clears_nothing() -> None:
    found = scan(toy_images(128), detector="activation_clustering", network=Flat(), device="cpu").verdict
    assert found.evidence[0].startswith("The model collapsed: it takes all 128 training samples")
    assert not found.poisoned and found.confidence == 0


def test_same_seed_same_result() -> None:
    weights = []
    for _ in range(2):
        torch.seed()  # whatever ran before
        run = job(toy_images(32), seed=3)
        model = run.model()
        run.fit("main", model, CrossEntropy(), SHORT)
        weights.append(torch.cat([value.flatten().float() for value in model.state_dict().values()]))
    assert torch.equal(*weights)
