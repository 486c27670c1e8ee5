"""`antibackdoor export` and `report`: something else made of a finished run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import DEFEND, app, examples
from antibackdoor.cli.options import AsJson, Quiet, RunFolder, print_json


class SuspectTable(StrEnum):
    """Which table of suspects is written."""

    suspects = "suspects"
    issues = "issues"


@app.command(
    rich_help_panel=DEFEND,
    epilog=examples(
        "antibackdoor export run suspects.parquet",
        "antibackdoor export run issues.csv --table issues",
        "antibackdoor export run model.onnx",
    ),
)
def export(
    ctx: typer.Context,
    folder: RunFolder,
    out: Annotated[
        Path, typer.Argument(metavar="FILE", help="By its ending: a table .csv or .parquet, or the model .onnx.")
    ],
    table: Annotated[
        SuspectTable, typer.Option(help="suspects: as in suspects.csv. issues: columns as in cleanlab's tables.")
    ] = SuspectTable.suspects,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write suspects as a table, or the model as ONNX, for other programs."""
    from antibackdoor.exports import export_run

    told = export_run(folder, out, table.value)
    if as_json:
        print_json(ctx, {"written": told, "out": str(out)})
    elif not quiet:
        typer.echo(told)


@app.command(
    rich_help_panel=DEFEND, epilog=examples("antibackdoor report run    after an update, or a change of metrics.json")
)
def report(folder: RunFolder) -> None:
    """Build report.html again from what lies in a run folder."""
    from antibackdoor.report import build_report

    typer.echo(str(build_report(folder)))
