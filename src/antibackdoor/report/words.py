"""Values as a reader wants to see them: readable names, percentages, counts, and text that cannot play tricks."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

from antibackdoor.errors import visible
from antibackdoor.options import flat

LONGEST = 500

NAMES = {
    "clean_accuracy": ("Clean accuracy", "clean test samples predicted as their true class"),
    "clean_accuracy_nontarget": ("Clean accuracy, other classes", "the same, without the attacked class"),
    "attack_success_rate": ("Attack success rate", "test samples with the trigger that end in the attacker's class"),
    "excess_attack_success_rate": (
        "Excess attack success rate",
        "attack success beyond what the model confuses with that class anyway",
    ),
    "recovery_accuracy": ("Recovery accuracy", "test samples with the trigger predicted as their true class"),
    "auroc": ("AUROC", "how well the score ranks poisoned over clean samples; 0.5 is chance, 1 is perfect"),
    "average_precision": ("Average precision", "area under the precision and recall curve of the score"),
    "precision_top_1_percent": ("Precision, top 1%", "poisoned samples among the most suspicious hundredth"),
    "seconds": ("Time", "wall time of the whole run"),
    "steps": ("Steps", "optimizer steps"),
    "parameters": ("Parameters", "weights of the trained model"),
}
"""Key of `metrics.json` -> readable name and what it means; any other key is spelled out from its own words."""


@dataclass(frozen=True)
class Measure:
    """One row of the metrics table, and one cell of a comparison."""

    name: str
    value: str
    counts: str = ""
    meaning: str = ""
    share: float | None = None


def plain(value: object, longest: int = LONGEST) -> str:
    """Text with everything invisible spelled out and a bounded length.

    Ids and labels come from whoever made the data: line breaks, terminal escapes, marks that reverse the reading
    direction and broken Unicode are shown as escapes, so that a name looks like what it is.
    """
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return visible(text)


def chart_text(value: object, longest: int = 28) -> str:
    """Text for a label of a chart: plotly reads a subset of HTML there, links included, so markup is escaped."""
    return html.escape(plain(value, longest), quote=False)


def name_of(key: str) -> str:
    """A readable name for a key: the known one, or its words."""
    if key in NAMES:
        return NAMES[key][0]
    words = key.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:]


def percent(value: float) -> str:
    """A share as a percentage with as many digits as it takes to tell it from 0 and from 100."""
    if not math.isfinite(value):
        return "unknown"
    shown = f"{100 * value:.1f}"
    if (shown == "0.0" and value > 0) or (shown == "100.0" and value < 1):
        return "under 0.1%" if value < 0.5 else "over 99.9%"
    return f"{shown.removesuffix('.0')}%"


def surety(confidence: float) -> str:
    """How sure a verdict is, as one would say it; the limits are ours."""
    limits = ((0.9, "very sure"), (0.75, "fairly sure"), (0.6, "not very sure"))
    return next((words for limit, words in limits if confidence >= limit), "little more than a guess")


def number(value: object) -> float | None:
    """The finite number in a JSON value, or None; true and false are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def measure(key: str, given: Any) -> Measure:
    """One measure: a bare number, or {"value", "count", "n"}."""
    value, counts, is_share = given, "", key.endswith(("accuracy", "rate", "recall", "share", "nontarget"))
    if isinstance(given, dict):
        value = given.get("value")
        count, n = number(given.get("count")), number(given.get("n"))
        if count is not None and n is not None:
            counts, is_share = f"{count:,.0f} of {n:,.0f}", True
    meaning = NAMES.get(key, ("", ""))[1]
    amount = number(value)
    if amount is None:
        return Measure(name_of(key), "unknown" if value is None else plain(value), counts, meaning)
    if is_share:
        return Measure(name_of(key), percent(amount), counts, meaning, share=min(max(amount, 0.0), 1.0))
    if key == "seconds" or key.endswith("_seconds"):
        return Measure(name_of(key), duration(amount), counts, meaning)
    shown = f"{amount:,.0f}" if amount.is_integer() and abs(amount) >= 2 else f"{amount:.4g}"
    return Measure(name_of(key), shown, counts, meaning)


def measures(metrics: dict[str, Any]) -> list[tuple[str, list[Measure]]]:
    """The metrics as groups of rows: what stands at the top level first, then every named group."""
    groups: list[tuple[str, list[Measure]]] = []
    top = [measure(k, v) for k, v in metrics.items() if not _is_group(v)]
    if top:
        groups.append(("Model", top))
    for key, inner in metrics.items():
        if _is_group(inner):
            groups.append((name_of(key), [measure(name, value) for name, value in flat(inner, stop=_is_measure)]))
    return [(name, rows) for name, rows in groups if rows]


def _is_measure(value: Any) -> bool:
    return isinstance(value, dict) and "value" in value


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) and not _is_measure(value)
