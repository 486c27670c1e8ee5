"""VGG-16, Inception v3, MobileNetV2 and DenseNet-121 for images of any size: stages of plain tensors, then `fc`.

Written out instead of taken from torchvision, whose networks cannot be made narrower (Inception), work in place (which
a tap would see), stop at batches of one row, and shrink small images away: of the reductions in the stem the first two
are left out below 64 pixels a side and the first one below 128, as the field does on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.models.layers import Norm2d, Normalize, he_init


def reductions(spec: Spec, number: int) -> list[int]:
    """The strides of a stem with this many reductions."""
    left_out = sum(min(spec.shape[1:]) < side for side in (64, 128))
    return [1] * min(left_out, number) + [2] * max(0, number - left_out)


class Unit(nn.Sequential):
    """Convolution without bias, batch norm and, where asked, ReLU (ReLU6 if `six`); "same" padding."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        relu: bool = True,
        six: bool = False,
    ):
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2)
        conv = nn.Conv2d(c_in, c_out, size, stride, padding, groups=groups, bias=False)
        super().__init__(conv, Norm2d(c_out), *([nn.ReLU6() if six else nn.ReLU()] if relu else []))


class Classic(nn.Module):
    """Stages in a row, global average, linear layer `fc`; stages are children by name, so that any can be tapped."""

    def __init__(self, spec: Spec, stages: Mapping[str, nn.Module], features: int):
        super().__init__()
        self.normalize = Normalize(2, spec.shape[0])
        self.stages = list(stages)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.fc = nn.Linear(features, len(spec.classes))
        self.apply(he_init)

    def embed(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Penultimate features `(n, D)` of `x` (n, C, H, W) in [0, 1]; `lengths` is there for the common signature."""
        h, _ = self.normalize((x, None))
        for name in self.stages:
            h = self.get_submodule(name)(h)
        features: Tensor = h.mean((2, 3))
        return features

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `(n, K)`."""
        logits: Tensor = self.fc(self.embed(x, lengths))
        return logits


def vgg16(spec: Spec, width: int = 64) -> nn.Module:
    """VGG-16 with batch norm and one linear layer; 13 convolutions in 5 stages."""
    channels, stages = spec.shape[0], {}
    for i, depth in enumerate((2, 2, 3, 3, 3)):
        out = width * min(2**i, 8)
        units = [Unit(channels if j == 0 else out, out) for j in range(depth)]
        stages[f"stage{i + 1}"] = nn.Sequential(*units, nn.MaxPool2d(2, ceil_mode=True))
        channels = out
    return Classic(spec, stages, channels)


class Inverted(nn.Module):
    """Inverted residual: widen by a 1x1 convolution, filter each channel by itself, narrow without ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int):
        super().__init__()
        hidden = c_in * expand
        widen = [Unit(c_in, hidden, 1, six=True)] if expand > 1 else []
        each = Unit(hidden, hidden, 3, stride, groups=hidden, six=True)
        self.branch = nn.Sequential(*widen, each, Unit(hidden, c_out, 1, relu=False))
        self.same = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) -> (n, c_out, H / stride, W / stride)."""
        h: Tensor = self.branch(x)
        return x + h if self.same else h


def mobilenetv2(spec: Spec, width: int = 32) -> nn.Module:
    """MobileNetV2: depthwise convolutions in inverted residual blocks."""

    def scaled(channels: int) -> int:
        return max(1, round(channels * width / 32))

    first, second = reductions(spec, 2)
    stages: dict[str, nn.Module] = {"stem": Unit(spec.shape[0], width, 3, first, six=True)}
    plan = ((16, 1, 1), (24, 2, second), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    channels = width
    for i, (base, depth, stride) in enumerate(plan):
        blocks = []
        for j in range(depth):
            blocks.append(Inverted(channels, scaled(base), stride if j == 0 else 1, expand=6 if i else 1))
            channels = scaled(base)
        stages[f"stage{i + 1}"] = nn.Sequential(*blocks)
    stages["last"] = Unit(channels, scaled(1280), 1, six=True)
    return Classic(spec, stages, scaled(1280))


class Dense(nn.Module):
    """A dense layer: `growth` new channels, from 1x1 and 3x3 convolutions of all channels so far, are added to them."""

    def __init__(self, c_in: int, growth: int):
        super().__init__()
        self.norm1, self.norm2 = Norm2d(c_in), Norm2d(4 * growth)
        self.conv1 = nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) -> (n, c_in + growth, H, W)."""
        h = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(h)))], 1)


def densenet121(spec: Spec, width: int = 64) -> nn.Module:
    """DenseNet-121; grows by half of its width in each layer."""
    growth, channels = max(1, width // 2), width
    first, second = reductions(spec, 2)
    stem: list[nn.Module] = [Unit(spec.shape[0], width, 7 if first == 2 else 3, first)]
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(*stem, *([nn.MaxPool2d(3, 2, 1)] if second == 2 else []))}
    for i, depth in enumerate((6, 12, 24, 16)):
        layers: list[nn.Module] = [Dense(channels + j * growth, growth) for j in range(depth)]
        channels += depth * growth
        layers += [Norm2d(channels), nn.ReLU()]
        if i < 3:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2, ceil_mode=True)]
            channels //= 2
        stages[f"stage{i + 1}"] = nn.Sequential(*layers)
    return Classic(spec, stages, channels)


class Branches(nn.ModuleList):
    """Branches that see the same input; their outputs are concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) -> (n, sum of the branches' channels, H', W')."""
        return torch.cat([branch(x) for branch in self], 1)


class Mixer:
    """The blocks of Inception v3; channels are those of the published network times `scale`."""

    def __init__(self, scale: float):
        self.scale = scale

    def count(self, *channels: int) -> int:
        """The sum of these numbers of channels, scaled one by one."""
        return sum(max(1, round(c * self.scale)) for c in channels)

    def row(self, c_in: int, *units: tuple[int, int | tuple[int, int]], stride: int = 1) -> nn.Sequential:
        """Units one after the other, each (channels, kernel); the stride is the last one's."""
        made = []
        for i, (c_out, kernel) in enumerate(units):
            made.append(Unit(c_in, self.count(c_out), kernel, stride if i == len(units) - 1 else 1))
            c_in = self.count(c_out)
        return nn.Sequential(*made)

    def pooled(self, c_in: int, c_out: int) -> nn.Sequential:
        """Average pool and 1x1 convolution."""
        return nn.Sequential(nn.AvgPool2d(3, 1, 1), self.row(c_in, (c_out, 1)))

    def small(self, c_in: int, pool: int) -> nn.Module:
        """Kernels 1, 5 and 3."""
        fine = self.row(c_in, (64, 1), (96, 3), (96, 3))
        return Branches([self.row(c_in, (64, 1)), self.row(c_in, (48, 1), (64, 5)), fine, self.pooled(c_in, pool)])

    def shrink_small(self, c_in: int) -> nn.Module:
        """Half the side; keeps `c_in` channels beside the new ones."""
        fine = self.row(c_in, (64, 1), (96, 3), (96, 3), stride=2)
        return Branches([self.row(c_in, (384, 3), stride=2), fine, nn.MaxPool2d(3, 2, 1)])

    def long(self, c_in: int, c: int) -> nn.Module:
        """Kernels of 7 in one direction."""
        across, down = (1, 7), (7, 1)
        once = self.row(c_in, (c, 1), (c, across), (192, down))
        twice = self.row(c_in, (c, 1), (c, down), (c, across), (c, down), (192, across))
        return Branches([self.row(c_in, (192, 1)), once, twice, self.pooled(c_in, 192)])

    def shrink_long(self, c_in: int) -> nn.Module:
        """Half the side again."""
        once = self.row(c_in, (192, 1), (320, 3), stride=2)
        long = self.row(c_in, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), stride=2)
        return Branches([once, long, nn.MaxPool2d(3, 2, 1)])

    def wide(self, c_in: int) -> nn.Module:
        """Kernels of 3 in one direction, side by side."""

        def both() -> Branches:
            c = self.count(384)
            return Branches([self.row(c, (384, (1, 3))), self.row(c, (384, (3, 1)))])

        once = nn.Sequential(self.row(c_in, (384, 1)), both())
        twice = nn.Sequential(self.row(c_in, (448, 1), (384, 3)), both())
        return Branches([self.row(c_in, (320, 1)), once, twice, self.pooled(c_in, 192)])


