"""Writes docs/filtering.svg and docs/filtering.md from the ledger, as DLP's Fig. 5: python docs/build_filtering.py"""

import statistics
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from antibackdoor.bench.ledger import read_ledger
from antibackdoor.bench.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
PANEL, GAP, LEFT, TOP, BOTTOM = 210, 34, 52, 64, 44

HEAD = """# How well detectors filter

Made from the ledger by `python docs/build_filtering.py`; do not edit. As DLP's Fig. 5: of the samples that a detector
finds most suspicious, which share is poisoned, by the share of the set that is filtered out. Mean over n seeds, in per
cent. The detectors that judge with a finished network all judge with the same one, trained on the set as it is;
`loss_drop` and `trap` watch a training of their own. Poison is 10 % of the set, so 10 % is chance, and for SIG, which
takes all its samples from the target class, no less.

![Precision of the filtered samples, by detector and attack](filtering.svg)
"""

Points = dict[str, dict[float, list[float]]]


def series(records: list[dict[str, Any]]) -> dict[tuple[str, str], Points]:
    """By (data, attack): for each detector, the precisions of all seeds at each filter rate."""
    panels: dict[tuple[str, str], Points] = {}
    for record in records:
        cell = record["cell"]
        for name, measures in record["measures"].get("detectors", {}).items():
            if cell["attack"] == "none":
                continue
            panel = panels.setdefault((cell["data"], cell["attack"]), {}).setdefault(name, {})
            for rate, value in measures["precision_at"].items():
                panel.setdefault(float(rate), []).append(value["value"])
    return dict(sorted(panels.items()))


def table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each data set, attack and detector."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        for name, measures in record["measures"].get("detectors", {}).items():
            groups.setdefault((record["cell"]["data"], record["cell"]["attack"], name), []).append(measures)
    rows = []
    for (data, attack, name), members in sorted(groups.items()):
        row: dict[str, Any] = {"data": data, "attack": attack, "detector": name}
        for rate in ("0.01", "0.05", "0.1"):
            row[f"precision, top {100 * float(rate):g} %"] = _mean(m["precision_at"][rate]["value"] for m in members)
        for short, long in (("AUROC", "auroc"), ("AP", "average_precision")):
            row[short] = _mean(m[long]["value"] for m in members if long in m)
        row["says poisoned"] = f"{sum(m['verdict']['poisoned'] for m in members)} of {len(members)}"
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(values: Any) -> str:
    values = list(values)
    return f"{100 * statistics.mean(values):.1f}" if values else ""


def drawing(panels: dict[tuple[str, str], Points]) -> str:
    """One panel for each data set and attack; the filter rates stand evenly on the axis."""
    names = sorted({name for panel in panels.values() for name in panel})
    rates = sorted({rate for panel in panels.values() for points in panel.values() for rate in points})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    width = LEFT + columns * (PANEL + GAP)
    height = TOP + lines * (PANEL + BOTTOM + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="Precision of the filtered samples">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, name in enumerate(names):
        x, color = LEFT + 190 * (number % 3), COLORS[number % len(COLORS)]
        y = 18 + 20 * (number // 3)
        parts.append(f'<path d="M{x} {y}h22" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')
    for place, ((data, attack), panel) in enumerate(panels.items()):
        x0 = LEFT + (place % columns) * (PANEL + GAP)
        y0 = TOP + (place // columns) * (PANEL + BOTTOM + GAP)
        seeds = max(len(values) for points in panel.values() for values in points.values())
        parts.append(
            f'<text x="{x0}" y="{y0 - 6}" font-weight="600">{escape(f"{data}, {attack}")} (n = {seeds})</text>'
        )
        for share in (0.0, 0.5, 1.0):
            y = y0 + PANEL * (1 - share)
            parts.append(f'<path d="M{x0} {y}h{PANEL}" stroke="#d5d9de"/>')
            parts.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end" fill="#555">{share:.0%}</text>')
        spots = {rate: x0 + PANEL * (k + 0.5) / len(rates) for k, rate in enumerate(rates)}
        for rate, x in spots.items():
            parts.append(
                f'<text x="{x:.1f}" y="{y0 + PANEL + 16}" text-anchor="middle" fill="#555">{100 * rate:g}</text>'
            )
        parts.append(
            f'<text x="{x0 + PANEL / 2}" y="{y0 + PANEL + 32}" text-anchor="middle" fill="#555">% filtered</text>'
        )
        for name, points in panel.items():
            color = COLORS[names.index(name) % len(COLORS)]
            spot = [(spots[rate], y0 + PANEL * (1 - statistics.mean(points[rate]))) for rate in sorted(points)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spot)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in spot]
    return "\n".join([*parts, "</svg>"]) + "\n"


def page() -> tuple[str, str]:
    """The text and the drawing."""
    records = list(read_ledger(ROOT / "results" / "filtering").values())
    if not series(records):
        raise SystemExit("no results yet: antibackdoor bench experiments/filtering.toml --out results/filtering")
    return "\n".join([HEAD, markdown(table(records))]), drawing(series(records))


if __name__ == "__main__":
    text, svg = page()
    (ROOT / "docs" / "filtering.md").write_text(text, encoding="utf-8")
    (ROOT / "docs" / "filtering.svg").write_text(svg, encoding="utf-8")
