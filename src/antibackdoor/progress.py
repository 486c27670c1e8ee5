"""How far a run is: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Display

if TYPE_CHECKING:
    from rich.console import Console

    from antibackdoor.bench.run import Watcher
    from antibackdoor.training.loop import Progress

QUIET_SECONDS = 5.0
"""Where there is no terminal, at most one line in this time, and one at the end of each stage."""
QUIET_SECONDS_CELLS = 60.0
"""The same for the epochs of a benchmark's cells."""


@contextmanager
def show(
    console: Console,
    *,
    quiet: bool = False,
    title: str = "",
    every: bool = False,
    plan: Callable[[], None] = lambda: None,
) -> Iterator[Progress]:
    """A `Progress` for the training loop that is shown on `console`; `title` goes before the stage's name.

    every: tell each epoch, also where there is no terminal. plan: tells what is run; called before the first stage,
    when everything that was asked for has been checked.
    """
    from antibackdoor.training.loop import Progress

    if quiet:
        yield Progress()
        return
    if not console.is_terminal:
        lines = _Lines(console, title, 0.0 if every else QUIET_SECONDS)
        yield Progress(start=_after(plan, lines.start), epoch=lines.epoch)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        TextColumn("{task.fields[rate]:.1f} steps/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}", style="dim"),
    )
    with Display(*columns, console=console) as display:
        live = _Live(display, title)
        yield Progress(start=_after(plan, live.start), step=live.step, epoch=live.epoch)


def _after(plan: Callable[[], None], start: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """`start`, with the plan told before the first stage."""
    waiting = [plan]

    def begin(stage: str, epochs: int, steps: int) -> None:
        while waiting:
            waiting.pop()()
        start(stage, epochs, steps)

    return begin


@contextmanager
def show_cells(console: Console, *, quiet: bool = False) -> Iterator[Watcher]:
    """A `Watcher` for a benchmark: a line for each cell that ends; on a terminal, a bar for each that runs."""
    from antibackdoor.bench.run import Watcher

    if quiet:
        yield Watcher()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TimeRemainingColumn(),
    )
    with Display(*columns, console=console, disable=not console.is_terminal) as display:
        yield _cells(console, display)


def _cells(console: Console, display: Display) -> Watcher:
    from antibackdoor.bench.engines import Event
    from antibackdoor.bench.run import Watcher

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    class Cells(Watcher):
        def begin(self, missing: int, done: int) -> None:
            self.missing, self.ended, self.bars, self.told = missing, 0, dict[str, TaskID](), time.monotonic()
            self.all = display.add_task("all", total=missing, unit="cells")
            say(f"{missing} cells to run, {done} done before")

        def start(self, name: str) -> None:
            self.bars[name] = display.add_task(name, total=1, unit="epochs")

        def epoch(self, name: str, content: dict[str, Any]) -> None:
            epoch, epochs, stage = content["epoch"], content["epochs"], content["stage"]
            display.update(self.bars[name], description=f"{name}: {stage}", completed=epoch, total=epochs)
            if not console.is_terminal and time.monotonic() - self.told > QUIET_SECONDS_CELLS:
                self.told = time.monotonic()
                say(f"{name}: {stage}, epoch {epoch}/{epochs}")

        def end(self, name: str, event: Event) -> None:
            display.remove_task(self.bars.pop(name))
            self.ended += event.kind != "lost"
            display.update(self.all, completed=self.ended)
            say(f"[{self.ended}/{self.missing}] {name}: {_outcome(event.kind, event.content)}")

    return Cells()


def _outcome(kind: str, content: dict[str, Any]) -> str:
    if kind != "done":
        return f"{kind}: {content['error']}"
    measures = content["measures"]
    shown = {"CA": "clean_accuracy", "ASR": "attack_success_rate", "RA": "recovery_accuracy"}
    parts = [f"{short} {100 * measures[long]['value']:.1f}" for short, long in shown.items() if long in measures]
    return f"{', '.join(parts)} in {content['cost']['seconds']:.0f} s"


class _Live:
    """One bar a stage; finished stages stay on the screen."""

    def __init__(self, display: Display, title: str):
        self.display, self.title = display, title

    def start(self, stage: str, epochs: int, steps: int) -> None:
        self.steps, self.done, self.begun = steps, 0, time.monotonic()
        name = f"{self.title}: {stage}" if self.title else stage
        self.task = self.display.add_task(name, total=epochs * steps, epoch=0, epochs=epochs, rate=0.0, losses="")

    def step(self) -> None:
        self.done += 1
        rate = self.done / max(time.monotonic() - self.begun, 1e-9)
        self.display.update(self.task, advance=1, rate=rate)

    def epoch(self, row: dict[str, Any]) -> None:
        # `completed` is set, not added to: a resumed stage starts at an epoch other than the first.
        self.display.update(self.task, completed=row["steps"], epoch=row["epoch"], losses=_losses(row))


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, console: Console, title: str, pause: float):
        self.console, self.title, self.pause, self.told = console, title, pause, 0.0

    def start(self, stage: str, epochs: int, steps: int) -> None:
        self.epochs, self.steps = epochs, steps

    def epoch(self, row: dict[str, Any]) -> None:
        from antibackdoor.bench.plan import duration

        last = row["epoch"] == self.epochs
        if not last and time.monotonic() - self.told < self.pause:
            return
        self.told = time.monotonic()
        name = f"{self.title}: {row['stage']}" if self.title else str(row["stage"])
        left = (self.epochs - row["epoch"]) * row["seconds"]
        rate = self.steps / max(row["seconds"], 1e-9)
        text = f"{name}, epoch {row['epoch']}/{self.epochs}, {rate:.1f} steps/s, {duration(left)} left, {_losses(row)}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _losses(row: dict[str, Any]) -> str:
    """The losses of both heads, or of the one there is."""
    shown = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in row.items() if key.endswith("loss")]
    return ", ".join(shown)
