"""ResNets for images and series: one skeleton, 2-D or 1-D convolutions.

Images: the CIFAR stem (one 3x3 convolution, no pooling), so that 32 x 32 pixels, or 8 x 8, are not thrown away at once.
Series: the same stages with kernels of 7 in the stem and 5 in the blocks. Kernels of 3, natural in 2-D, see too little
of a series: 5 doubles the receptive field (about 220 time steps for ResNet-18), which covers most of the UCR sets, and
odd kernels keep padding symmetric. Four stages halve the time axis three times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.models.layers import ConvNorm, Normalize, State, average, he_init, start


class Block(nn.Module):
    """Residual block: two convolutions, or three around a bottleneck (then the output has 4 x `width` channels)."""

    def __init__(self, dims: int, c_in: int, width: int, stride: int, kernel: int, bottleneck: bool):
        super().__init__()
        c_out = width * 4 if bottleneck else width
        if bottleneck:
            first, last = ConvNorm(dims, c_in, width, 1), ConvNorm(dims, width, c_out, 1, relu=False)
            self.branch = nn.Sequential(first, ConvNorm(dims, width, width, kernel, stride), last)
        else:
            first, last = ConvNorm(dims, c_in, width, kernel, stride), ConvNorm(dims, width, width, kernel, relu=False)
            self.branch = nn.Sequential(first, last)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else ConvNorm(dims, c_in, c_out, 1, stride, relu=False)

    def forward(self, state: State) -> State:
        """`(h, mask)` -> `(h, mask)`, both shorter by the stride."""
        (h, mask), (skip, _) = self.branch(state), self.shortcut(state)
        return torch.relu(h + skip), mask


class ResNet(nn.Module):
    """ResNet with stages `layer1` to `layer4`, whose inputs and outputs are `(h, mask)`, and a linear layer `fc`.

    stages: number of blocks in each; width: channels of the first stage, doubled at every next one.
    """

    def __init__(self, spec: Spec, stages: Sequence[int], *, bottleneck: bool, width: int):
        super().__init__()
        dims, stem, kernel = (2, 3, 3) if spec.kind == "image" else (1, 7, 5)
        self.normalize = Normalize(dims, spec.shape[0])
        self.stem = ConvNorm(dims, spec.shape[0], width, stem)
        channels, layers = width, []
        for i, blocks in enumerate(stages):
            stage = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Block(dims, channels, width << i, stride, kernel, bottleneck))
                channels = (width << i) * (4 if bottleneck else 1)
            layers.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.fc = nn.Linear(channels, len(spec.classes))
        self.apply(he_init)

    def embed(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Penultimate features `(n, D)` of `x` (n, C, H, W) in [0, 1], or (n, C, T) with `lengths` (n,) or None."""
        state: State = self.stem(self.normalize(start(x, lengths)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            state = stage(state)
        return average(state)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `(n, K)`."""
        logits: Tensor = self.fc(self.embed(x, lengths))
        return logits
