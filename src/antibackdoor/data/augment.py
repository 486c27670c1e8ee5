"""Random transforms of a whole batch at once, on its device: weak and strong, for images and series.

Every row draws its own strengths, and a transform that a row does not draw gets a neutral one (factor 1, angle 0), so
there is no loop over rows and nothing waits for the device. All are pure, keep shape, dtype and device, keep images in
[0, 1] and padding of series at zero; equal generator states give equal results.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from antibackdoor.data.core import Spec


class Augmentation(Protocol):
    """The signature all share."""

    def __call__(
        self, x: Tensor, spec: Spec, generator: Generator, lengths: Tensor | None = None, *, flip: bool = True
    ) -> Tensor:
        """X, (n, C, H, W) in [0, 1] or (n, C, T) -> the same shape; flip: whether images may be mirrored."""
        ...


def none(x: Tensor, spec: Spec, generator: Generator, lengths: Tensor | None = None, *, flip: bool = True) -> Tensor:
    """The batch as it is."""
    return x


def weak(x: Tensor, spec: Spec, generator: Generator, lengths: Tensor | None = None, *, flip: bool = True) -> Tensor:
    """Images: shift by up to an eighth of a side, and mirror every other one unless `flip` or the spec forbids it.

    Series: noise of 0.03 standard deviations, a scale of N(1, 0.1) a channel and a shift of up to 5 % in time.
    """
    if spec.kind == "image":
        return _shift_and_flip(x, generator, flip and spec.mirror)
    n, _, length = x.shape
    count = _counts(x, lengths)
    moved = torch.round(_uniform((n, 1), -0.05, 0.05, generator, x) * count)
    x = _resample(x, torch.arange(length, device=x.device) - moved, count)
    scale = 1 + 0.1 * _normal((n, x.shape[1], 1), generator, x)
    return _blank((x + 0.03 * _spread(x, count) * _normal(x.shape, generator, x)) * scale, count)


def strong(
    x: Tensor,
    spec: Spec,
    generator: Generator,
    lengths: Tensor | None = None,
    *,
    flip: bool = True,
    operations: int = 2,
    magnitude: float = 1.0,
    hole: float = 0.5,
) -> Tensor:
    """Images: `weak`, then `operations` different ones of 14 a row (as RandAugment) and a square hole (cutout).

    The 14: nothing, auto contrast, equalize, brightness, contrast, saturation, sharpness, solarize, posterize,
    rotation, shear and translation along x and y.
    Series: `operations` of noise, scale, magnitude warp, time warp, a window of 90 % stretched to the length, a hole in
    time, and the loss of one channel (where there are several).
    magnitude: multiplies all strengths, which are drawn between nothing and the strongest. hole: side of the hole over
    that of the image; in time it takes 0.4 of this share of the series.
    Deviation from RandAugment: changes come in a fixed order, so that each is computed once for the whole batch.
    """
    if spec.kind == "image":
        x = _shift_and_flip(x, generator, flip and spec.mirror)
        _, colors, moves = _pick(len(x), 14, operations, generator, x).split([1, 8, 5], dim=1)
        x = _move(_recolor(x, colors, generator, magnitude), moves, generator, magnitude)
        return _cutout(x.clamp(0, 1), generator, hole)
    return _distort(x, _counts(x, lengths), generator, operations, magnitude, hole)


AUGMENTATIONS: dict[str, Augmentation] = {"none": none, "weak": weak, "strong": strong}


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator, like: Tensor) -> Tensor:
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return (drawn * (high - low) + low).to(like.device, like.dtype)


def _normal(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(like.device, like.dtype)


def _integers(n: int, low: int, high: int, generator: Generator, like: Tensor) -> Tensor:
    """`(n, 1)` numbers in low..high, both included."""
    return torch.randint(low, high + 1, (n, 1), generator=generator, device=generator.device).to(like.device)


def _pick(n: int, choices: int, k: int, generator: Generator, like: Tensor) -> Tensor:
    """`(n, choices)` bool with k random ones a row."""
    ranks = _uniform((n, choices), 0, 1, generator, like.float()).argsort(1).argsort(1)
    return ranks < k


# --- images -----------------------------------------------------------------------------------------------------------


def _shift_and_flip(x: Tensor, generator: Generator, flip: bool) -> Tensor:
    """One gather from the zero-padded batch: where a shifted row reads from, backwards if it is mirrored."""
    n, c, height, width = x.shape
    pad_h, pad_w = height // 8, width // 8
    rows = torch.arange(height, device=x.device) + _integers(n, 0, 2 * pad_h, generator, x)
    columns = torch.arange(width, device=x.device) + _integers(n, 0, 2 * pad_w, generator, x)
    if flip:
        columns = torch.where(_integers(n, 0, 1, generator, x) == 1, columns.flip(1), columns)
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    batch = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _recolor(x: Tensor, chosen: Tensor, generator: Generator, magnitude: float = 1.0) -> Tensor:
    """Auto contrast, equalize, brightness, contrast, saturation, sharpness, solarize, posterize, by `chosen` (n, 8)."""
    stretched, equal, *blended, solar, poster = chosen[:, :, None, None, None].unbind(1)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = torch.where(stretched & (high > low), (x - low) / (high - low).clamp(min=1e-6), x)
    x = torch.where(equal, _equalized(x), x)
    drawn = _uniform((len(x), 4, 1, 1, 1), max(0.0, 1 - 0.6 * magnitude), 1 + 0.6 * magnitude, generator, x).unbind(1)
    brightness, contrast, saturation, sharpness = (torch.where(on, f, 1) for on, f in zip(blended, drawn, strict=True))
    x = (x * brightness).clamp(0, 1)
    center = x.mean((1, 2, 3), keepdim=True)
    x = (center + (x - center) * contrast).clamp(0, 1)
    gray = x.mean(1, keepdim=True)
    x = (gray + (x - gray) * saturation).clamp(0, 1)
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    wide = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    smooth = (wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]) / 9  # twice as fast as avg_pool2d
    x = (smooth + (x - smooth) * sharpness).clamp(0, 1)
    threshold = _uniform((len(x), 1, 1, 1), max(0.0, 1 - 0.6 * magnitude), 1, generator, x)
    x = torch.where(solar & (x >= threshold), 1 - x, x)
    bits = _integers(len(x), 1, min(7, max(1, round(5 * magnitude))), generator, x)  # the lowest of 8 that are dropped
    step = 2.0 ** bits[:, :, None, None]
    return torch.where(poster, (torch.floor(x * 255 / step) * step / 255).to(x.dtype), x)


def _equalized(x: Tensor) -> Tensor:
    """Each channel mapped by its own cumulative histogram of 256 levels, so that all levels are equally frequent."""
    levels = (x * 255).round().long().flatten(2)
    ones = torch.ones((), dtype=torch.float32, device=x.device).expand(levels.shape)
    total = torch.zeros(*x.shape[:2], 256, dtype=torch.float32, device=x.device).scatter_add_(2, levels, ones).cumsum(2)
    first = total.gather(2, levels.amin(2, keepdim=True))
    table = ((total - first) / (levels.shape[2] - first).clamp(min=1)).clamp(0, 1)
    return torch.where(levels.shape[2] > first, table.gather(2, levels), x.flatten(2)).view_as(x).to(x.dtype)


def _move(x: Tensor, chosen: Tensor, generator: Generator, magnitude: float = 1.0) -> Tensor:
    """Rotation, shear along x or y, translation along x or y, by `chosen` (n, 5): all in one affine map a row."""
    n, _, height, width = x.shape
    on = chosen.to(x.dtype) * magnitude
    angle = on[:, 0] * _uniform((n,), -math.pi / 6, math.pi / 6, generator, x)
    shear_x = on[:, 1] * _uniform((n,), -0.3, 0.3, generator, x)
    shear_y = on[:, 2] * _uniform((n,), -0.3, 0.3, generator, x)
    offset = on[:, 3:] * _uniform((n, 2), -0.6, 0.6, generator, x)  # of a half side: up to 30 % of the image
    cos, sin, one = torch.cos(angle), torch.sin(angle), torch.ones_like(angle)
    turn = torch.stack([cos, -sin * height / width, sin * width / height, cos], 1).view(n, 2, 2)
    slant = torch.stack([one, shear_x, shear_y, one], 1).view(n, 2, 2)
    matrix = torch.cat([turn @ slant, offset[:, :, None]], 2)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _cutout(x: Tensor, generator: Generator, hole: float = 0.5) -> Tensor:
    """Zeros in a square of this share of a side around a random center; it may stick out of the image."""
    n, _, height, width = x.shape
    tall, wide = int(hole * height), int(hole * width)
    top = _integers(n, -(tall // 2), height - 1 - tall // 2, generator, x)
    left = _integers(n, -(wide // 2), width - 1 - wide // 2, generator, x)
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_h = (row >= top) & (row < top + tall)
    inside_w = (column >= left) & (column < left + wide)
    return x.masked_fill((inside_h[:, :, None] & inside_w[:, None, :]).unsqueeze(1), 0)


# --- series -----------------------------------------------------------------------------------------------------------


def _counts(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`(n, 1)` number of values in each row."""
    if lengths is None:
        return torch.full((len(x), 1), x.shape[-1], device=x.device)
    return lengths.to(x.device)[:, None]


