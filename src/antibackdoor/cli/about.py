"""`antibackdoor list`, `doctor` and `--version`: what there is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import antibackdoor
from antibackdoor.cli.frame import ABOUT, app, examples
from antibackdoor.cli.options import AsJson, DataRoot, console, print_json


class What(StrEnum):
    """What can be listed."""

    attacks = "attacks"
    defenses = "defenses"
    detectors = "detectors"
    models = "models"
    datasets = "datasets"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"antibackdoor {antibackdoor.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    "list",
    rich_help_panel=ABOUT,
    epilog=examples(
        "antibackdoor list                     everything",
        "antibackdoor list defenses e2abl      one, with its hyper-parameters",
        "antibackdoor list datasets --json",
    ),
)
def list_(
    ctx: typer.Context,
    what: Annotated[
        What | None, typer.Argument(metavar="WHAT", help="attacks, defenses, detectors, models or datasets.")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them, with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what there is; with a name, its options."""
    from antibackdoor.listing import listing, print_listing

    found = listing(what.value if what else None, name)
    if as_json:
        print_json(ctx, found)
    else:
        print_listing(console(), found)


@app.command(
    rich_help_panel=ABOUT,
    epilog=examples(
        "antibackdoor doctor                    for a reader",
        "antibackdoor doctor --json             to go with a question or a bug",
    ),
)
def doctor(ctx: typer.Context, data_root: DataRoot = None, as_json: AsJson = False) -> None:
    """Tell versions, devices, threads, data and extras of this machine; status 1 if something is wrong."""
    from antibackdoor.doctor import examine, print_examination

    found = examine(data_root)
    if as_json:
        print_json(ctx, found)
    else:
        print_examination(console(), found)
    if found["problems"]:
        raise typer.Exit(1)
