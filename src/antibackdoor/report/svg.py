"""Line charts as small SVG files: the same text for the same data, whatever else is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLORS = ("#2a6fbb", "#d1495b", "#3a8f5c", "#b5791a", "#7a4fa3", "#1b8a9a", "#8a5a44", "#c2559d", "#5b6470", "#8a9a1b")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 360, 240, 46, 30, 40, 24
ROW = 18
"""Height of a line of the legend."""

Line = tuple[str, Sequence[tuple[float, float]]]


def chart(panels: Mapping[str, Sequence[Line]], *, x_label: str, columns: int = 2) -> str:
    """One plot a panel, side by side in `columns`, over a common range of y from 0 to 100 (per cent) or to their own.

    A line is a name and its points (x, y); lines of one name share their color, and the legend is below all panels.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name, _ in lines))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    dashes = {name: ("", "6 3", "2 3")[number // len(COLORS) % 3] for number, name in enumerate(names)}
    columns = min(columns, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns)
    width = columns * (WIDTH + GAP)
    per_row = max(1, width // 240)
    height = rows * (HEIGHT + GAP) + ROW * math.ceil(len(names) / per_row) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (title, lines) in enumerate(panels.items()):
        x, y = number % columns * (WIDTH + GAP), number // columns * (HEIGHT + GAP)
        parts.append(f'<g transform="translate({x} {y})">{_panel(title, lines, x_label, colors, dashes)}</g>')
    for number, name in enumerate(names):
        x, y = number % per_row * 240 + 8, rows * (HEIGHT + GAP) + number // per_row * ROW + 10
        parts.append(f'<path d="M{x} {y}h18" stroke="{colors[name]}" stroke-width="2" {_dash(dashes[name])}/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    title: str, lines: Sequence[Line], x_label: str, colors: Mapping[str, str], dashes: Mapping[str, str]
) -> str:
    points = [point for _, line in lines for point in line]
    xs, ys = [x for x, _ in points] or [0, 1], [y for _, y in points] or [0, 100]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_low = min(0.0, *ys)
    y_high = 100.0 if max(ys) <= 100 else max(ys)
    across, down = WIDTH - LEFT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        left = LEFT + (x - x_low) / (x_high - x_low) * across
        return f"{left:.1f} {TOP + (y_high - y) / (y_high - y_low) * down:.1f}"

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for step in range(5):
        value = y_low + (y_high - y_low) * step / 4
        height = TOP + down * (1 - step / 4)
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>')
    ticks = sorted(set(xs)) if len(set(xs)) <= 6 else [x_low + (x_high - x_low) * step / 4 for step in range(5)]
    for tick in ticks:
        left = LEFT + (tick - x_low) / (x_high - x_low) * across
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{LEFT + across / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for name, line in lines:
        path = "M" + "L".join(place(x, y) for x, y in line)
        style = f'fill="none" stroke="{colors[name]}" stroke-width="2" {_dash(dashes[name])}'
        parts.append(f'<path d="{path}" {style}/>')
        if len(line) <= 12:
            circles = (place(x, y).split() for x, y in line)
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colors[name]}"/>' for x, y in circles]
    return "".join(parts)


def _dash(dash: str) -> str:
    return f'stroke-dasharray="{dash}"' if dash else ""
