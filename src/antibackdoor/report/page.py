"""Builds `report.html` from the files of a run folder: one page that opens anywhere and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[attr-defined]

from antibackdoor.files import write_text
from antibackdoor.options import flat
from antibackdoor.report.figures import charts, sketch
from antibackdoor.report.looks import looks
from antibackdoor.report.pictures import Picture, picture
from antibackdoor.report.run import SHOWN, Run, Suspects, read_run
from antibackdoor.report.words import Measure, measure, measures, name_of, number, percent, plain, surety


@dataclass(frozen=True)
class Card:
    """One sample of the gallery."""

    row: dict[str, str]
    flagged: bool
    picture: Picture | None
    truth: str = ""


def build_report(folder: Path) -> Path:
    """Write `report.html` into a run folder from what lies there, and return its path.

    Raises InputError where the folder is no finished run or a file in it is damaged. The same folder gives the same
    page, byte for byte.
    """
    folder = Path(folder)
    page = render(read_run(folder))
    path = folder / "report.html"
    write_text(path, page)
    return path


def render(run: Run) -> str:
    """The page of a run."""
    suspects = run.suspects
    flagged, n = int(suspects.flagged.sum()), len(suspects.flagged)
    confidence = number(run.verdict.get("confidence"))
    cards, why = _cards(run)
    scripts = [_script(get_plotlyjs()), _script(_resource("charts.js"))]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            poisoned=run.verdict.get("poisoned") is True,
            judged=confidence is None or confidence > 0,
            confidence=confidence,
            surety=None if confidence is None else surety(confidence),
            calibrated=number(run.verdict.get("margin")) is not None,
            targets=[str(name) for name in _list(run.verdict.get("target_classes"))],
            evidence=[str(sentence) for sentence in _list(run.verdict.get("evidence"))],
            facts=_facts(run, flagged, n),
            flagged=flagged,
            n=n,
            subject=_subject(run),
            looks=looks(run.attention),
            sketch=sketch(suspects),
            truth=_truth(suspects),
            comparison=_comparison(run.comparison),
            charts=charts(run),
            cards=cards,
            why=why,
            listed=suspects.first[len(cards) :],
            reference=[(label, picture(x)) for label, x in run.gallery.reference] if run.gallery else [],
            groups=measures(run.metrics),
            cut=suspects.cut,
            references=_references(run.verdict),
            tables=[(name, list(flat(tree))) for name, tree in _records(run) if tree],
            plotly=scripts[0],
            script=scripts[1],
            allowed=Markup(" ".join(_fingerprint(text) for text in scripts)),
        )
    )


def _facts(run: Run, flagged: int, n: int) -> list[tuple[str, str, str]]:
    """The numbers beside the verdict: name, value, remark."""
    facts = []
    rate = number(run.verdict.get("estimated_rate"))
    if rate is not None and run.verdict.get("poisoned") is True:
        facts.append(("Estimated poison", percent(rate), "of the samples"))
    facts.append(("Flagged", f"{flagged:,}", f"of {n:,} samples"))
    if "clean_accuracy" in run.metrics:
        facts.append(_fact("clean_accuracy", run))
    if "attack_success_rate" in run.metrics:
        facts.append(_fact("attack_success_rate", run))
    return facts


def _fact(key: str, run: Run) -> tuple[str, str, str]:
    known = measure(key, run.metrics[key])
    return known.name, known.value, known.counts


def _cards(run: Run) -> tuple[list[Card], str]:
    """The most suspicious samples, and the reason that most flagged ones share, told once instead of on each card.

    Pictures are matched by id, so that none can stand beside a wrong name.
    """
    pictures = run.gallery.x if run.gallery else {}
    rows = run.suspects.first[: min(len(pictures), SHOWN) or 24]
    reasons = Counter(row["reason"] for row in rows if row.get("reason"))
    shared, times = max(reasons.items(), key=lambda item: item[1], default=("", 0))
    shared = shared if times > 1 else ""
    cards = [
        Card(
            {**row, "reason": ""} if row.get("reason") == shared else row,
            bool(flag),
            picture(pictures[row["id"]]) if row.get("id") in pictures else None,
            run.suspects.roles.get(row.get("id", ""), ""),
        )
        for row, flag in zip(rows, run.suspects.flagged, strict=False)
    ]
    return cards, shared


def _truth(suspects: Suspects) -> dict[str, int] | None:
    """Experiments: how flags and truth meet, as counts."""
    if suspects.truth is None:
        return None
    flagged, poisoned = suspects.flagged, suspects.truth
    return {
        "found": int((flagged & poisoned).sum()),
        "missed": int((~flagged & poisoned).sum()),
        "wrong": int((flagged & ~poisoned).sum()),
        "spared": int((~flagged & ~poisoned).sum()),
    }


def _comparison(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[Measure | None]]]]:
    """Column names, and for every row its name and cells; a cell that was not measured is None."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    cells = [
        (str(row.get("name", "")), [measure(k, row[k]) if row.get(k) is not None else None for k in keys])
        for row in rows
    ]
    return [name_of(key) for key in keys], cells


def _subject(run: Run) -> list[tuple[str, str]]:
    """The few settings that say what was run; the data by the end of what the user called it, not by a fingerprint."""
    parts = [part for part in re.split(r"[\\/]", str(run.data.get("name") or "")) if part]
    named = [("data", "/".join(parts[-2:]))] if parts else []
    for key in ("data", "defense", "model", "seed"):
        value = run.config.get(key)
        if isinstance(value, dict):
            value = value.get("name") or value.get("path")
        if value not in (None, "") and (key != "data" or not named):
            named.append((key, str(value)))
    return named


def _records(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """What is kept for the record, folded away."""
    data = {key: value for key, value in run.data.items() if key != "samples_by_class"}
    return [("Data", data), ("Settings", run.config), ("Environment", run.env)]


def _references(verdict: dict[str, Any]) -> list[list[str]]:
    """Catalog, entry, name and meaning of what the finding is called elsewhere."""
    entries = [entry for entry in _list(verdict.get("references")) if isinstance(entry, dict)]
    return [[str(entry.get(key, "")) for key in ("framework", "id", "name", "why")] for entry in entries]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _score(value: str) -> str:
    """A number of the table in four digits, or the text as it stands."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _chance(value: str) -> str:
    try:
        return percent(float(value))
    except ValueError:
        return value


def _resource(name: str) -> str:
    """A file beside the template, from the installed package."""
    return (resources.files("antibackdoor.report") / "templates" / name).read_text(encoding="utf-8")


def _script(text: str) -> Markup:
    """Script of our own as it goes into the page: nothing in it may end the element early."""
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _fingerprint(script: str) -> str:
    """How the page's content policy names the one script text it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    def show(value: object) -> object:
        """Last step of every value that is printed: strings lose whatever cannot be seen."""
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        finalize=show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "chance": _chance}
    return environment
