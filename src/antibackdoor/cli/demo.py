"""`antibackdoor demo`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import MEASURE, app, examples
from antibackdoor.cli.options import Epochs, OpenPage, Quiet, Seed, Settings, chosen_settings, console, show_in_browser


class Kind(StrEnum):
    """Which data the demo runs on."""

    image = "image"
    series = "series"
    both = "both"


@app.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "antibackdoor demo                            images and time series",
        "antibackdoor demo --kind series --out seen   one of them, into another folder",
    ),
)
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs.")] = Path("antibackdoor-demo"),
    kind: Annotated[Kind, typer.Option(help="Images, time series, or both.")] = Kind.both,
    open_report: OpenPage = None,
    epochs: Epochs = None,
    settings: Settings = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Poison real data (embedded, nothing is downloaded), train with and without a defense, and compare."""
    from antibackdoor.demo import run_demo

    kinds = ("image", "series") if kind is Kind.both else (kind.value,)
    chosen, shown = chosen_settings(settings), console(quiet=quiet)
    for path in run_demo(
        out, kinds, shown, console(stderr=True), epochs=epochs, settings=chosen, seed=seed, quiet=quiet
    ):
        show_in_browser(path.resolve().as_uri(), open_report)
