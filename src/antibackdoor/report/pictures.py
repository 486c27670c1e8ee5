"""A sample as something to look at: pixels as a PNG, a series as a few lines."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from antibackdoor.report.run import Array

LARGEST = 256
POINTS = 300
CHANNELS = 32
WIDTH, HEIGHT = 300, 150


@dataclass(frozen=True)
class Picture:
    """Either an image (`src`, a data URI) or a series (`paths`, one SVG path a channel, in a 300 x 150 box).

    bands: SVG shapes that lie behind the lines. All are made of numbers alone, hence markup that needs no escaping and
    no bound on its length.
    """

    src: Markup | None = None
    paths: tuple[Markup, ...] = ()
    note: str = ""
    bands: Markup | None = None


def picture(sample: Array) -> Picture:
    """The picture of one sample: uint8 (H, W, 1 or 3) or float (C, T)."""
    return _image(sample) if sample.ndim == 3 else _series(sample)


def _image(sample: Array) -> Picture:
    """Pixels as they are (the browser enlarges them): a trigger can be a single pixel that smoothing would hide."""
    image = Image.fromarray(np.ascontiguousarray(sample[..., 0] if sample.shape[-1] == 1 else sample[..., :3]))
    height, width = sample.shape[:2]
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(src=Markup("data:image/png;base64," + data), note=f"{width} × {height}")


def _series(sample: Array) -> Picture:
    """All channels over each other on one scale."""
    channels, length = sample.shape
    drawn = sample[:CHANNELS].astype(np.float64)
    finite = drawn[np.isfinite(drawn)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    scale = (high - low) or 1.0
    paths = []
    for channel in drawn:
        steps, values = _thin(channel)
        px = steps * (WIDTH / max(length - 1, 1))
        py = HEIGHT - 5 - (values - low) * ((HEIGHT - 10) / scale)
        keep = np.isfinite(py)
        path = "L".join(f"{a:.4g},{b:.4g}" for a, b in zip(px[keep], py[keep], strict=True))
        paths.append(Markup("M" + path if path else ""))
    drawing = f", first {CHANNELS} drawn" if channels > CHANNELS else ""
    shape = f"{length} steps" if channels == 1 else f"{length} steps, {channels} channels{drawing}"
    note = f"{shape}, from {low:.3g} to {high:.3g}"
    return Picture(paths=tuple(paths), note=note)


def _thin(channel: Array) -> tuple[Array, Array]:
    """At most POINTS points: the lowest and the highest of each stretch, since a trigger can be one short spike."""
    steps = np.arange(len(channel))
    if len(channel) <= POINTS:
        return steps, channel
    finite = np.nan_to_num(channel)
    kept: list[int] = []
    for stretch in np.array_split(steps, POINTS // 2):
        kept += sorted({int(stretch[finite[stretch].argmin()]), int(stretch[finite[stretch].argmax()])})
    return steps[kept], channel[kept]
