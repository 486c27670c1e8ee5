"""`antibackdoor review`."""

from __future__ import annotations

import contextlib
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import DEFEND, app, examples
from antibackdoor.cli.options import OpenPage, Quiet, Undecided, UndecidedOption, show_in_browser
from antibackdoor.errors import InputError


class CleanedForm(StrEnum):
    """How a cleaned set is written."""

    npz = "npz"
    folder = "folder"
    csv = "csv"


@app.command(
    rich_help_panel=DEFEND,
    epilog=examples(
        "antibackdoor review run",
        "antibackdoor review run --export cleaned --format folder",
        "antibackdoor train photos --review run --out clean-run",
    ),
)
def review(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder that `train` or `scan` wrote.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Where the data are now, if not where the run read them.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 lets the system choose.")] = 0,
    open_page: OpenPage = None,
    out: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Write the cleaned set there and open no page.")
    ] = None,
    form: Annotated[CleanedForm, typer.Option("--format", help="Of the export.")] = CleanedForm.npz,
    undecided: UndecidedOption = Undecided.drop,
    quiet: Quiet = False,
) -> None:
    """Go through the suspects on a local page (keep, drop, relabel) and export the cleaned set."""
    from antibackdoor.review.session import open_session

    session = open_session(folder, source=data)
    if out is not None:
        from antibackdoor.review.export import export
        from antibackdoor.runs import refuse_inside

        refuse_inside(out, session.splits.source)
        told = export(session, out, form.value, undecided.value)
        if not quiet:
            typer.echo(f"{told}; in {out}")
        return
    try:
        from antibackdoor.review.server import serve
    except ImportError:
        raise InputError("the page needs two more packages: pip install 'antibackdoor[review]'.") from None

    def ready(address: str) -> None:
        typer.echo(f"Review page (for this machine only): {address}\nEnd with Ctrl-C; every decision is saved at once.")
        show_in_browser(address, open_page)

    with contextlib.suppress(KeyboardInterrupt):
        serve(session, port, ready=ready)
    if not quiet:
        source = shlex.quote(data or str((session.splits.source or {}).get("source", "DATA")))
        again = f"antibackdoor train {source} --review {shlex.quote(str(folder))} --out RUN"
        typer.echo(f"\nDecisions are in {folder / 'review.jsonl'}. Train on the cleaned set: {again}")
