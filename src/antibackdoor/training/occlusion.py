"""Where a network looks: cover a piece of the sample, and see how much of its answer goes away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather
from antibackdoor.data.core import Data
from antibackdoor.training.objectives import forward

STEPS = {"image": 12, "series": 48}
"""Into how many strides a side, or the time, is cut; a window is two strides wide."""
CHANNELS = 6
"""Series of so many channels at most are covered one channel at a time, others in all channels at once."""

Window = tuple[slice, ...]


@torch.no_grad()
def occlusion(
    model: nn.Module,
    data: Data,
    rows: Tensor,
    fabric: Fabric,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
    size: int = 256,
) -> Tensor:
    """How much the log-odds of the given label fall where a window of a sample is covered, for each of `rows`.

    `(n, H, W)` for images and `(n, C, T)` for series, float32; above 0 where the answer rests on what lies there, in
    nats. A covered window shows what the average sample of the set has there, which is likelier than grey to be no mark
    of its own. Every place is the mean over the windows that cover it. call: as for `logits_of`.
    """
    was_training = model.training
    model.eval()
    batch = gather(data, rows, fabric.device)
    others = gather(data, torch.linspace(0, len(data) - 1, min(len(data), 512)).long(), fabric.device)
    usual = average(others.x, others.lengths)
    shape = batch.x.shape[1:]
    total = torch.zeros(batch.x.shape, device=fabric.device)
    count = torch.zeros(shape, device=fabric.device)
    with fabric.autocast():
        before = _log_odds(call(model, batch), batch.y)
        windows = list(_windows(data.spec.kind, shape))
        at_once = max(1, size // len(rows))
        for start in range(0, len(windows), at_once):
            part = windows[start : start + at_once]
            covered = _repeat(batch, len(part))
            for place, window in enumerate(part):
                own = slice(place * len(rows), (place + 1) * len(rows))
                covered.x[(own, *window)] = usual[window]
            if covered.lengths is not None:  # the padding stays padding
                covered.x.mul_(torch.arange(shape[-1], device=covered.x.device) < covered.lengths[:, None, None])
            fall = before - _log_odds(call(model, covered), covered.y).view(len(part), len(rows))
            for window, value in zip(part, fall, strict=True):
                total[(slice(None), *window)] += value.view(-1, *[1] * len(shape))
                count[window] += 1
    model.train(was_training)
    relevance = (total / count.clamp_min(1)).cpu()
    return relevance[:, 0] if data.spec.kind == "image" else relevance


def _windows(kind: str, shape: torch.Size) -> Iterator[Window]:
    """The pieces that are covered one after the other, as slices of one sample."""
    channels = [slice(None)] if kind == "image" or shape[0] > CHANNELS else [slice(c, c + 1) for c in range(shape[0])]
    starts = [_starts(length, STEPS[kind]) for length in shape[1:]]
    for channel in channels:
        for first in starts[0]:
            if len(starts) == 1:
                yield channel, first
            else:
                yield from ((channel, first, second) for second in starts[1])


def _starts(length: int, steps: int) -> list[slice]:
    stride = max(1, round(length / steps))
    last = max(length - 2 * stride, 0)
    begins = [*range(0, last, stride), last]
    return [slice(begin, begin + 2 * stride) for begin in begins]


def _log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Log-odds of the labels: logit minus the log-sum-exp of all others; unlike a probability it does not saturate."""
    own = logits.double().gather(1, y[:, None]).squeeze(1)
    others = logits.double().scatter(1, y[:, None], -torch.inf)
    return own - others.logsumexp(1)


def average(values: Tensor, lengths: Tensor | None) -> Tensor:
    """The mean of samples or of their maps, place by place; of series only over those that have not ended there."""
    if lengths is None:
        return values.mean(0)
    going = (torch.arange(values.shape[-1], device=values.device) < lengths[:, None, None]).float()
    return (values * going).sum(0) / going.sum(0).clamp_min(1)


def _repeat(batch: Batch, times: int) -> Batch:
    many = batch.x.repeat(times, *[1] * (batch.x.dim() - 1))
    lengths = None if batch.lengths is None else batch.lengths.repeat(times)
    return replace(batch, x=many, y=batch.y.repeat(times), rows=batch.rows.repeat(times), lengths=lengths)
