"""Layers shared by the backbones and the second head; they take and return `(h, mask)`.

`mask` is None, or `(n, 1, T)` bool for series of unequal length: True where a position holds data. Whatever a layer
computes is put back to zero elsewhere, so padding acts exactly as the zeros a convolution adds at a border, and a
padded series gets the same output as the same series cropped to its length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor | None]
CONV = {1: nn.Conv1d, 2: nn.Conv2d}


def start(x: Tensor, lengths: Tensor | None) -> State:
    """`(x, mask)` for a batch `x` (n, C, T) whose rows hold `lengths` (n,) values each; no mask without lengths."""
    if lengths is None:
        return x, None
    return x, (torch.arange(x.shape[-1], device=x.device) < lengths.to(x.device)[:, None]).unsqueeze(1)


def blank(h: Tensor, mask: Tensor | None) -> Tensor:
    """`h` with zeros outside the mask."""
    return h if mask is None else h.masked_fill(~mask, 0)


def average(state: State) -> Tensor:
    """Mean over all positions that hold data: (n, C, ...) -> (n, C)."""
    h, mask = state
    return h.flatten(2).mean(2) if mask is None else h.sum(2) / mask.sum(2)


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel, so that a saved model takes raw samples.

    Does nothing until `fit_`; the statistics are buffers and travel with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, *[1] * dims))
        self.register_buffer("std", torch.ones(channels, *[1] * dims))

    def fit_(self, mean: Tensor, std: Tensor) -> None:
        """Take over mean and std, each (C,); a channel that never varies keeps its scale.

        Its std is not always zero: the rounding of a mean in float32 alone leaves about 1e-6 of the mean.
        """
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(torch.where(std > 1e-5 * mean.abs(), std, 1.0).view_as(self.std))

    def forward(self, state: State) -> State:
        """`(h, mask)` -> `(normalized h, mask)`; padding stays zero."""
        h, mask = state
        return blank((h - self.mean) / self.std, mask), mask


class _Lone(nn.modules.batchnorm._BatchNorm):
    """One value a channel (a lone row on a 1 x 1 map) has no variance: PyTorch would raise in the middle of a run."""

    def forward(self, input: Tensor) -> Tensor:
        """Such a row is normalized by the running statistics, everything else as usual."""
        if input.numel() > input.shape[1]:
            return super().forward(input)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return nn.functional.batch_norm(input, *statistics, eps=self.eps)


class Norm1d(_Lone, nn.BatchNorm1d):
    """Batch norm of (n, C) or (n, C, T) that takes lone rows."""


class Norm2d(_Lone, nn.BatchNorm2d):
    """Batch norm of (n, C, H, W) that takes lone rows."""


NORM = {1: Norm1d, 2: Norm2d}


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and, where asked, ReLU; "same" padding, so kernels are odd."""

    def __init__(self, dims: int, c_in: int, c_out: int, kernel: int, stride: int = 1, relu: bool = True):
        super().__init__()
        # A strided 1x1 convolution of few channels corrupts memory in oneDNN's backward pass (channels last, CPU; its
        # issue 6035): pick the positions first, which is the same.
        pick = stride if kernel == 1 and c_in < 16 else 1
        self.pick: Any = (..., *[slice(None, None, pick)] * dims)
        self.conv = CONV[dims](c_in, c_out, kernel, stride // pick, kernel // 2, bias=False)
        self.norm = NORM[dims](c_out)
        self.stride = stride
        self.relu = relu

    def forward(self, state: State) -> State:
        """`(h, mask)` -> `(h, mask)`, both shorter by the stride."""
        h, mask = state
        h = self.conv(h[self.pick])
        if mask is not None:
            mask = mask[..., :: self.stride]
        h = self._normalize(h, mask)
        return (torch.relu(h) if self.relu else h), mask

    def _normalize(self, h: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or not self.norm.training:
            return blank(self.norm(h), mask)
        # Batch statistics must not count padding: normalize the positions that hold data as one long list.
        h, valid = h.transpose(1, 2), mask.squeeze(1)
        out = torch.zeros_like(h)
        out[valid] = self.norm(h[valid])
        return out.transpose(1, 2)


def he_init(module: nn.Module) -> None:
    """He initialization of a convolution (for `Module.apply`); all other layers keep PyTorch's."""
    if isinstance(module, nn.modules.conv._ConvNd):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
