"""Batch norms of several devices as one: mean and variance are those of the whole batch, wherever its samples lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Gather = Callable[[Tensor], Tensor]
"""`(...)` of this device -> `(devices, ...)` of all of them, the same everywhere."""
_ARGUMENTS = inspect.signature(F.batch_norm)


class WholeBatch(TorchFunctionMode):
    """While it is on, what is computed from a share of a batch is made that of the whole batch.

    split: whether the network sees a share at the moment. Then `F.batch_norm` takes the statistics of all shares.
    `torch.autograd.grad` gives the mean over the devices, whose gradients of a share are scaled to that (`team.Split`).
    Any network is served, whatever its layers are called: they all end in these functions.
    """

    def __init__(self, gather: Gather):
        super().__init__()
        self.gather, self.split = gather, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of every function of it."""
        if func is F.batch_norm and self.split:
            given = _ARGUMENTS.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            named = given.arguments
            if named.pop("training"):
                return _normalized(self.gather, **named)
        found = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            return tuple(None if grad is None else self.gather(grad).mean(0) for grad in found)
        return found


def _normalized(
    gather: Gather,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`F.batch_norm` in training, as its arguments are called there."""
    places = [0, *range(2, input.dim())]
    with torch.no_grad():
        var, mean = torch.var_mean(_fine(input), places, correction=0)
        own = torch.stack([mean, var, torch.full_like(mean, input.numel() / input.shape[1])])
        means, variances, counts = gather(own).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
        if running_var is not None:
            running_var.lerp_((var * total / (total - 1)).to(running_var), momentum)
    shape = [-1, *[1] * (input.dim() - 2)]
    whole: Tensor = _Standardize.apply(input, mean, (var + eps).rsqrt(), total, gather)
    scale, shift = (None if value is None else value.view(shape) for value in (weight, bias))
    whole = whole if scale is None else whole * scale
    return (whole if shift is None else whole + shift).to(input.dtype)


class _Standardize(torch.autograd.Function):
    """`(x - mean) * inverse` in float32 at least; its gradient knows that both depend on the samples of all devices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor, total: Tensor, gather: Gather) -> Tensor:
        shape = [-1, *[1] * (x.dim() - 2)]
        out = (_fine(x) - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(out, inverse, total)
        ctx.gather, ctx.dtype = gather, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, inverse, total = ctx.saved_tensors
        places, shape = [0, *range(2, out.dim())], [-1, *[1] * (out.dim() - 2)]
        own = torch.stack([grad.sum(places), (grad * out).sum(places)])
        level, slope = (ctx.gather(own).sum(0) / total).view(2, *shape)
        return ((grad - level - out * slope) * inverse.view(shape)).to(ctx.dtype), None, None, None, None


def _fine(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
