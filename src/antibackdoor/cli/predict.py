"""`antibackdoor predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import DEFEND, app, examples
from antibackdoor.cli.options import Device, Quiet, Reading, flat
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder that `train` wrote.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="As for `train`; or a folder of images, one image, or an .npz with only x."
        ),
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
    quiet: Quiet = False,
) -> None:
    """Predict classes with a trained model; of data with a test set, that of the test set."""
    from antibackdoor.files import write_csv
    from antibackdoor.summary import predict_table

    table = predict_table(folder, data, device=device, **reading.given())
    if out.is_dir():
        raise InputError(f"{out} is a folder; give --out the name of a file to write.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out, table)
    if not quiet:
        right = f", {(table['predicted'] == table['label']).mean():.1%} as labeled" if "label" in table else ""
        typer.echo(f"{len(table):,} predictions in {out}{right}")
