"""WideResNet-16-1 for images (Zagoruyko and Komodakis 2016): the small network of the ABL and NAD papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.models.layers import Normalize, he_init


class PreActivation(nn.Module):
    """Residual block that normalizes and activates BEFORE each convolution; a shortcut starts after the first ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.pick = stride if c_in < 16 else 1  # see ConvNorm
        same = stride == 1 and c_in == c_out
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride // self.pick, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) -> (n, c_out, H / stride, W / stride)."""
        h = torch.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(h[..., :: self.pick, :: self.pick])
        h = self.conv2(torch.relu(self.norm2(self.conv1(h))))
        out: Tensor = skip + h
        return out


class WideResNet(nn.Module):
    """Pre-activation ResNet of depth 16 with groups `block1` to `block3` (plain tensors) of width, 2 and 4 x width."""

    def __init__(self, spec: Spec, *, width: int):
        super().__init__()
        self.normalize = Normalize(2, spec.shape[0])
        self.stem = nn.Conv2d(spec.shape[0], width, 3, 1, 1, bias=False)
        self.block1 = nn.Sequential(PreActivation(width, width, 1), PreActivation(width, width, 1))
        self.block2 = nn.Sequential(PreActivation(width, 2 * width, 2), PreActivation(2 * width, 2 * width, 1))
        self.block3 = nn.Sequential(PreActivation(2 * width, 4 * width, 2), PreActivation(4 * width, 4 * width, 1))
        self.norm = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, len(spec.classes))
        self.apply(he_init)

    def embed(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Penultimate features `(n, D)` of `x` (n, C, H, W) in [0, 1]; `lengths` is there for the common signature."""
        h = self.stem(self.normalize((x, None))[0])
        h = self.block3(self.block2(self.block1(h)))
        return torch.relu(self.norm(h)).mean((2, 3))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `(n, K)`."""
        logits: Tensor = self.fc(self.embed(x, lengths))
        return logits
