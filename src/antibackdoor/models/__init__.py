"""Backbones by name; every one is `forward(x, lengths=None)` = linear layer after `embed(x, lengths=None)`."""

from __future__ import annotations

import re
from typing import Protocol

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.models import classic, library
from antibackdoor.models.layers import Normalize
from antibackdoor.models.resnet import ResNet
from antibackdoor.models.wideresnet import WideResNet
from antibackdoor.registry import Registry

__all__ = ["AUTO", "MODELS", "create", "resolve", "set_normalization"]


class Builder(Protocol):
    """Builds a freshly initialized network for a spec; `width` scales all its channels."""

    def __call__(self, spec: Spec, width: int = ...) -> nn.Module: ...


MODELS: Registry[Builder] = Registry("model")

AUTO = {"image": "resnet18-w32", "series": "resnet18-w32"}
"""What "auto" stands for: ResNet-18 of half the usual width, at a quarter of the cost."""
WIDEST = 1024
"""No model file may ask for more: a tampered one would fill the memory."""


@MODELS.register("resnet18", paper="He et al. 2016, Deep residual learning")
def resnet18(spec: Spec, width: int = 64) -> nn.Module:
    """ResNet-18; 3x3 stem without pooling for images, 1-D convolutions for series."""
    return ResNet(spec, (2, 2, 2, 2), bottleneck=False, width=width)


@MODELS.register("resnet34", paper="He et al. 2016, Deep residual learning")
def resnet34(spec: Spec, width: int = 64) -> nn.Module:
    """ResNet-34; 3x3 stem without pooling for images, 1-D convolutions for series."""
    return ResNet(spec, (3, 4, 6, 3), bottleneck=False, width=width)


@MODELS.register("resnet50", paper="He et al. 2016, Deep residual learning")
def resnet50(spec: Spec, width: int = 64) -> nn.Module:
    """ResNet-50 with bottleneck blocks; 3x3 stem without pooling for images, 1-D convolutions for series."""
    return ResNet(spec, (3, 4, 6, 3), bottleneck=True, width=width)


@MODELS.register("wideresnet16_1", paper="Zagoruyko and Komodakis 2016, Wide residual networks", kinds=("image",))
def wideresnet16_1(spec: Spec, width: int = 16) -> nn.Module:
    """WideResNet-16-1, 0.2 M parameters; for small images."""
    return WideResNet(spec, width=width)


for _name, _make, _paper in (
    ("vgg16", classic.vgg16, "Simonyan and Zisserman 2015, Very deep convolutional networks"),
    ("inception_v3", classic.inception_v3, "Szegedy et al. 2016, Rethinking the Inception architecture"),
    ("mobilenetv2", classic.mobilenetv2, "Sandler et al. 2018, MobileNetV2"),
    ("densenet121", classic.densenet121, "Huang et al. 2017, Densely connected convolutional networks"),
):
    MODELS.register(_name, paper=_paper, kinds=("image",))(_make)


def resolve(name: str, spec: Spec) -> str:
    """The model that "auto" (or "auto-w16") stands for on data of this kind; other names as they are."""
    if name == "auto":
        return AUTO[spec.kind]
    return re.sub(r"^auto(?=-w\d+$)", AUTO[spec.kind].partition("-")[0], name)


def create(name: str, spec: Spec, *, width: int | None = None) -> nn.Module:
    """A freshly initialized backbone for samples of `spec`.

    name: a registered name, one with its width ("resnet18-w16"), "auto", or "timm:NAME". Weights come from torch's
    global generator.
    Raises InputError for an unknown name, a width of 0 or given twice, and a model that does not take such data.
    """
    if name.startswith(library.PREFIX):
        return library.create_library(name.removeprefix(library.PREFIX), spec)
    name = resolve(name, spec)
    if suffix := re.fullmatch(r"(.+)-w(\d+)", name):
        if width is not None:
            raise InputError(f"model {name!r} names its width already; leave out width={width}.")
        name, width = suffix[1], int(suffix[2])
    entry = MODELS[name]
    if spec.kind not in entry.kinds:
        fit = ", ".join(other.name for other in MODELS if spec.kind in other.kinds)
        raise InputError(f"model {name!r} does not take data of kind {spec.kind!r}; choose one of: {fit}.")
    if width is not None and not 1 <= width <= WIDEST:
        raise InputError(f"the width of model {name!r} must be in 1..{WIDEST}, got {width}.")
    model = entry.make(spec) if width is None else entry.make(spec, width=width)
    # Faster for images, on CPU and GPU alike; but with other numbers of channels oneDNN (torch 2.15) corrupts the heap.
    even = all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))
    return model.to(memory_format=torch.channels_last) if spec.kind == "image" and even else model


def set_normalization(model: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Have `model` subtract `mean` from its input and divide by `std`, each (C,); InputError for a foreign model."""
    for module in model.modules():
        if isinstance(module, Normalize):
            return module.fit_(mean, std)
    raise InputError("the model has no Normalize layer; normalize inside your own model instead.")
