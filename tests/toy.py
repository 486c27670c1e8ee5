"""Small sets that can really be learned: a smooth pattern for each class, plus noise."""

from __future__ import annotations

import math

import torch

from antibackdoor.data.core import Data, Spec
from antibackdoor.seeds import generator


def toy_images(n: int = 80, classes: int = 4, seed: int = 0, size: int = 12) -> Data:
    """`(n, 3, size, size)`: waves whose direction is the class; the patterns do not depend on `seed`."""
    noise = generator(seed, "toy images")
    y = torch.arange(n) % classes
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angles = torch.arange(classes) * math.pi / classes
    waves = torch.stack([torch.sin(2 * math.pi * 2 * (i * a.cos() + j * a.sin()) / size) for a in angles])
    x = 0.5 + 0.3 * waves[y][:, None] + 0.08 * torch.randn(n, 3, size, size, generator=noise)
    spec = Spec("image", (3, size, size), tuple(f"class {k}" for k in range(classes)))
    return Data(spec.encode(x), y, spec, [f"{seed}/{k}.png" for k in range(n)])


def toy_series(
    n: int = 80, classes: int = 3, channels: int = 2, length: int = 40, unequal: bool = False, seed: int = 0
) -> Data:
    """`(n, channels, length)`: sinusoids whose frequency is the class; `unequal`: half to full length, then zeros."""
    noise = generator(seed, "toy series")
    y = torch.arange(n) % classes
    angle = 2 * math.pi * (1 + y[:, None, None]) * torch.arange(length) / length
    x = torch.sin(angle + torch.arange(channels)[:, None]) + 0.2 * torch.randn(n, channels, length, generator=noise)
    lengths = torch.randint((length + 1) // 2, length + 1, (n,), generator=noise) if unequal else None
    if lengths is not None:
        x[(torch.arange(length) >= lengths[:, None])[:, None].expand_as(x)] = 0
    low, high = float(x.min()), float(x.max())
    spec = Spec("series", (channels, length), tuple(f"class {k}" for k in range(classes)), low, high)
    return Data(x, y, spec, [f"{seed}/{k}" for k in range(n)], lengths)
