"""`antibackdoor predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import DEFEND, app, examples
from antibackdoor.cli.options import AsJson, Device, Quiet, Reading, flat, print_json
from antibackdoor.errors import InputError


@app.command(
    rich_help_panel=DEFEND,
    epilog=examples(
        "antibackdoor predict run new-photos --out predictions.csv",
        "antibackdoor predict run cat.png --out one.csv",
    ),
)
@flat
def predict(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder that `train` wrote.")],
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="As for `train`; or files, a list, a table or an .npz without labels."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.csv",
            help="Table to write: id, predicted, probability and, where the data have labels, label.",
        ),
    ],
    reading: Reading,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict classes with a trained model; of data with a test set, that of the test set."""
    from antibackdoor.files import check_replaceable, write_csv
    from antibackdoor.runs import refuse_inside
    from antibackdoor.summary import predict_table

    if out.suffix.lower() != ".csv":
        raise InputError(f"{out} should end in .csv, which is what is written.")
    refuse_inside(out, {"source": data})
    check_replaceable(out, ["id", "predicted", "probability"])
    table = predict_table(folder, data, device=device, **reading.given())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out, table)
    right = float((table["predicted"] == table["label"]).mean()) if "label" in table and len(table) else None
    if as_json:
        print_json(ctx, {"predictions": len(table), "as_labeled": right, "out": str(out)})
    elif not quiet:
        told = "" if right is None else f", {right:.1%} as labeled"
        typer.echo(f"{len(table):,} prediction{'s' if len(table) != 1 else ''} in {out}{told}")
