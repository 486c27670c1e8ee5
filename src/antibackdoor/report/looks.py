"""Where the network looks, as pictures and in words: the average sample with what the answer rests on drawn over it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from antibackdoor.report.pictures import HEIGHT, WIDTH, Picture, picture
from antibackdoor.report.run import Array, Attention
from antibackdoor.report.words import percent

SIDE = 224
STRIPS = 64
HEAT = np.array([[120, 40, 0], [224, 88, 30], [255, 176, 46], [255, 240, 170]], np.float64)
"""From little to much; dark to bright, so that it can be read without seeing colors."""
SPREAD = 0.3
"""Half of the weight on more than this share of the sample counts as spread all over."""


@dataclass(frozen=True)
class Look:
    """One group of samples: its picture, what it is, and where the answer lies, in words."""

    picture: Picture
    title: str
    words: str


@dataclass(frozen=True)
class Looks:
    """Suspects beside trusted samples of the same class."""

    suspects: Look
    trusted: Look
    witness: str
    label: str
    n: int
    aligned: str


def looks(attention: Attention | None) -> Looks | None:
    """The two pictures; None where nothing was recorded, or where covering any place changed nothing."""
    if attention is None or not (attention.suspects > 0).any():
        return None
    pairs = (
        (attention.suspects, attention.suspects_mean, "suspects"),
        (attention.trusted, attention.trusted_mean, "trusted samples"),
    )
    found = [
        Look(_drawn(where, mean), title, where_in_words(where, mean, attention.aligned)) for where, mean, title in pairs
    ]
    return Looks(found[0], found[1], attention.witness, attention.label, attention.n, attention.aligned)


def where_in_words(relevance: Array, mean: Array, aligned: str = "") -> str:
    """For example: strongest at the bottom right; half of it lies on 4% of the image. aligned: see `Attention`."""
    weight = np.clip(relevance, 0, None)
    if not weight.any():
        return "covering any one place changes nothing"
    ordered = np.sort(weight.ravel())[::-1]
    half = int(np.searchsorted(ordered.cumsum(), ordered.sum() / 2)) + 1
    share, image = half / weight.size, mean.ndim == 3
    if share > SPREAD:
        return f"spread over the {'image' if image else 'series'}: half of it takes {percent(share)}"
    strongest = np.unravel_index(int(weight.argmax()), weight.shape)
    if image:
        return f"strongest {_corner(strongest, weight.shape)}; half of it lies on {percent(share)} of the image"
    peak = np.flatnonzero(weight[strongest[0]] >= weight.max() * 0.8)
    channel = f" of channel {strongest[0] + 1}" if len(weight) > 1 and not np.allclose(weight, weight[:1]) else ""
    steps = _steps(peak, weight.shape[1], aligned)
    return f"strongest {steps}{channel}; half of it lies on {percent(share)} of the series"


def _steps(peak: Array, length: int, aligned: str) -> str:
    """Where the peak is in the time; series of unequal length have a start and an end in common, and no more."""
    if aligned == "end":
        if len(peak) == length - peak[0]:
            return f"in the last {len(peak):,} steps" if len(peak) > 1 else "at the last step"
        return f"around {length - 1 - int(peak.mean()):,} steps before the end"
    return f"around step {int(peak.mean()):,}" + (f" of {length:,}" if aligned == "" else "")


def _corner(place: tuple[np.intp, ...], shape: tuple[int, ...]) -> str:
    """The ninth of the image that a place is in."""
    down, across = (3 * int(at) // size for at, size in zip(place, shape, strict=True))
    words = f"{('top', '', 'bottom')[down]} {('left', '', 'right')[across]}".strip()
    return f"at the {words}" if words else "in the middle"


def _drawn(relevance: Array, mean: Array) -> Picture:
    weight = np.clip(relevance, 0, None)
    weight = (weight / (weight.max() or 1.0)) ** 1.5  # what is weak everywhere should not hide what is strong
    return _image(weight, mean) if mean.ndim == 3 else _series(weight, mean)


def _image(weight: Array, mean: Array) -> Picture:
    """The average image in grey, and the heat over it; the more of the answer, the less of the image is left."""
    grey = np.repeat(np.clip(mean, 0, 1).mean(axis=2, keepdims=True), 3, axis=2) * 190 + 20
    steps = weight[..., None] * (len(HEAT) - 1)
    low = np.minimum(steps.astype(int), len(HEAT) - 2)
    color = HEAT[low[..., 0]] * (1 - (steps - low)) + HEAT[low[..., 0] + 1] * (steps - low)
    opacity = np.clip(weight[..., None] * 1.15, 0, 0.9) * (weight[..., None] > 0.08)
    pixels = (grey * (1 - opacity) + color * opacity).astype(np.uint8)
    image = Image.fromarray(pixels)
    factor = SIDE // max(image.size)
    if factor > 1:  # drawn large here: not every reader of HTML, a mail program for example, enlarges by whole pixels
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Picture(src=Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")))


def _series(weight: Array, mean: Array) -> Picture:
    """The average series, and behind it strips as dark as the most that any channel has there."""
    strips = [float(part.max()) for part in np.array_split(weight.max(axis=0), min(STRIPS, weight.shape[1]))]
    width = WIDTH / len(strips)
    bands = [
        Markup(f'<rect x="{at * width:.4g}" y="0" width="{width * 1.02:.4g}" height="{HEIGHT}" opacity="{value:.2f}"/>')
        for at, value in enumerate(strips)
        if value >= 0.05
    ]
    return Picture(paths=picture(mean).paths, bands=Markup("").join(bands))
