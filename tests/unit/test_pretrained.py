"""Networks of timm, and fine-tuning from local weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import antibackdoor
from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.models import create
from antibackdoor.models.pretrained import read_weights, take_weights
from tiny import same_weights
from toy import toy_images, toy_series

FAST: dict[str, Any] = {
    "defense": "none", "options": {"recipe.min_steps": 0}, "model": "resnet18-w8", "epochs": 1, "device": "cpu"
}  # fmt: skip


def spec(classes: int = 4, size: int = 16) -> Spec:
    return Spec("image", (3, size, size), tuple(f"class {k}" for k in range(classes)))


def saved(path: Path, model: nn.Module, prefix: str = "") -> Path:
    save_file({prefix + name: value.contiguous().clone() for name, value in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_same_network_is_taken_whole(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(1)
    given = create("resnet18-w8", spec())
    given.normalize.mean.fill_(0.3)  # type: ignore[union-attr,operator]
    other = create("resnet18-w8", spec())
    weights = read_weights(saved(tmp_path / "w.safetensors", given, prefix))
    assert take_weights(other, weights, "w") == [] and same_weights(given, other)


def test_another_number_of_classes_gets_a_fresh_head(tmp_path: Path) -> None:
    given, other = create("resnet18-w8", spec(7)), create("resnet18-w8", spec(3))
    head = other.fc.weight.clone()  # type: ignore[union-attr,operator]
    weights = read_weights(saved(tmp_path / "w.safetensors", given))
    assert take_weights(other, weights, "w") == ["fc.weight", "fc.bias"]
    assert torch.equal(other.fc.weight, head)  # type: ignore[union-attr,arg-type]
    assert torch.equal(other.layer1[0].branch[0].conv.weight, given.layer1[0].branch[0].conv.weight)  # type: ignore


@pytest.mark.parametrize("change", ["narrower", "missing", "nan", "empty"])
def test_what_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    state = dict(create("resnet18-w16" if change == "narrower" else "resnet18-w8", spec()).state_dict())
    if change == "missing":
        del state["layer1.0.branch.0.conv.weight"]
    if change == "nan":
        state["layer1.0.branch.0.conv.weight"] = state["layer1.0.branch.0.conv.weight"] * torch.nan
    state = {"nothing": torch.zeros(1)} if change == "empty" else state
    with pytest.raises(InputError, match="does not fit this model"):
        take_weights(create("resnet18-w8", spec()), state, "w.safetensors")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"x")
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    for name, gist in (("w.pt", "never read"), ("w.safetensors", "cannot read"), ("none.safetensors", "do not exist")):
        with pytest.raises(InputError, match=gist):
            antibackdoor.train(toy_images(20), **FAST, weights=tmp_path / name)


def test_fine_tuning_starts_from_the_file_and_resumes_only_with_it(tmp_path: Path) -> None:
    first = antibackdoor.train(toy_images(40, classes=3), **{**FAST, "epochs": 2}, out=tmp_path / "first")
    weights = tmp_path / "first" / "model.safetensors"
    still = {**FAST, "options": {"recipe.min_steps": 0, "recipe.learning_rate": 1e-9}}
    tuned = antibackdoor.train(toy_images(40), **still, out=tmp_path / "tuned", weights=weights)
    name = "layer1.0.branch.0.conv.weight"
    assert torch.allclose(tuned.model.state_dict()[name], first.model.state_dict()[name], atol=1e-5)
    assert tuned.model.state_dict()["fc.weight"].shape[0] == 4
    assert "weights" in json.loads((tmp_path / "tuned" / "config.json").read_text())
    with pytest.raises(InputError, match="other data or settings"):
        antibackdoor.train(toy_images(40), **still, out=tmp_path / "tuned", resume=True)


def test_timm_by_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
    name = "resnet10t"
    model = create(f"timm:{name}", spec(4, 32))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    pretrained = timm.create_model(name, pretrained=False, num_classes=11)
    weights = read_weights(saved(tmp_path / "timm.safetensors", pretrained))
    assert take_weights(model, weights, "w") == ["body.fc.weight", "body.fc.bias"]
    assert torch.equal(model.body.conv1[0].weight, pretrained.conv1[0].weight)  # type: ignore[union-attr,index]
    result = antibackdoor.train(toy_images(40, size=32), **{**FAST, "model": f"timm:{name}"}, out=tmp_path / "run")
    again, _ = antibackdoor.load_model(tmp_path / "run")
    assert same_weights(result.model, again)
    for wrong, gist in (("resnet10x", "did you mean"), ("vit_tiny_patch16_224", "does not take 12x12")):
        with pytest.raises(InputError, match=gist):
            create(f"timm:{wrong}", spec(4, 12))
    with pytest.raises(InputError, match="take images"):
        create(f"timm:{name}", toy_series().spec)