def _blank(x: Tensor, count: Tensor) -> Tensor:
    return x.masked_fill((torch.arange(x.shape[-1], device=x.device) >= count)[:, None, :], 0)


def _spread(x: Tensor, count: Tensor) -> Tensor:
    """`(n, C, 1)` standard deviation of every row and channel over the values that are data."""
    mean = x.sum(2, keepdim=True) / count[:, :, None]
    return (_blank((x - mean) ** 2, count).sum(2, keepdim=True) / count[:, :, None]).sqrt()


def _resample(x: Tensor, positions: Tensor, count: Tensor) -> Tensor:
    """Values of `x` (n, C, T) at fractional `positions` (n, T), by linear interpolation; the ends are held."""
    positions = torch.minimum(positions.clamp(min=0), (count - 1).to(positions.dtype))
    left = positions.floor()
    share = (positions - left).to(x.dtype)[:, None, :]
    left = left.long()
    right = torch.minimum(left + 1, count - 1)
    at_left, at_right = (x.gather(2, index[:, None, :].expand_as(x)) for index in (left, right))
    return _blank(at_left + (at_right - at_left) * share, count)


def _curves(shape: tuple[int, int], length: int, generator: Generator, like: Tensor) -> Tensor:
    """`(*shape, length)` smooth random curves around 0: six knots of N(0, 1) joined by a cubic."""
    knots = _normal((*shape, 1, 6), generator, like.float())
    return F.interpolate(knots, size=(1, length), mode="bicubic", align_corners=True).squeeze(2).to(like.dtype)


