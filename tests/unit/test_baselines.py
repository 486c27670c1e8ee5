"""The parts of ABL, fine-pruning, NAD, ANP, MCR, D-BR and the poison oracle, on numbers that can be checked by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather
from antibackdoor.defenses import make_defense
from antibackdoor.defenses.abl import held
from antibackdoor.defenses.anp import Masked, Shaken, neurons
from antibackdoor.defenses.dbr import UnlearnRelearn, overlap_of_classes, sensitivity
from antibackdoor.defenses.fine_pruning import activations, reader_of_channels
from antibackdoor.defenses.harvey import OnlyPoison
from antibackdoor.defenses.mcr import Curve, bezier, renew_statistics
from antibackdoor.defenses.nad import Distill, attention
from antibackdoor.errors import InputError
from antibackdoor.models import MODELS, create
from antibackdoor.models.blocks import stages
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe, Repair
from antibackdoor.training.objectives import CrossEntropy
from antibackdoor.training.scores import logits_of
from antibackdoor.training.unlearning import Unlearn
from tiny import FABRIC, same_weights, short, train
from toy import toy_images, toy_series

FLAT = [nn.Flatten(), nn.Linear(200, 16), nn.ReLU(), nn.Linear(16, 4)]
FOREIGN = {
    "no batch norm": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 4)),
    "two linear layers": nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), *FLAT),
}


def slope(values: list[float], **options: object) -> list[float]:
    x = torch.tensor(values, requires_grad=True)
    held(x, 0.5, **options).backward()  # type: ignore[arg-type]
    assert x.grad is not None
    return (x.grad * len(values)).tolist()


@pytest.mark.parametrize("how", ["gradient_ascent", "flooding"])
def test_held_losses_turn_at_the_level_sample_by_sample_or_for_the_mean(how: str) -> None:
    values = [0.1, 0.4, 3.0]  # the mean is above the level, two samples are below
    assert slope(values, how=how, over="sample") == [-1, -1, 1]
    assert slope(values, how=how, over="batch") == pytest.approx([1, 1, 1])  # the trap: low losses may sink on
    assert slope([0.1, 0.2, 0.3], how=how, over="batch") == pytest.approx([-1, -1, -1])
    assert slope(values, how="nothing") == [1, 1, 1]


def test_values_of_held_losses() -> None:
    values = torch.tensor([0.1, 0.4, 3.0])
    assert float(held(values, 0.5)) == pytest.approx((3.0 - 0.1 - 0.4) / 3)
    assert float(held(values, 0.5, "flooding")) == pytest.approx(((0.4 + 0.5) + (0.1 + 0.5) + (2.5 + 0.5)) / 3)
    assert float(held(values, 0.5, "flooding", "batch")) == pytest.approx(3.5 / 3 - 0.5 + 0.5)


class Exploding(Unlearn):
    """Blows up in its third epoch."""

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        self.epoch = epoch
        super().before_epoch(model, epoch)

    def after_step(self, model: nn.Module) -> None:
        if self.epoch == 2:
            with torch.no_grad():
                next(model.parameters()).mul_(torch.nan)


def test_abl_goes_back_to_the_last_finite_weights_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**short("abl", 1), "guards": "literal", "unlearning.epochs": 2}
    two, _ = train(toy_series(24), "abl", options, model="resnet18-w4")
    assert set(two.evidence) == {"isolated"} and list(two.stages) == ["isolation", "fine-tuning"]
    monkeypatch.setattr("antibackdoor.defenses.abl.Unlearn", Exploding)
    stopped, job = train(toy_series(24), "abl", {**options, "unlearning.epochs": 9}, model="resnet18-w4")
    assert stopped.evidence["ascent_taken_back_in_epoch"] == 3
    assert [row["epoch"] for row in job.history if row["stage"] == "unlearning"] == [1, 2, 3]
    assert same_weights(two.model, stopped.model)


def test_unlearning_and_relearning_share_a_batch() -> None:
    model = Fixed(torch.zeros(2, 2))
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 0]), torch.tensor([5, 1]), None)
    poison = torch.arange(6) == 5
    UnlearnRelearn(poison, guarded=False)(model, batch).loss.backward()
    assert model.logits.grad is not None
    assert model.logits.grad.tolist() == [[0.25, -0.25], [-0.25, 0.25]]  # away from the label; towards it


def test_abl_isolates_the_lowest_losses_and_trains_on_the_rest() -> None:
    data = toy_series(60)
    outcome, job = train(data, "abl", {**short("abl", 1), "isolation_rate": 0.2}, model="resnet18-w4")
    rows = outcome.flagged.nonzero().flatten()
    assert len(rows) == 12 and outcome.scores[rows].min() >= outcome.scores[~outcome.flagged].max()
    assert [row["stage"] for row in job.history] == ["isolation", "fine-tuning", "unlearning"]
    assert torch.equal(outcome.partitions[0].isolated, outcome.flagged)
    few, _ = train(toy_series(20), "abl", short("abl", 1), model="resnet18-w4")
    assert int(few.flagged.sum()) == 8  # the floor


@pytest.mark.parametrize("entry", list(MODELS), ids=lambda entry: entry.name)
def test_pruning_finds_the_channels_of_every_model(entry) -> None:
    for data in (toy_images(4, size=8), toy_series(4, unequal=True)):
        if data.spec.kind in entry.kinds:
            model = create(entry.name, data.spec, width=4)
            linear, channels = reader_of_channels(model, gather(data, torch.arange(2), torch.device("cpu")))
            assert linear is model.fc and channels == linear.in_features  # type: ignore[comparison-overlap]


def test_channels_of_flattened_maps_have_several_columns() -> None:
    example = gather(toy_images(4), torch.arange(2), torch.device("cpu"))
    for model, index, channels in ((FOREIGN["no batch norm"], 4, 8), (FOREIGN["two linear layers"], 4, 8)):
        assert reader_of_channels(model, example) == (model[index], channels)
    with pytest.raises(InputError, match="no channels to prune"):
        reader_of_channels(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), example)


def test_pruning_goes_from_the_least_active_channel_on_and_counts_positions() -> None:
    data = toy_images(6, size=2)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([2.0, 1.0, 3.0]))
    job = Job(data, model=model, fabric=FABRIC)
    linear, channels = reader_of_channels(model, gather(data, torch.arange(2), torch.device("cpu")))
    means = activations(model, linear, channels, data, job)
    assert means.tolist() == [2.0, 1.0, 3.0] and means.argsort().tolist() == [1, 0, 2]


def test_fine_pruning_cuts_idle_channels_only_and_keeps_them_cut() -> None:
    data = toy_images(80)
    options = {**short("fine_pruning", 6), "step": 0.1}
    outcome, job = train(data, "fine_pruning", options, model="resnet18-w4", extras={"clean": toy_images(40, seed=1)})
    cut = outcome.evidence["pruned_channels"]
    weight = outcome.model.fc.weight
    assert 0 < cut["count"] < cut["n"] == 32
    assert int((weight == 0).all(0).sum()) == cut["count"]  # also after fine-tuning
    plain, _ = train(data, "fine_pruning", {**options, "fine_tuning": "null"}, extras=job.extras, model="resnet18-w4")
    assert plain.evidence == outcome.evidence


def test_attention_has_length_one_and_squares_activations() -> None:
    features = torch.zeros(1, 2, 1, 3)
    features[0, :, 0, 0] = torch.tensor([3.0, -1.0])  # mean of squares 5
    features[0, :, 0, 2] = torch.tensor([0.0, 2.0])  # 2
    expected = torch.tensor([5.0, 0.0, 2.0]) / math.sqrt(29)
    torch.testing.assert_close(attention(features), expected[None])
    torch.testing.assert_close(attention(features[:, :, 0]), expected[None])  # series: over time
    assert attention(torch.zeros(2, 3, 4)).isfinite().all()


def test_distillation_of_a_student_from_itself_is_cross_entropy() -> None:
    data = toy_series(6, unequal=True)
    model = create("resnet18", data.spec, width=4).eval()
    batch = gather(data, torch.arange(6), torch.device("cpu"))
    blocks = stages(model, batch.x, batch.lengths)
    assert blocks == ["stem", "layer1", "layer2", "layer3", "layer4"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer4[1].branch[1].conv.weight.mul_(-3)
    plain = CrossEntropy()(model, batch).loss
    torch.testing.assert_close(Distill(copy.deepcopy(model), blocks, [1e3] * 5, 2)(model, batch).loss, plain)
    assert Distill(other, blocks, [1e3] * 5, 2)(model, batch).loss > plain
    assert not any(m._forward_hooks for net in (model, other) for m in net.modules())


def test_stages_of_foreign_networks() -> None:
    x = torch.rand(2, 3, 12, 12)
    assert stages(FOREIGN["no batch norm"], x) == ["0", "2"]  # by depth, the convolution itself first
    with pytest.raises(InputError, match="no block"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), x)


def test_what_is_masked() -> None:
    assert neurons(FOREIGN["no batch norm"]) == ["0", "2"]
    assert neurons(FOREIGN["two linear layers"]) == ["1"]
    assert neurons(nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.Linear(8, 4))) == ["1"]
    with pytest.raises(InputError, match="neurons"):
        neurons(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)))


def test_masks_scale_weights_and_noise_shakes_biases_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 10.0]))
        model[1].weight.copy_(torch.eye(2))
        model[1].bias.zero_()
    masked = Masked(model)
    x = torch.tensor([[2.0, 3.0]])
    with torch.no_grad():
        masked.masks[0].copy_(torch.tensor([0.5, 0.0]))
        assert masked(x).tolist() == [[2.0, 10.0]]  # 2 * 0.5 + 1; 3 * 0 + 10
        noise = [(torch.tensor([0.1, -0.2]), torch.tensor([0.5, 0.1]))]
        torch.testing.assert_close(masked(x, noise=noise), torch.tensor([[2 * 0.6 + 1.5, 3 * -0.2 + 11.0]]))
        masked.masks[0].copy_(torch.tensor([-0.3, 1.4]))
        masked.clip()
        assert masked.masks[0].tolist() == [0, 1]
        assert masked.prune(0.2) == {"count": 1, "n": 2}
    assert model[0].weight.tolist() == [[0, 0], [0, 1]] and model[0].bias.tolist() == [1, 10]


def test_the_worst_noise_is_worse_than_none_and_stays_in_bounds() -> None:
    data = toy_images(40)
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    model = job.model()
    job.fit("training", model, CrossEntropy(), Recipe(epochs=3, min_steps=0, augment="none"))
    masked, batch = Masked(model).eval(), gather(data, torch.arange(40), torch.device("cpu"))
    worst = Shaken(0.4, 0.2, 1)._worst(masked, batch)
    assert all(float(value.abs().max()) <= 0.4 + 1e-6 for pair in worst for value in pair)
    assert F.cross_entropy(masked(batch.x, None, worst), batch.y) > F.cross_entropy(masked(batch.x), batch.y)


def test_anp_leaves_every_weight_but_the_pruned() -> None:
    data, clean = toy_series(60), {"clean": toy_series(30, seed=1)}
    options = {**short("anp", 3), "masking.learning_rate": 2.0}
    plain, _ = train(data, "none", short("none", 3), model="resnet18-w4")
    outcome, _ = train(data, "anp", options, model="resnet18-w4", extras=clean)
    count = outcome.evidence["pruned_neurons"]["count"]
    one, two = plain.model.state_dict(), outcome.model.state_dict()
    changed = sum(int((one[name] != two[name]).sum()) for name in one)
    assert changed == count > 0
    spared, _ = train(data, "anp", {**options, "threshold": 0.0}, model="resnet18-w4", extras=clean)
    assert all(torch.equal(one[name], value) for name, value in spared.model.state_dict().items())


@pytest.mark.parametrize("name, stages", [("anp", 1), ("nad", 2), ("fine_pruning", 1), ("mcr", 2)])
def test_repairs_take_the_batches_they_ask_for(name: str, stages: int) -> None:
    repairs = [stage for stage in vars(make_defense(name)).values() if isinstance(stage, Repair)]
    assert len(repairs) == stages
    assert all(stage.batch_for(500) == stage.batch_size and stage.batch_for(27) == 27 for stage in repairs)


def test_bezier_curve() -> None:
    first, bend, last = torch.tensor([0.0]), torch.tensor([4.0]), torch.tensor([2.0])
    assert [float(bezier(first, bend, last, t)) for t in (0, 0.5, 1)] == [0, 2.5, 2]


def test_a_curve_starts_as_a_line_between_its_ends() -> None:
    spec = toy_series(4).spec
    first, last = create("resnet18", spec, width=4), create("resnet18", spec, width=4)
    curve = Curve(first, last)
    for t in (0.0, 0.3, 1.0):
        for name, weight in curve.weights(t).items():
            straight = (1 - t) * first.get_parameter(name) + t * last.get_parameter(name)
            torch.testing.assert_close(weight, straight, rtol=1e-5, atol=1e-6)
    assert {id(p) for p in curve.parameters()} == {id(p) for p in curve.bend.parameters()}  # the ends are fixed


def test_statistics_are_renewed_from_the_given_samples() -> None:
    data = replace(toy_images(10), x=toy_images(10).x[torch.arange(10)])
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(432, 4))
    job = Job(data, model=model, fabric=FABRIC)
    renew_statistics(model, data, job, size=5)
    x = data.spec.decode(data.x[torch.arange(10)])
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    assert model[0].momentum == 0.1 and not model.training


def test_renewed_statistics_depend_on_neither_a_tail_nor_the_order_of_classes() -> None:
    data = toy_images(65)
    data = data.take(data.y.argsort(stable=True))
    x = (60 * data.y + 30).byte()[:, None, None, None] + data.x[torch.arange(65)] // 16  # classes differ in grey
    x[-1] = 0  # alone in the last of five batches of 16
    data = replace(data, x=x)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(432, 4))
    renew_statistics(model, data, Job(data, model=model, fabric=FABRIC), size=16)
    x = data.spec.decode(data.x[torch.arange(65)])
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)), rtol=0.01, atol=0)
    torch.testing.assert_close(model[0].running_var, x.var((0, 2, 3)), rtol=0.1, atol=0)


def test_mcr_takes_the_given_point() -> None:
    clean = {"clean": toy_images(30, seed=1)}
    given, _ = train(toy_images(40), "mcr", {**short("mcr", 2), "t": 0.0}, model="resnet18-w4", extras=clean)
    plain, _ = train(toy_images(40), "none", short("none", 2), model="resnet18-w4")
    same = [torch.equal(plain.model.get_parameter(n), p) for n, p in given.model.named_parameters()]
    assert all(same)  # t = 0 is the undefended model, statistics apart


def test_a_module_has_no_second_initialization() -> None:
    with pytest.raises(InputError, match="of another initialization is built by name"):
        train(toy_images(32), "mcr:two_models", short("mcr:two_models", 1), model=next(iter(FOREIGN.values())))


def test_classes_overlap_where_their_centers_point_the_same_way() -> None:
    features, y = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1])
    assert float(overlap_of_classes(features, y)) == 0
    assert float(overlap_of_classes(features, torch.tensor([0, 1, 1]))) == pytest.approx(
        2 * (1.5 / math.hypot(1.5, 1)) / 4
    )
    assert float(overlap_of_classes(features, torch.tensor([1, 1, 1]))) == 0


def test_sensitivity_is_zero_where_nothing_depends_on_the_input() -> None:
    data = toy_images(8)
    blind = nn.Sequential(nn.Flatten(), nn.Linear(432, 5), nn.Linear(5, 4))
    nn.init.zeros_(blind[1].weight)
    job = Job(data, model=blind, fabric=FABRIC)
    assert sensitivity(blind, job, "strong", 1).tolist() == [0] * 8
    seeing = Job(data, model="resnet18-w4", fabric=FABRIC)
    one, two = (sensitivity(seeing.model(name), seeing, "strong", 2) for name in ("a", "a"))
    assert torch.equal(one, two) and (one > 0).all() and one.dtype == torch.float64


class Fixed(nn.Module):
    """Gives the logits it holds."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def test_the_oracle_weighs_both_sides_alike_and_forgets_to_uniform() -> None:
    poison = torch.tensor([True, False, False, False])
    model = Fixed(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    batch = Batch(torch.zeros(4, 1), torch.tensor([1, 0, 0, 1]), torch.arange(4), None)
    loss = OnlyPoison(poison)(model, batch).loss
    forget = [-(F.log_softmax(row, 0)).mean() for row in model.logits[1:]]
    torch.testing.assert_close(loss, (math.log(2) + sum(forget) / 3) / 2)
    loss.backward()
    assert model.logits.grad is not None
    assert model.logits.grad[0, 1] < 0 < model.logits.grad[1, 0] and model.logits.grad[2].abs().max() < 1e-7
    for side in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert OnlyPoison(side)(model, batch).loss.isfinite()


@pytest.mark.parametrize("name", ["abl", "fine_pruning", "nad", "anp", "mcr", "dbr", "harvey"])
def test_a_class_with_one_sample_and_a_model_at_chance(name: str) -> None:
    data = toy_series(25)
    y = torch.arange(25) % 2
    y[7] = 2  # the only sample of its class
    noise = torch.randn(25, 2, 40, generator=torch.Generator().manual_seed(0))
    spec = replace(data.spec, low=float(noise.min()), high=float(noise.max()))
    data = replace(data, x=noise, y=y, spec=spec)  # labels that follow from nothing
    clean = {"clean": data.take(torch.tensor([0, 1, 7]))} if name in {"fine_pruning", "nad", "anp", "mcr"} else {}
    outcome, _ = train(data, name, short(name, 1), model="resnet18-w4", extras=clean)
    assert outcome.scores.isfinite().all()
    assert all(value.isfinite().all() for value in outcome.model.state_dict().values())


@pytest.mark.parametrize("name", ["abl", "nad", "anp", "mcr", "fine_pruning", "dbr", "harvey"])
def test_networks_of_ones_own(name: str) -> None:
    for model in FOREIGN.values():
        outcome, _ = train(toy_images(32), name, short(name, 1), model=model)
        assert logits_of(outcome.model, toy_images(8), FABRIC).shape == (8, 4)