def inception_v3(spec: Spec, width: int = 32) -> nn.Module:
    """Inception v3 without its auxiliary head."""
    mix = Mixer(width / 32)
    first, second, third = reductions(spec, 3)
    pools = [[nn.MaxPool2d(3, 2, 1)] if stride == 2 else [] for stride in (second, third)]
    thin, thick = mix.row(width, (32, 3), (64, 3)), mix.row(mix.count(64), (80, 1), (192, 3))
    stem = nn.Sequential(Unit(spec.shape[0], width, 3, first), thin, *pools[0], thick, *pools[1])
    a, b = mix.count(64, 64, 96, 32), mix.count(64, 64, 96, 64)
    c, d = b + mix.count(384, 96), mix.count(192, 192, 192, 192)
    e, last = d + mix.count(320, 192), mix.count(320, 384, 384, 384, 384, 192)
    return Classic(
        spec,
        {
            "stem": stem,
            "stage1": nn.Sequential(mix.small(mix.count(192), 32), mix.small(a, 64), mix.small(b, 64)),
            "stage2": mix.shrink_small(b),
            "stage3": nn.Sequential(mix.long(c, 128), *(mix.long(d, k) for k in (160, 160, 192))),
            "stage4": mix.shrink_long(d),
            "stage5": nn.Sequential(mix.wide(e), mix.wide(last)),
        },
        last,
    )
