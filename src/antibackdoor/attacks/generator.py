"""A small network from a sample to something of the sample's own size: a pattern, or a mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.data.core import Spec
from antibackdoor.models.layers import CONV, Normalize, blank, he_init, start


class Generator(nn.Module):
    """U-Net with two halvings, `(n, C, H, W)` or `(n, C, T)` -> the same size with `outputs` channels, unbounded.

    Without batch norm, so that its output for a sample is the same in training and after, alone and in any company.
    Padding of unequal series is held at zero throughout.
    """

    def __init__(self, spec: Spec, outputs: int, width: int):
        super().__init__()
        dims, kernel = (2, 3) if spec.kind == "image" else (1, 7)

        def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
            return CONV[dims](c_in, c_out, kernel, stride, kernel // 2)

        self.normalize = Normalize(dims, spec.shape[0])
        halve = conv(width, 2 * width, 2), conv(2 * width, 4 * width, 2)
        self.down = nn.ModuleList([conv(spec.shape[0], width), *halve])
        self.up = nn.ModuleList([conv(6 * width, 2 * width), conv(3 * width, width)])
        self.last = conv(width, outputs)
        self.apply(he_init)

    def normalized_as(self, model: nn.Module) -> Generator:
        """Itself, with the normalization of `model`."""
        known = next(module for module in model.modules() if isinstance(module, Normalize))
        self.normalize.load_state_dict(known.state_dict())
        return self

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Raw outputs; the caller bounds them."""
        h, mask = self.normalize(start(x, lengths))
        skips = []
        for i, layer in enumerate(self.down):
            mask = mask[..., ::2] if mask is not None and i > 0 else mask
            h = blank(layer(h).relu(), mask)
            skips.append((h, mask))
        for layer, (skip, mask) in zip(self.up, reversed(skips[:-1]), strict=True):
            crop: Any = (
                ...,
                *[slice(size) for size in skip.shape[2:]],
            )  # a series gets the same however far it is padded
            wide = blank(F.interpolate(h, scale_factor=2)[crop], mask)
            h = blank(layer(torch.cat([wide, skip], 1)).relu(), mask)
        out: Tensor = blank(self.last(h), mask)
        return out
