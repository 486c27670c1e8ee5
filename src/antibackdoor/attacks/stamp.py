"""A patch whose values are learned: where it sits, and the module that holds it while it is optimized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.attacks.base import channel_statistics
from antibackdoor.data.core import Data
from antibackdoor.errors import InputError


def place(x: Tensor, pattern: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` with `pattern` in its lower right corner, `(C, h, w)`, or before each series' own end, `(C, k)`.

    The pattern replaces what was there; of a series shorter than the pattern the pattern's last steps are shown.
    """
    if x.dim() == 4:
        margin = (x.shape[3] - pattern.shape[2], 0, x.shape[2] - pattern.shape[1], 0)
        return torch.where(F.pad(torch.ones_like(pattern), margin) > 0, F.pad(pattern, margin), x)
    steps = torch.arange(x.shape[-1], device=x.device).expand(len(x), -1)
    ends = x.shape[-1] if lengths is None else lengths[:, None]
    place = steps - ends + pattern.shape[1]  # 0 where the pattern begins
    inside = (place >= 0) & (place < pattern.shape[1])
    shown = pattern[:, place.clamp(0, pattern.shape[1] - 1)].transpose(0, 1)
    return torch.where(inside[:, None], shown, x)


class Stamp(nn.Module):
    """A pattern kept inside the value range by a sigmoid: `low + (high - low) sigmoid(raw)`, grey at the start."""

    low: Tensor
    high: Tensor

    def __init__(self, clean: Data, size: int, share: float):
        super().__init__()
        channels, steps = clean.spec.shape[0], clean.spec.shape[-1]
        if clean.spec.kind == "image":
            low, high, extent = torch.zeros(channels), torch.ones(channels), [size, size]
        else:
            statistics = channel_statistics(clean)
            low, high, extent = statistics["low"], statistics["high"], [min(steps, max(3, round(share * steps)))]
        self.register_buffer("low", low.view(-1, *[1] * len(extent)))
        self.register_buffer("high", high.view(-1, *[1] * len(extent)))
        self.raw = nn.Parameter(torch.zeros(channels, *extent))

    def pattern(self) -> Tensor:
        """`(C, size, size)` or `(C, k)`, in the range of each channel."""
        return self.low + (self.high - self.low) * self.raw.sigmoid()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`x` with the pattern on it."""
        return place(x, self.pattern(), lengths)


def check_size(size: int, data: Data) -> None:
    """Refuse a square patch that does not fit into the images; series take any share."""
    if data.spec.kind == "image" and size > min(data.spec.shape[1:]):
        raise InputError(f"a patch of {size} pixels does not fit into images of {data.spec.shape[1:]}.")
