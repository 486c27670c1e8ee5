"""The demonstration: embedded real data, poisoned, then trained without and with the default defense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table

from antibackdoor.api import Result, train
from antibackdoor.bench.poisoned import poison, write_poisoned
from antibackdoor.data.load import load
from antibackdoor.defenses import make_defense
from antibackdoor.files import check_free, write_json
from antibackdoor.progress import show
from antibackdoor.report import build_report
from antibackdoor.report.words import measure

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Scene:
    """One part of the demonstration: a set, a small network, and what the two are called for a reader."""

    data: str
    model: str
    words: str


SCENES = {
    "image": Scene("digits", "resnet18-w8", "handwritten digits"),
    "series": Scene("japanese_vowels", "resnet18-w16", "spoken vowels of nine speakers"),
}
ATTACK, RATE = "badnets", 0.1
RUNS = {"no defense": "none", "defended": "auto"}


def run_demo(
    out: Path,
    kinds: Sequence[str],
    console: Console,
    progress_console: Console,
    *,
    epochs: int | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> list[Path]:
    """Run the scenes and print what came out; returns the reports of the defended runs.

    epochs: exactly so many for the main training, in place of the defaults. settings: options of the defense.
    Raises InputError where `out` is in use.
    """
    check_free(out)
    settings = {**({"main.min_steps": 0} if epochs else {}), **(settings or {})}
    undefended = {"recipe.min_steps": 0} if epochs else {}
    make_defense("auto", settings)  # a wrong setting is told before anything is trained
    # These networks are too small to share among threads, which on a busy machine wait for each other most of the time.
    torch.set_num_threads(1)
    reports = []
    for kind in kinds:
        scene = SCENES[kind]
        poisoned = poison(replace(load(scene.data), name=scene.data), ATTACK, {"rate": RATE}, seed=seed)
        counts, spec = poisoned.attack["counts"], poisoned.splits.train.spec
        target = spec.classes[int(poisoned.experiment.targets[0])]
        console.print(
            f"[bold]{scene.data}[/] ({scene.words}): {ATTACK} poisons {counts['poisoned']} of {counts['n']} training "
            f"samples, so that a trigger leads to the class {escape(target)!r}.",
            soft_wrap=True,
        )
        write_poisoned(poisoned, out / f"{scene.data}-poisoned")
        results: dict[str, Result] = {}
        for name, defense in RUNS.items():
            with show(progress_console, quiet=quiet, title=name) as progress:
                results[name] = train(
                    poisoned.splits,
                    defense=defense,
                    options=settings if defense == "auto" else undefended,
                    model=scene.model,
                    epochs=epochs,
                    seed=seed,
                    out=_folder(out, scene, defense),
                    progress=progress,
                    experiment=poisoned.experiment,
                )
        rows = [{"name": name, **_measures(result)} for name, result in results.items()]
        for defense in RUNS.values():
            write_json(_folder(out, scene, defense) / "comparison.json", {"rows": rows})
            build_report(_folder(out, scene, defense))
        console.print(_table(rows))
        reports.append(_folder(out, scene, "auto") / "report.html")
        console.print(
            f"{_conclusion(rows)} {_judged(results['defended'], target)}\nReport: {escape(str(reports[-1]))}\n",
            soft_wrap=True,
        )
    return reports


def _folder(out: Path, scene: Scene, defense: str) -> Path:
    return out / f"{scene.data}-{'undefended' if defense == 'none' else 'defended'}"


def _measures(result: Result) -> dict[str, Any]:
    """What is compared; how many samples a run without defense flags means nothing, so it is left out."""
    m = result.metrics
    kept = {key: m[key] for key in ("clean_accuracy", "attack_success_rate", "excess_attack_success_rate")}
    if result.suspects["flagged"].any():
        kept |= {key: m["detection"][key] for key in ("flagged_precision", "flagged_recall")}
    return kept


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", *(row["name"] for row in rows), box=None, pad_edge=False)
    for key in dict.fromkeys(key for row in rows for key in row if key != "name"):
        shown = [measure(key, row[key]) if key in row else None for row in rows]
        name = next(cell.name for cell in shown if cell)
        table.add_row(name, *(f"{cell.value} [dim]{cell.counts}[/]" if cell else "" for cell in shown))
    return table


def _judged(result: Result, target: str) -> str:
    """Whether the verdict was right."""
    verdict = result.verdict
    if not verdict.poisoned:
        return "The verdict is WRONG here: it says that nothing was found."
    named = ", ".join(verdict.target_classes)
    right = "rightly" if verdict.target_classes == [target] else "WRONGLY"
    return f"The verdict says that the data is poisoned and {right} names the class {escape(named)!r}."


def _conclusion(rows: list[dict[str, Any]]) -> str:
    """What the figures say, whichever way they came out."""
    before, after = (row["attack_success_rate"]["value"] for row in rows)
    if before < 0.95:
        return f"The attack did not take without a defense ({before:.0%}), so this run shows little."
    if rows[1]["excess_attack_success_rate"]["value"] < 0.1:
        return "The same data, the same network: with the defense the trigger no longer works."
    return f"The defense did NOT stop the attack here: the trigger still works on {after:.0%} of the test samples."
