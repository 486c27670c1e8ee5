"""The charts of a report as plotly figures: plain dicts, already counted and binned, so that pages stay small."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from antibackdoor.report.run import Run, Suspects
from antibackdoor.report.words import chart_text, name_of, number, percent, plain

Figure: TypeAlias = dict[str, Any]

BINS = 60
CLASSES = 25
FLAGGED, REST, MISSED, WRONGLY = "#e0672f", "#7c93ad", "#8b5cf6", "#e0b02f"
LINES = ("#3b82c4", "#8b5cf6", "#2a9d8f", "#b7791f")
STAGES = 8
NARROWEST, LETTER = 280, 6
"""Pixels between the axes of a chart on a phone, and of one letter of its text."""
MEANINGS = {
    "trap": "The trap is a shallow network that learns every sample as it is labeled; the trigger is easy for it.",
    "outsider": "Each outsider is one that never sees some classes, and says what their samples look like to it.",
    "warm-up": "In the warm-up, a second head on the shallow layers learns the easiest samples, poison among them.",
}
"""Kind of a stage -> what it is; other stages are called what they do."""
LOSSES = {"main_loss": "model", "second_loss": "second head", "witness_loss": "trap and outsiders"}
INK, GRID = "#808791", "rgba(128, 135, 145, 0.25)"  # mid-tones: readable on white and on black


@dataclass(frozen=True)
class Chart:
    """One figure with its heading and the sentence that says the same in words."""

    key: str
    title: str
    caption: str
    figure: Figure
    counts: bool = False
    """Whether the value axis counts samples and may be switched between logarithmic and linear."""


def charts(run: Run) -> list[Chart]:
    """All charts that the run has data for."""
    found = [_scores(run.suspects), _classes(run.suspects), _losses(run.history)]
    return [chart for chart in found if chart]


@dataclass(frozen=True)
class Bins:
    """The scores counted: edges, and for each group its name, its color and its counts."""

    edges: npt.NDArray[np.float64]
    groups: list[tuple[str, str, npt.NDArray[np.int64]]]


def binned(suspects: Suspects) -> Bins | None:
    """Flagged and other samples apart, and in experiments poisoned and clean ones as well.

    One edge lies on the cut, so that no bar straddles it. None for an empty table.
    """
    score, cut, flagged, truth = suspects.score, suspects.cut, suspects.flagged, suspects.truth
    if not len(score):
        return None
    low, high = float(score.min()), float(score.max())
    width = (high - low) / BINS or 1.0
    start = low if cut is None else cut
    edges = start + width * np.arange(np.floor((low - start) / width), np.ceil((high - start) / width) + 2)
    if truth is None:
        parts = [("not flagged", REST, ~flagged), ("flagged", FLAGGED, flagged)]
    else:
        parts = [
            ("clean", REST, ~flagged & ~truth),
            ("poisoned, missed", MISSED, ~flagged & truth),
            ("clean, flagged", WRONGLY, flagged & ~truth),
            ("poisoned, flagged", FLAGGED, flagged & truth),
        ]
    counted = [(name, color, np.histogram(score[mask], edges)[0]) for name, color, mask in parts]
    return Bins(edges, [group for group in counted if group[2].any()])


def sketch(suspects: Suspects) -> Markup:
    """The histogram as bare shapes in a 300 x 150 box, the height of a bar by the logarithm of its count.

    In two colors, flagged and not: it stands beside the verdict, which was not told the truth either.
    """
    bins = binned(replace(suspects, truth=None))
    if bins is None:
        return Markup("")
    shapes, width = [], 300 / (len(bins.edges) - 1)
    total = np.log1p(sum(counts for _, _, counts in bins.groups))
    floor, scale = np.zeros(len(total)), 140 / total.max()
    below = np.zeros(len(total), dtype=np.int64)
    for _, color, counts in bins.groups:
        below = below + counts
        heights = np.log1p(below) * scale
        shapes += [
            Markup(f'<rect x="{place * width:.4g}" y="{150 - top:.4g}" width="{width * 0.9:.4g}" ')
            + Markup(f'height="{top - bottom:.4g}" fill="{color}"/>')
            for place, (bottom, top) in enumerate(zip(floor, heights, strict=True))
            if top > bottom
        ]
        floor = heights
    if suspects.cut is not None and (suspects.score >= suspects.cut).sum() < 1.2 * suspects.flagged.sum():
        at = (suspects.cut - bins.edges[0]) / (bins.edges[-1] - bins.edges[0]) * 300
        shapes.append(Markup(f'<path class="cut" d="M{at:.4g},0V150"/>'))
    return Markup("").join(shapes)


def _scores(suspects: Suspects) -> Chart | None:
    """Histogram of the suspicion score."""
    bins = binned(suspects)
    if bins is None:
        return None
    score, cut, n = suspects.score, suspects.cut, len(suspects.score)
    low, high = float(score.min()), float(score.max())
    middles = (bins.edges[:-1] + bins.edges[1:]) / 2
    width = float(bins.edges[1] - bins.edges[0])
    spans = [f"{a:.4g} to {b:.4g}" for a, b in pairwise(bins.edges)]
    bars = []
    for name, color, counts in bins.groups:
        text = [f"score {span}<br>{count:,} {name}" for span, count in zip(spans, counts, strict=True)]
        bars.append(_bar(x=_rounded(middles), y=counts.tolist(), name=name, hovertext=text, color=color, width=width))
    figure = _figure(bars, "suspicion score", "samples")
    figure["layout"] |= {"barmode": "stack", "bargap": 0.0}
    figure["layout"]["yaxis"] |= {"type": "log", "dtick": 1}
    caption = f"Scores of {n:,} samples, from {low:.3g} to {high:.3g}; higher is more suspicious."
    if cut is not None:
        line = {"color": INK, "width": 1.5, "dash": "dash"}
        figure["layout"]["shapes"] = [
            {"type": "line", "x0": cut, "x1": cut, "yref": "paper", "y0": 0, "y1": 1} | {"line": line}
        ]
        figure["layout"]["annotations"] = [_note(f"cut {cut:.3g}", cut, 1.0)]
        above = int((score[~suspects.flagged] >= cut).sum())
        caption += f" The lowest flagged score, the cut, is {cut:.3g}"
        caption += f"; {above:,} samples above it were not flagged." if above else "."
    return Chart("scores", "Suspicion scores", caption, figure, counts=True)


def _classes(suspects: Suspects) -> Chart | None:
    """Flagged share of each class; the most affected where there are many."""
    if not len(suspects.label):
        return None
    size = np.bincount(suspects.label, minlength=len(suspects.classes))
    hits = np.bincount(suspects.label[suspects.flagged], minlength=len(suspects.classes))
    share = hits / np.maximum(size, 1)
    order = np.argsort(-share, kind="stable")[:CLASSES][::-1]  # the largest on top: plotly draws from below
    names = [suspects.classes[i] for i in order]
    values = [round(float(share[i]), 6) for i in order]
    places = list(range(len(order)))
    text = [
        f"{chart_text(name)}<br>{hits[i]:,} of {size[i]:,} flagged ({percent(value)})"
        for name, value, i in zip(names, values, order, strict=True)
    ]
    bars = [_bar(x=values, y=places, name="flagged", hovertext=text, color=FLAGGED, orientation="h")]
    figure = _figure(bars, "flagged share of the class", "")
    figure["layout"] |= {"height": max(200, 90 + 24 * len(order)), "bargap": 0.35}
    figure["layout"]["margin"] |= {"t": 12}
    top = max(*values, 0.01)
    figure["layout"]["xaxis"] |= {"tickformat": ",.0%" if top > 0.05 else ",.1%", "range": [0, min(top * 1.08, 1.0)]}
    # Numbers with names as ticks: plotly would merge classes of one name and sort "0", "1", "10" as numbers.
    ticks = {"tickvals": places, "ticktext": [chart_text(name) for name in names], "showgrid": False, "ticklen": 6}
    figure["layout"]["yaxis"] |= ticks | {"automargin": True, "tickcolor": "rgba(0, 0, 0, 0)"}
    most = order[-1]
    caption = "No sample of any class was flagged."
    if hits[most]:
        rest = int(hits.sum() - hits[most])
        caption = (
            f"{plain(suspects.classes[most], 60)} is hit most: {hits[most]:,} of its {size[most]:,} samples"
            f" ({percent(float(share[most]))}) are flagged, and {rest:,} in all other classes."
        )
    if len(suspects.classes) > CLASSES:
        caption += f" Shown are the {CLASSES} of {len(suspects.classes):,} classes with the largest share."
    return Chart("classes", "Flagged share by class", caption, figure)


def _losses(history: list[dict[str, Any]]) -> Chart | None:
    """Every loss in the history over the epochs of the whole run; stages as bands."""
    keys = sorted({key for row in history for key in row if key.endswith("loss") and number(row[key]) is not None})
    if not keys:
        return None
    epochs = list(range(1, len(history) + 1))
    traces = []
    for place, key in enumerate(keys):
        name = LOSSES.get(key, name_of(key.removesuffix("_loss")).lower())
        values = [_number(row.get(key)) for row in history]
        text = [
            f"{chart_text(row.get('stage', ''))}, epoch {chart_text(row.get('epoch', at))}"
            f"<br>{chart_text(name)}: {value}"
            for at, row, value in zip(epochs, history, values, strict=True)
        ]
        line = {"color": LINES[place % len(LINES)], "width": 2}
        traces.append(
            {"type": "scatter", "mode": "lines+markers", "x": epochs, "y": values, "name": chart_text(name)}
            | {"hovertext": text, "hoverinfo": "text", "line": line, "marker": {"size": 5}, "connectgaps": False}
        )
    figure = _figure(traces, "epoch of the run", "loss")
    figure["layout"]["xaxis"] |= {"range": [0.5, len(history) + 0.5], "showgrid": False}
    shapes, notes, stages, start = [], [], [], 0
    # "outsider 0", "outsider 1" and so on are one band: ten names side by side cannot be read.
    for place, (kind, rows) in enumerate(groupby(history, key=lambda row: _kind(row.get("stage", "")))):
        numbered = [str(row.get("stage", "")) for row in rows]
        length, first, last = len(numbered), numbered[0], numbered[-1]
        stage = first if first == last else f"{first} to {last.removeprefix(kind).strip()}"
        band = {"type": "rect", "x0": start + 0.5, "x1": start + length + 0.5, "yref": "paper", "y0": 0, "y1": 1}
        fill = "rgba(128, 135, 145, 0.10)" if place % 2 else "rgba(0, 0, 0, 0)"
        shapes.append(band | {"layer": "below", "line": {"width": 0}, "fillcolor": fill})
        label = chart_text(stage, 24)
        if length / len(history) * NARROWEST >= LETTER * len(label):
            notes.append(_note(label, start + 0.5, 1.0) | {"yanchor": "bottom"})  # above the curves
        stages.append((stage, kind, length))
        start += length
    figure["layout"] |= {"shapes": shapes, "annotations": notes}
    figure["layout"]["legend"] |= {"y": 1.1}
    figure["layout"]["margin"] |= {"t": 58}
    listed = [f"{plain(stage, 40)} ({length})" for stage, _, length in stages[:STAGES]]
    more = f" and {len(stages) - STAGES:,} more" if len(stages) > STAGES else ""
    caption = f"Loss on the training samples, epoch by epoch. Stages and their epochs: {', '.join(listed)}{more}."
    meant = [MEANINGS[kind] for kind in dict.fromkeys(kind for _, kind, _ in stages) if kind in MEANINGS]
    return Chart("losses", "Training", " ".join([caption, *meant]), figure)


def _kind(stage: object) -> str:
    """The name of a stage without the number that tells it from others of its kind."""
    return str(stage).rstrip("0123456789").rstrip()


def _figure(data: list[Figure], x: str, y: str) -> Figure:
    """A figure in the common style: transparent, mid-tone text, thin grid."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True, "fixedrange": False}
    layout = {
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": INK, "size": 12, "family": "system-ui, sans-serif"},
        "height": 320,
        "margin": {"l": 48, "r": 12, "t": 36, "b": 48},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "showlegend": len(data) > 1,
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": y}},
    }
    return {"data": data, "layout": layout}


def _bar(*, color: str, **fields: Any) -> Figure:
    return {"type": "bar", "hoverinfo": "text", "textposition": "none", "marker": {"color": color}} | fields


def _note(text: str, x: float, y: float) -> Figure:
    place = {"x": x, "y": y, "yref": "paper", "xanchor": "left", "yanchor": "top", "showarrow": False}
    return place | {"xshift": 4, "text": text, "font": {"size": 11, "color": INK}}


def _number(value: object) -> float | None:
    amount = number(value)
    return None if amount is None else float(f"{amount:.5g}")


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
