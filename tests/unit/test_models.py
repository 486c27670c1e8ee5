import pytest
import torch
import torchvision

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.models import AUTO, create, resolve, set_normalization
from antibackdoor.models.layers import ConvNorm, Normalize, start
from tiny import train
from toy import toy_images

IMAGE = Spec("image", (3, 8, 8), ("a", "b"))
SERIES = Spec("series", (2, 12), ("a", "b"))


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_sizes():
    image = Spec("image", (3, 32, 32), tuple("abcdefghij"))
    with torch.device("meta"):
        sizes = {name: parameters(create(name, image)) for name in ("resnet18", "resnet34", "resnet50")}
        small = parameters(create("wideresnet16_1", image))
    assert sizes == {"resnet18": 11_173_962, "resnet34": 21_282_122, "resnet50": 23_520_842}
    assert small == 175_066


CLASSIC = {
    "vgg16": torchvision.models.vgg16_bn,
    "inception_v3": lambda: torchvision.models.inception_v3(aux_logits=False, init_weights=False),
    "mobilenetv2": torchvision.models.mobilenet_v2,
    "densenet121": torchvision.models.densenet121,
}


@pytest.mark.parametrize("name", CLASSIC)
def test_the_convolutions_are_those_of_torchvision(name):
    spec = Spec("image", (3, 224, 224), tuple(map(str, range(1000))))
    with torch.device("meta"):
        ours, theirs = create(name, spec), CLASSIC[name]()
    one, two = (sorted(p.shape for p in model.parameters() if p.dim() == 4) for model in (ours, theirs))
    assert one == two
    if name != "vgg16":  # whose two wide linear layers are left out, as the field does on small images
        assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize(("side", "before"), [(32, 4), (64, 4), (128, 4)])
def test_stems_suit_the_size_of_the_image(name, side, before):
    model, sides = create(name, Spec("image", (3, side, side), ("a", "b")), width=2).eval(), []
    model.get_submodule(model.stages[-1]).register_forward_hook(lambda module, args, out: sides.append(out.shape[2]))
    assert model(torch.rand(1, 3, side, side)).isfinite().all()
    assert sides == [side // 32 if name == "vgg16" else before]


@pytest.mark.parametrize("name", CLASSIC)
def test_e2abl_runs_on(name):
    options = {"warm_up.epochs": 1, "warm_up.min_steps": 0, "main.epochs": 1, "main.min_steps": 0}
    outcome, _ = train(toy_images(32), "e2abl", options, model=f"{name}-w4")
    assert outcome.scores.isfinite().all()


def test_width_by_suffix_or_option():
    narrow, wide = create("resnet18-w4", IMAGE), create("resnet18-w8", IMAGE)
    assert parameters(narrow) < parameters(wide)
    assert parameters(narrow) == parameters(create("resnet18", IMAGE, width=4))


@pytest.mark.parametrize("spec", [IMAGE, SERIES])
def test_auto(spec):
    with torch.device("meta"):
        assert parameters(create("auto", spec)) == parameters(create(AUTO[spec.kind], spec))
        assert parameters(create("auto-w4", spec)) == parameters(create("resnet18", spec, width=4))
    assert resolve("auto", spec) == AUTO[spec.kind] and resolve("resnet34", spec) == "resnet34"


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("resnet81", None, "did you mean 'resnet18'"),
        ("resnet18-w0", None, "in 1..1024"),
        ("resnet18-w99999", None, "in 1..1024"),
        ("resnet18-w4", 4, "already"),
    ],
)
def test_bad_names(name, width, message):
    with pytest.raises(InputError, match=message):
        create(name, IMAGE, width=width)


def test_normalization_equals_normalizing_by_hand():
    model, x = create("resnet18-w4", IMAGE).eval(), torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 2.0, 0.0])
    by_hand = model((x - mean[:, None, None]) / torch.tensor([0.5, 2.0, 1.0])[:, None, None])
    set_normalization(model, mean, std)
    torch.testing.assert_close(model(x), by_hand)
    assert "normalize.mean" in model.state_dict()
    with pytest.raises(InputError, match="no Normalize"):
        set_normalization(torch.nn.Linear(1, 1), mean, std)


def test_a_channel_that_never_varies_keeps_its_scale():
    layer = Normalize(1, 4)
    layer.fit_(torch.tensor([0.1, 0.0, 1e5, 0.0]), torch.tensor([1e-7, 0.0, 0.1, 1e-9]))
    torch.testing.assert_close(layer.std.flatten(), torch.tensor([1.0, 1.0, 1.0, 1e-9]))


def test_padding_is_zero_again_after_normalizing():
    layer = Normalize(1, 2)
    layer.fit_(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    h, _ = layer(start(torch.zeros(2, 2, 5), torch.tensor([3, 5])))
    assert torch.equal(h[0, :, 3:], torch.zeros(2, 2))
    assert (h[0, :, :3] != 0).all()


def test_batch_statistics_do_not_count_padding():
    torch.manual_seed(0)
    padded, cropped = ConvNorm(1, 2, 3, 3, 2), ConvNorm(1, 2, 3, 3, 2)
    cropped.load_state_dict(padded.state_dict())
    x = torch.randn(4, 2, 7)
    h, mask = padded(start(torch.nn.functional.pad(x, (0, 9)), torch.full((4,), 7)))
    want, _ = cropped((x, None))
    torch.testing.assert_close(h[..., :4], want)
    assert mask.sum(2).flatten().tolist() == [4] * 4
    assert not h[..., 4:].any()
    torch.testing.assert_close(padded.norm.running_var, cropped.norm.running_var)


def test_a_lone_value_a_channel_does_not_stop_training():
    model = create("resnet18-w4", IMAGE).train()
    assert model(torch.rand(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(("dims", "c_in"), [(1, 4), (2, 4), (2, 16)])
def test_strided_1x1_convolution(dims, c_in):
    layer, x = ConvNorm(dims, c_in, 5, 1, stride=2, relu=False).eval(), torch.rand(2, c_in, *[7] * dims)
    want = (torch.conv1d if dims == 1 else torch.conv2d)(x, layer.conv.weight, stride=2)
    torch.testing.assert_close(layer((x, None))[0], layer.norm(want))
