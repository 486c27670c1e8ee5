"""`antibackdoor scan`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from antibackdoor.cli.frame import DEFEND, app, examples
from antibackdoor.cli.options import (
    METHOD,
    Out,
    ReadingSets,
    Running,
    Source,
    chosen_settings,
    console,
    flat,
    print_json,
)
from antibackdoor.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from antibackdoor.data.core import Spec


@app.command(
    rich_help_panel=DEFEND,
    epilog=examples(
        "antibackdoor scan photos --out scan",
        "antibackdoor scan photos --out scan --fail-on-poison    status 3 where they look poisoned",
        "antibackdoor scan photos --out scan --detector spectral_signatures --network run",
    ),
)
@flat
def scan(
    ctx: typer.Context,
    data: Source,
    out: Out,
    running: Running,
    reading: ReadingSets,
    fail_on_poison: Annotated[
        bool, typer.Option("--fail-on-poison", help="End with status 3 where the data look poisoned: a gate.")
    ] = False,
    detector: Annotated[str, typer.Option(help="auto or NAME; see `list detectors`.", rich_help_panel=METHOD)] = "auto",
    model: Annotated[
        str,
        typer.Option(
            help="What the detector trains: auto, NAME or NAME-wWIDTH; see `list models`.", rich_help_panel=METHOD
        ),
    ] = "auto",
    network: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Judge with the model of a run folder instead of training one.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the data in the detector's training.", rich_help_panel=METHOD),
    ] = None,
) -> None:
    """Only look for poison: verdict and suspects, for less than `train` costs."""
    from antibackdoor.detectors import make_detector
    from antibackdoor.progress import show
    from antibackdoor.scanning import MODEL
    from antibackdoor.scanning import scan as run
    from antibackdoor.summary import flagged_rows, print_plan, print_summary, summary

    chosen = chosen_settings(running.settings, ctx)
    method = make_detector(detector, chosen)
    if fail_on_poison and not method.decides:
        raise InputError(f"the detector {detector!r}, so set, only ranks samples; a gate needs a verdict.")
    splits = reading.load(data)
    experiment = running.experiment(splits)
    told, trained = console(stderr=True), MODEL if model == "auto" else model
    plan = partial(print_plan, told, splits, detector, method, trained, epochs, every=running.verbose)
    with show(told, quiet=running.quiet, every=running.verbose, plan=plan) as progress:
        found = run(
            splits,
            detector=detector,
            options=chosen,
            model=model,
            network=None if network is None else _model_for(network, splits.train.spec),
            epochs=epochs,
            out=out,
            progress=progress,
            experiment=experiment,
            **running.given(),
        )
    if running.as_json:
        print_json(ctx, {**summary(found, out), "notes": list(splits.notes), "suspects": flagged_rows(found)})
    elif not running.quiet:
        print_summary(console(), found, out)
    if fail_on_poison and found.verdict.poisoned:
        raise typer.Exit(3)
    if fail_on_poison and not found.verdict.judged:
        raise InputError(f"the data could not be judged, so they do not pass: {' '.join(found.verdict.evidence)}")


def _model_for(folder: Path, wanted: Spec) -> nn.Module:
    """The model of a run, if it was made for such samples; of other classes its answers mean something else."""
    from antibackdoor.runs import load_model

    model, spec = load_model(folder)
    if (spec.kind, spec.shape[0]) != (wanted.kind, wanted.shape[0]):
        raise InputError(
            f"the model in {folder} takes data of kind {spec.kind!r} with {spec.shape[0]} channels, but these are of "
            f"kind {wanted.kind!r} with {wanted.shape[0]}."
        )
    if spec.classes != wanted.classes:
        raise InputError(f"the model in {folder} knows other classes than these data, or in another order.")
    return model
