"""Defenses against each other: what is left of the attacks that take, and what clean accuracy it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from antibackdoor.bench.declared import Results, number
from antibackdoor.bench.grid import Grid
from antibackdoor.data.catalog import CATALOG


class Stand(NamedTuple):
    """One cell beside the undefended one of the same data, attack and seed; in per cent.

    kind: "image" or "series". excess: attack success beyond what the model confuses anyway; None on clean data. lost:
    clean accuracy of the undefended model minus this one's.
    """

    defense: str
    kind: str
    excess: float | None
    lost: float


def stands(grid: Grid, results: Results) -> Iterator[Stand]:
    """All cells of the grid that were run, by its defenses, but those of attacks that do not take."""
    undefended, found = dict[tuple[Any, ...], float](), []
    for place in grid.places:
        record = results.of(place)
        if record is None or (place.cell.attack != "none" and results.gate(place) != "takes"):
            continue
        where = tuple(place.axes[name] for name in ("data", "attack", "seed"))
        found.append((place, where, record["measures"]))
        if place.cell.defense == "none":
            undefended[where] = record["measures"]["clean_accuracy"]["value"]
    defenses = list(dict.fromkeys(place.axes["defense"] for place in grid.places))
    for place, where, measures in sorted(found, key=lambda one: defenses.index(one[0].axes["defense"])):
        if where in undefended:
            excess = measures.get("excess_attack_success_rate")
            yield Stand(
                place.axes["defense"],
                CATALOG[place.cell.data].kind,
                None if excess is None else 100 * excess["value"],
                100 * (undefended[where] - measures["clean_accuracy"]["value"]),
            )


def standing(found: list[Stand]) -> pd.DataFrame:
    """One row a defense: over how many sets, the mean and worst excess ASR, and the clean accuracy that is lost."""
    rows = []
    for defense in dict.fromkeys(one.defense for one in found):
        mine = [one for one in found if one.defense == defense]
        excess = [one.excess for one in mine if one.excess is not None]
        attacked, clean = ([one.lost for one in mine if (one.excess is None) == free] for free in (False, True))
        rows.append(
            {
                "defense": defense,
                "attacked sets": str(len(attacked)),
                "mean excess ASR": _mean(excess),
                "worst excess ASR": number(max(excess)) if excess else "",
                "CA lost on them": _mean(attacked),
                "clean sets": str(len(clean)),
                "CA lost on clean sets": _mean(clean),
            }
        )
    return pd.DataFrame(rows)


def _mean(values: list[float]) -> str:
    return number(sum(values) / len(values)) if values else ""
