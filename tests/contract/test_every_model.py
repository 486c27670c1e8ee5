"""What every registered model promises, whatever its kind."""

import pytest
import torch
from torch import nn

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.models import MODELS, create
from antibackdoor.models.blocks import find_taps
from antibackdoor.models.tap import Tap

SPECS = {
    "image": Spec("image", (3, 8, 8), ("a", "b", "c")),
    "series": Spec("series", (2, 20), ("a", "b", "c")),
}
CASES = [(entry.name, kind) for entry in MODELS for kind in entry.kinds]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Spec]:
    name, kind = request.param
    torch.manual_seed(0)
    return create(name, SPECS[kind], width=4), SPECS[kind]


def test_logits_are_the_linear_layer_of_the_embedding(case):
    model, spec = case
    x = torch.rand(3, *spec.shape)
    model.eval()
    assert model(x).shape == (3, 3)
    assert model.embed(x).dim() == 2
    torch.testing.assert_close(model.fc(model.embed(x)), model(x), rtol=0, atol=0)


def test_gradient_reaches_every_parameter(case):
    model, spec = case
    x = torch.rand(4, *spec.shape)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("at", ["the middle", "the first", "the last"])
def test_a_tap_gives_both_heads_and_keeps_other_rows_out_of_the_deep_part(case, at):
    model, spec = case
    x = torch.rand(5, *spec.shape)
    found = [c.name for c in find_taps(model, x)]
    tap = Tap(model, {"the middle": None, "the first": found[0], "the last": found[-1]}[at], 3, x).train()
    main, second = tap(x, main=torch.tensor([True, False, True, False, False]))
    assert main.shape == (2, 3) and second.shape == (5, 3)
    assert tap(x, main=torch.tensor([0]))[0].isfinite().all()  # a lone row, perhaps on a single position
    (main.sum() + second.sum()).backward()
    assert all(p.grad is not None for p in (*tap.main_parameters(), *tap.second_parameters()))
    tap.eval()
    torch.testing.assert_close(tap(x, main=torch.tensor([3, 1]))[0], model(x)[[3, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_channels_and_classes_come_from_the_spec(name, kind):
    other = Spec(kind, (1, *SPECS[kind].shape[1:]), tuple("abcde"))
    assert create(name, other, width=4)(torch.rand(2, *other.shape)).shape == (2, 5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_depend_on_the_seed_only(name, kind):
    torch.manual_seed(1)
    first = create(name, SPECS[kind], width=4).state_dict()
    torch.manual_seed(1)
    second = create(name, SPECS[kind], width=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_strided_1x1_convolution_of_few_channels(case):
    """OneDNN's backward pass writes past its buffer there (channels last, CPU; its issue 6035)."""
    model, _ = case
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels < 16:
            assert module.stride == (1, 1), name


@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "series"])
def test_padding_never_changes_a_prediction(name):
    torch.manual_seed(0)
    model = create(name, SPECS["series"], width=4)
    lengths = torch.tensor([7, 20, 12])
    x = torch.randn(3, 2, 20)
    x[torch.arange(20).expand(3, 2, 20) >= lengths[:, None, None]] = 0
    for _ in range(3):  # running statistics away from 0 and 1
        model(x, lengths)
    model.eval()
    together = model(x, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = model(x[i : i + 1, :, :length])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "series"])
def test_full_lengths_equal_no_lengths(name):
    torch.manual_seed(0)
    model = create(name, SPECS["series"], width=4).train()
    x = torch.randn(4, 2, 20)
    torch.testing.assert_close(model(x, torch.full((4,), 20)), model(x), rtol=1e-2, atol=1e-3)


def test_kinds_are_enforced():
    for entry in MODELS:
        for kind in set(SPECS) - set(entry.kinds):
            with pytest.raises(InputError, match="does not take"):
                create(entry.name, SPECS[kind])
