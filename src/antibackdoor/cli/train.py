"""`antibackdoor train`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import DEFEND, app, examples
from antibackdoor.cli.options import (
    DATA,
    METHOD,
    TOLD,
    Epochs,
    Out,
    ReadingSets,
    Running,
    Source,
    Undecided,
    UndecidedOption,
    chosen_settings,
    console,
    flat,
    print_json,
)


@app.command(
    rich_help_panel=DEFEND,
    epilog=examples(
        "antibackdoor train photos --out run",
        "antibackdoor train photos --out run --epochs 30 --set trusted=0.3",
        "antibackdoor train sensors.npz --test held-out.npz --out run --json",
        "antibackdoor train --config run.toml --seed 1 --out run-1",
        "antibackdoor train photos --out run --resume    after an interruption",
    ),
)
@flat
def train(
    ctx: typer.Context,
    data: Source,
    out: Out,
    running: Running,
    reading: ReadingSets,
    defense: Annotated[
        str, typer.Option(help="auto, NAME or NAME:PROFILE; see `list defenses`.", rich_help_panel=METHOD)
    ] = "auto",
    model: Annotated[
        str, typer.Option(help="auto, NAME or NAME-wWIDTH, see `list models`; or timm:NAME.", rich_help_panel=METHOD)
    ] = "auto",
    epochs: Epochs = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Fine-tune these local weights; never pickled ones.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    clean: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A few samples known to be clean, for defenses that need them.", rich_help_panel=DATA
        ),
    ] = None,
    review: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Train on a reviewed run's data as `review` cleaned them, read as that run read them.",
            rich_help_panel=DATA,
        ),
    ] = None,
    undecided: UndecidedOption = Undecided.drop,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Tell a tracker: tensorboard, mlflow or wandb; can be repeated.", rich_help_panel=TOLD),
    ] = None,
) -> None:
    """Train a clean model, name the samples that look poisoned, and give a verdict."""
    from antibackdoor.api import train as run
    from antibackdoor.data.load import load
    from antibackdoor.defenses import make_defense
    from antibackdoor.progress import show
    from antibackdoor.summary import print_plan, print_summary, summary

    chosen = chosen_settings(running.settings, ctx)
    method = make_defense(defense, chosen)
    reading = reading if review is None else reading.as_in(review)
    splits = reading.load(data)
    trusted = clean and load(clean, **{**reading.given(), "test": None, "memory_map": None})
    if review is not None:
        from antibackdoor.review.session import open_session

        splits = open_session(review, splits).cleaned(undecided.value)
    experiment = running.experiment(splits)  # of the samples that are trained on
    told = console(stderr=True)
    plan = partial(print_plan, told, splits, defense, method, model, epochs, every=running.verbose)
    with show(told, quiet=running.quiet, every=running.verbose, plan=plan) as progress:
        result = run(
            splits,
            defense=defense,
            options=chosen,
            model=model,
            epochs=epochs,
            out=out,
            progress=progress,
            experiment=experiment,
            weights=weights,
            track=track or (),
            clean=trusted or None,
            **running.given(),
        )
    if running.as_json:
        print_json(ctx, {**summary(result, out), "notes": list(splits.notes)})
    elif not running.quiet:
        print_summary(console(), result, out)
