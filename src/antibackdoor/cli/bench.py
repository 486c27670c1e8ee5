"""`antibackdoor bench`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import MEASURE, app, examples
from antibackdoor.cli.options import AsJson, Device, Quiet, console, print_json
from antibackdoor.errors import InputError, unknown


class Engine(StrEnum):
    """Where the cells of a benchmark run."""

    local = "local"
    ray = "ray"


class TableFormat(StrEnum):
    """How tables are printed."""

    markdown = "markdown"
    csv = "csv"
    latex = "latex"


@app.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "antibackdoor bench grid.toml --out results --plan    what is missing",
        "antibackdoor bench grid.toml --out results           run it, or go on",
        "antibackdoor bench grid.toml --out results --only ecg5000-blend    a part of it",
        "antibackdoor bench --out results --table             only the tables",
    ),
)
def bench(
    ctx: typer.Context,
    grid: Annotated[Path | None, typer.Argument(metavar="GRID.toml", help="Which cells to run.")] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The ledger: one JSON a cell; what lies anywhere under it is not run again."),
    ] = Path("results"),
    profile: Annotated[str | None, typer.Option(help="One of the grid's profiles.", show_default="its first")] = None,
    only: Annotated[str, typer.Option(help="Only cells in whose name this regular expression is found.")] = "",
    plan: Annotated[
        bool, typer.Option("--plan", help="Only tell which cells are done and missing, and how long they will take.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Only print tables: those that the grid declares, or of the whole ledger.")
    ] = False,
    form: Annotated[TableFormat, typer.Option("--format", help="Of the tables.")] = TableFormat.markdown,
    engine: Annotated[Engine, typer.Option(help="Processes on this machine, or a Ray cluster.")] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Cells at once on this machine; 0: no processes.", show_default="one a core"),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray: of the cluster; auto finds one on this machine.")] = None,
    cpus: Annotated[float, typer.Option("--cpus-per-cell", min=0, help="Ray: CPUs that a cell takes.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus-per-cell", min=0, help="Ray: GPUs that a cell takes.")] = 0,
    stages: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where checkpoints of unfinished cells are kept (OUT/.stages).")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of attacks x defenses x models x data sets x rates x seeds; resumable; several may share a ledger."""
    from antibackdoor.bench.declared import tables_text
    from antibackdoor.bench.engines import make_engine
    from antibackdoor.bench.grid import read_grid
    from antibackdoor.bench.ledger import Ledger
    from antibackdoor.bench.machine import cores
    from antibackdoor.bench.plan import Estimates, plan_text
    from antibackdoor.bench.run import run_cells
    from antibackdoor.data.catalog import CATALOG
    from antibackdoor.data.load import known
    from antibackdoor.progress import show_cells

    if grid is None and not table:
        raise InputError("give a grid to run, or --table to see what the ledger holds.")
    read = None if grid is None else read_grid(grid, profile)
    cells, ledger, broken = [] if read is None else read.cells(only), Ledger(out), []
    # Tables and finished cells need no data of the catalog, which may lie on another machine.
    asked = {cell.data for cell in cells if cell.name() not in ledger} if not table else set()
    if lost := sorted(name for name in asked if not known(name)):
        raise unknown("data set (and no file or folder)", lost[0], CATALOG)
    if plan and read is not None:
        done, estimates = [name for cell in cells if (name := cell.name()) in ledger], Estimates(out, device)
        if as_json:
            missing = {name: estimates.seconds(cell) for cell in cells if (name := cell.name()) not in ledger}
            print_json(ctx, {"done": done, "missing": missing, "excluded": read.excluded()})
        else:
            typer.echo(
                plan_text(cells, read.excluded(), done, estimates, max(1, cores() if workers is None else workers))
            )
        return
    if read is None and not len(ledger):
        raise InputError(f"{out} holds no results; name another folder with --out, or a grid to run.")
    if not table:
        chosen = make_engine(engine.value, workers=workers, address=address, cpus=cpus, gpus=gpus)
        with show_cells(console(stderr=True), quiet=quiet) as watcher:
            broken = run_cells(
                cells, ledger, chosen, stages=(stages or out / ".stages").resolve(), device=device, watcher=watcher
            )
    if as_json:
        print_json(ctx, {"cells": [cell.name() for cell in cells], "broken": broken, "out": str(out)})
    elif not quiet or table:
        typer.echo(tables_text(read, out, form.value))
    if broken:
        raise InputError(f"{len(broken)} of {len(cells)} cells broke; their *.error.json in {out} tell why.")
