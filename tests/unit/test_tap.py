import copy

import pytest
import torch
import torchvision
from torch import nn

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.models import create
from antibackdoor.models.tap import Tap, choose_tap, find_taps

IMAGE = Spec("image", (3, 8, 8), ("a", "b", "c"))
SERIES = Spec("series", (2, 20), ("a", "b", "c"))
MAIN = torch.tensor([True, False, True, True, False])


class Case:
    """A small ResNet of either kind with five rows."""

    def __init__(self, spec: Spec, **options):
        torch.manual_seed(0)
        self.x = torch.rand(5, *spec.shape)
        self.lengths = torch.tensor([20, 7, 9, 20, 13]) if spec.kind == "series" else None
        self.model = create("resnet18-w4", spec)
        self.tap = Tap(self.model, None, 3, self.x, self.lengths, **options)


@pytest.fixture(params=[IMAGE, SERIES], ids=["image", "series"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def count_runs(module: nn.Module) -> list[int]:
    runs: list[int] = []
    module.register_forward_hook(lambda m, args, out: runs.append(1))
    return runs


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("spec", [IMAGE, SERIES], ids=["image", "series"])
def test_resnets_are_tapped_after_the_second_stage(name, spec):
    model = create(name, spec, width=4)
    found = find_taps(model, torch.rand(2, *spec.shape))
    assert [c.name for c in found if "." not in c.name] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert choose_tap(found) == "layer2"
    assert [c.depth for c in found] == sorted(c.depth for c in found)


def test_second_head_of_resnet34_adds_less_than_a_tenth():
    spec = Spec("image", (3, 8, 8), tuple("abcdefghij"))
    counts = Tap(create("resnet34", spec), None, 10, torch.rand(1, 3, 8, 8)).parameter_counts()
    assert counts["backbone"] == 21_282_122
    assert 1.0 < counts["ratio"] <= 1.1


def test_wide_heads():
    usual, wide = (Case(IMAGE, **options).tap.parameter_counts()["head"] for options in ({}, {"wide": True}))
    assert usual < wide


def test_shallow_never_runs_the_deep_part(case):
    deep = [count_runs(module) for module in (case.model.layer3, case.model.layer4, case.model.fc)]
    before = copy.deepcopy(case.model.layer3.state_dict())
    assert case.tap.train().shallow(case.x, case.lengths).shape == (5, 3)
    assert deep == [[], [], []]
    assert all(torch.equal(value, before[key]) for key, value in case.model.layer3.state_dict().items())


def test_all_rows_equal_the_backbone_exactly(case):
    case.tap.eval()
    first, second = case.tap(case.x, case.lengths)
    assert torch.equal(first, case.model(case.x, case.lengths))
    assert torch.equal(second, case.tap.shallow(case.x, case.lengths))
    assert torch.equal(first, case.tap(case.x, case.lengths, torch.ones(5, dtype=torch.bool))[0])


@pytest.mark.parametrize("main", [MAIN, MAIN.nonzero().squeeze(1)], ids=["mask", "rows"])
def test_some_rows_equal_those_of_the_whole(case, main):
    case.tap.eval()
    first, second = case.tap(case.x, case.lengths, main)
    want, want_second = case.tap(case.x, case.lengths)
    torch.testing.assert_close(first, want[main], rtol=0, atol=1e-6)
    torch.testing.assert_close(second, want_second)


def test_deep_statistics_never_see_the_other_rows(case):
    norm = case.model.layer3[0].branch[0].norm
    start = copy.deepcopy(case.tap.state_dict())
    after = []
    for value in (0.0, 100.0):  # what the rows outside `main` hold; the stem is in eval mode, so it does not mix rows
        case.tap.load_state_dict(start)
        case.tap.train()
        for module in (case.model.stem, case.model.layer1, case.model.layer2):
            module.eval()
        x = case.x.clone()
        x[~MAIN] = value
        case.tap(x, case.lengths, MAIN)
        after.append(norm.running_mean.clone())
    assert torch.equal(*after)
    assert not torch.equal(after[0], start["backbone.layer3.0.branch.0.norm.running_mean"])


def test_no_main_rows(case):
    deep = count_runs(case.model.layer3)
    first, second = case.tap(case.x, case.lengths, torch.zeros(5, dtype=torch.bool))
    assert (first.shape, second.shape, deep) == ((0, 3), (5, 3), [])


def test_detach_keeps_the_gradient_out_of_the_stem(case):
    for detach in (False, True):
        case.tap.zero_grad()
        case.tap(case.x, case.lengths, MAIN, detach=detach)[1].sum().backward()
        touched = any(p.grad is not None and p.grad.any() for p in case.tap.main_parameters())
        assert touched is not detach


def test_no_hook_is_left_behind(case):
    case.tap.shallow(case.x, case.lengths)
    case.tap(case.x, case.lengths, MAIN)
    with pytest.raises(RuntimeError):
        case.tap(torch.cat([case.x, case.x], 1))
    assert all(not module._forward_hooks for module in case.tap.modules())


def test_building_a_tap_disturbs_nothing():
    model = create("resnet18-w4", IMAGE)
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    Tap(model, "layer3", 3, torch.rand(2, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.layer1.training
    assert all(p.grad is None for p in model.parameters())


def test_parameter_groups(case):
    def names(parameters):
        wanted = {id(p) for p in parameters}
        return {name.split(".")[1] for name, p in case.tap.named_parameters() if id(p) in wanted}

    assert names(case.tap.main_parameters()) == {"stem", "layer1", "layer2", "layer3", "layer4", "fc"}
    assert names(case.tap.warm_up_parameters()) == {"stem", "layer1", "layer2", "conv1", "conv2", "fc"}
    assert names(case.tap.second_parameters()) == {"conv1", "conv2", "fc"}


@pytest.mark.parametrize("spec", [IMAGE, SERIES], ids=["image", "series"])
def test_a_second_model_shares_nothing(spec):
    case = Case(spec, shared=False)
    tap = case.tap
    own = {p.data_ptr() for p in tap.main_parameters()}
    assert own.isdisjoint(p.data_ptr() for p in tap.second_parameters())
    assert own.isdisjoint(p.data_ptr() for p in tap.warm_up_parameters())
    assert not torch.equal(tap.second_backbone.stem.conv.weight, tap.backbone.stem.conv.weight)
    assert not any(p.requires_grad for p in tap.second_backbone.layer3.parameters())
    deep = count_runs(tap.second_backbone.layer3)
    first, second = tap(case.x, case.lengths, MAIN)
    assert (first.shape, second.shape, deep) == ((3, 3), (5, 3), [])
    second.sum().backward()
    assert all(p.grad is None for p in tap.main_parameters())
    assert all(p.grad is not None for p in tap.second_parameters())
    assert tap(case.x, case.lengths, ~MAIN & MAIN)[0].shape == (0, 3)
    tap.eval()
    assert torch.equal(tap(case.x, case.lengths)[0], case.model(case.x, case.lengths))


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


FOREIGN = {
    "plain": (plain_cnn, "5"),
    "wrapped": (lambda: nn.Sequential(nn.Identity(), create("resnet18-w4", IMAGE)), None),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.25), None),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=3), None),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), "layer2"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_any_network_can_be_tapped(name):
    build, at = FOREIGN[name]
    torch.manual_seed(0)
    x = torch.rand(3, 3, 32, 32) if name != "plain" else torch.rand(3, 3, 12, 12)
    model = build()
    tap = Tap(model, None, 3, x).eval()
    assert at is None or tap.at == at
    with torch.no_grad():
        first, second = tap(x, main=torch.tensor([2, 0]))
        torch.testing.assert_close(first, model(x)[[2, 0]], rtol=1e-4, atol=1e-5)
        assert torch.equal(second, tap.shallow(x))
    assert 0 < len(tap.warm_up_parameters()) - len(tap.second_parameters()) < len(tap.main_parameters())


class Bypass(nn.Module):
    """A path leads around its middle block."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        a = self.a(x)
        return self.fc((a + self.c(self.b(a))).mean((2, 3)))


def test_a_block_that_does_not_cut_is_refused():
    x = torch.rand(2, 3, 8, 8)
    assert Tap(Bypass(), "a", 3, x).at == "a"
    with pytest.raises(InputError, match="around"):
        Tap(Bypass(), "b", 3, x)


def test_bad_blocks():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match="did you mean 'layer2'"):
        Tap(create("resnet18-w4", IMAGE), "layr2", 3, x)
    with pytest.raises(InputError, match="no block"):
        Tap(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), None, 3, x)