def _distort(
    x: Tensor, count: Tensor, generator: Generator, operations: int = 2, magnitude: float = 1.0, hole: float = 0.5
) -> Tensor:
    """The series' half of `strong`."""
    n, c, length = x.shape
    chosen = _pick(n, 7, operations, generator, x)[:, :, None, None]
    jitter, scale, bend, warp, window, blank, drop = chosen.unbind(1)
    # In time: how fast the row is read at each step adds up to where it is read; a window reads 90 % of it.
    last = (count - 1).float()
    speed = torch.exp(0.4 * magnitude * _curves((n, 1), length, generator, x.float()).squeeze(1) * warp.squeeze(1))
    positions = speed.cumsum(1) - speed[:, :1]
    positions = positions * last / positions.gather(1, count - 1).clamp(min=1e-6)
    shorter = min(0.9, 0.1 * magnitude)
    begin = _uniform((n, 1), 0, shorter, generator, positions)
    positions = torch.where(window.squeeze(1), (1 - shorter) * positions + begin * last, positions)
    x = _resample(x, positions, count)
    # In value.
    x = x + jitter * 0.1 * magnitude * _spread(x, count) * _normal((n, c, length), generator, x)
    x = x * (1 + scale * 0.2 * magnitude * _normal((n, c, 1), generator, x))
    x = x * (1 + bend * 0.2 * magnitude * _curves((n, c), length, generator, x))
    wide = 0.4 * hole * count
    start = _uniform((n, 1), 0, 1, generator, positions) * (count - wide)
    step = torch.arange(length, device=x.device)
    x = x.masked_fill(((step >= start) & (step < start + wide))[:, None, :] & blank, 0)
    lost = (torch.arange(c, device=x.device) == _integers(n, 0, c - 1, generator, x))[:, :, None] & drop
    return _blank(x.masked_fill(lost, 0) if c > 1 else x, count)
