"""The demonstration: embedded real data, poisoned, then trained without and with the default defense."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from antibackdoor.bench.machine import cores
from antibackdoor.bench.poisoned import poison, write_poisoned
from antibackdoor.data.load import load
from antibackdoor.defenses import make_defense
from antibackdoor.errors import InputError
from antibackdoor.files import check_free, read_json, write_json
from antibackdoor.report import build_report
from antibackdoor.report.words import measure
from antibackdoor.training.launch import ending


@dataclass(frozen=True)
class Scene:
    """One part of the demonstration: a set, and what it is called for a reader."""

    data: str
    words: str


SCENES = {
    "image": Scene("digits", "handwritten digits"),
    "series": Scene("japanese_vowels", "spoken vowels of nine speakers"),
}
ATTACK, RATE = "badnets", 0.1
MODEL = "resnet18-w16"
RUNS = {"no defense": "none", "defended": "auto"}
ERROR = "error: "
"""What the sentence begins with by which a command tells why it failed."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For networks too small to be shared among threads, which would wait for each other most of the time."""


def run_demo(
    out: Path,
    kinds: Sequence[str],
    console: Console,
    progress_console: Console,
    *,
    epochs: int | None = None,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> list[Path]:
    """Poison the sets, run `antibackdoor train` on each with and without a defense, as many at once as there are cores.

    epochs: exactly so many for the main training, in place of the defaults. settings: options of the defense.
    Prints what came out, and returns the reports of the defended runs. Raises InputError where `out` is in use.
    """
    check_free(out)
    given = {
        "none": {"recipe.min_steps": "0"} if epochs else {},
        "auto": {**({"main.min_steps": "0"} if epochs else {}), **(settings or {})},
    }
    make_defense("auto", given["auto"])  # a wrong setting is told before anything is trained
    commands, targets = dict[str, list[str]](), dict[str, str]()
    for kind in kinds:
        scene = SCENES[kind]
        poisoned = poison(replace(load(scene.data), name=scene.data), ATTACK, {"rate": RATE}, seed=seed)
        counts, spec = poisoned.attack["counts"], poisoned.splits.train.spec
        targets[kind] = spec.classes[int(poisoned.experiment.targets[0])]
        console.print(
            f"[bold]{scene.data}[/] ({scene.words}): {ATTACK} poisons {counts['poisoned']} of {counts['n']} training "
            f"samples, so that a trigger leads to the class {escape(targets[kind])!r}.",
            soft_wrap=True,
        )
        folder = out / f"{scene.data}-poisoned"
        write_poisoned(poisoned, folder)
        for name, defense in RUNS.items():
            words = [folder / "data.npz", "--truth", folder, "--model", MODEL, "--defense", defense]
            words += ["--seed", seed, "--out", _folder(out, scene, defense)]
            words += ["--epochs", epochs] if epochs else []
            for key, value in given[defense].items():
                words += ["--set", f"{key}={value}"]
            commands[f"{scene.data}, {name}"] = ["train", *map(str, words)]
    told = Console(quiet=True) if quiet else progress_console
    run_all(dict(sorted(commands.items(), key=lambda command: "defended" not in command[0])), told)
    return [_tell(out, SCENES[kind], targets[kind], console) for kind in kinds]


def run_all(commands: dict[str, list[str]], console: Console) -> None:
    """Run the commands side by side, in this order; every line that they say is passed on under their name.

    Raises InputError where one fails: what it said of that, else how it ended.
    """
    running, env = dict[str, subprocess.Popen[str]](), {**os.environ, **ONE_THREAD}

    def run(name: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "antibackdoor.cli", *commands[name]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=env,
        )
        running[name], last = process, ""
        for line in process.stderr or ():
            last = line.strip()
            console.print(f"{name}: {last}", markup=False, highlight=False, soft_wrap=True)
        status = process.wait()
        if status and last.startswith(ERROR):
            raise InputError(last.removeprefix(ERROR))
        if status:  # killed, for example where memory is short, or broken: its last words may be of anything
            again = shlex.join(["antibackdoor", *commands[name], "--resume"])
            raise InputError(f"the run {name!r} {ending(status)}; go on with it by itself, to see why: {again}")

    pool = ThreadPoolExecutor(max_workers=cores())
    try:
        list(pool.map(run, commands))  # raises what one of them raises
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running.values():
            process.terminate()


def _tell(out: Path, scene: Scene, target: str, console: Console) -> Path:
    """Print what the two runs of a scene came to; returns the report of the defended one."""
    folders = {name: _folder(out, scene, defense) for name, defense in RUNS.items()}
    rows = [{"name": name, **_measures(folder)} for name, folder in folders.items()]
    for folder in folders.values():
        write_json(folder / "comparison.json", {"rows": rows})
        build_report(folder)
    report = folders["defended"] / "report.html"
    console.print(_table(rows))
    console.print(f"{_conclusion(rows)} {_judged(folders['defended'], target)}", soft_wrap=True)
    console.print(f"Report: {escape(str(report))}\n", soft_wrap=True)
    return report


def _folder(out: Path, scene: Scene, defense: str) -> Path:
    return out / f"{scene.data}-{'undefended' if defense == 'none' else 'defended'}"


def _measures(folder: Path) -> dict[str, Any]:
    """What is compared; how many samples a run without defense flags means nothing, so it is left out."""
    m = read_json(folder / "metrics.json")
    kept = {key: m[key] for key in ("clean_accuracy", "attack_success_rate", "excess_attack_success_rate")}
    if read_json(folder / "result.json")["flagged"]:
        kept |= {key: m["detection"][key] for key in ("flagged_precision", "flagged_recall")}
    return kept


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", *(row["name"] for row in rows), box=None, pad_edge=False)
    for key in dict.fromkeys(key for row in rows for key in row if key != "name"):
        shown = [measure(key, row[key]) if key in row else None for row in rows]
        name = next(cell.name for cell in shown if cell)
        table.add_row(name, *(f"{cell.value} [dim]{cell.counts}[/]" if cell else "" for cell in shown))
    return table


def _judged(folder: Path, target: str) -> str:
    """Whether the verdict was right."""
    verdict = read_json(folder / "verdict.json")
    if not verdict["poisoned"]:
        return "The verdict is WRONG here: it says that nothing was found."
    named = ", ".join(verdict["target_classes"])
    right = "rightly" if verdict["target_classes"] == [target] else "WRONGLY"
    return f"The verdict says that the data is poisoned and {right} names the class {escape(named)!r}."


def _conclusion(rows: list[dict[str, Any]]) -> str:
    """What the figures say, whichever way they came out."""
    before, after = (row["attack_success_rate"]["value"] for row in rows)
    if before < 0.95:
        return f"The attack did not take without a defense ({before:.0%}), so this run shows little."
    if rows[1]["excess_attack_success_rate"]["value"] < 0.1:
        return "The same data, the same network: with the defense the trigger no longer works."
    return f"The defense did NOT stop the attack here: the trigger still works on {after:.0%} of the test samples."
