"""`antibackdoor poison`."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antibackdoor.cli.frame import MEASURE, app, examples
from antibackdoor.cli.options import (
    AsJson,
    Config,
    Device,
    Out,
    Quiet,
    ReadingSets,
    Seed,
    Settings,
    Source,
    chosen_settings,
    console,
    flat,
    print_json,
)


class Format(StrEnum):
    """How a poisoned set is written."""

    npz = "npz"
    folder = "folder"


@app.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "antibackdoor poison digits --attack badnets --rate 0.1 --target 0 --out poisoned",
        "antibackdoor poison photos --test held-out --attack blend --format folder --out poisoned",
        "antibackdoor list attacks blend       its hyper-parameters",
    ),
)
@flat
def poison(
    ctx: typer.Context,
    data: Source,
    attack: Annotated[str, typer.Option(help="See `list attacks`.")],
    out: Out,
    reading: ReadingSets,
    rate: Annotated[float | None, typer.Option(help="Poisoned share of the whole training set.")] = None,
    target: Annotated[str | None, typer.Option(metavar="CLASS", help="Name or number of the class to lead to.")] = None,
    settings: Settings = None,
    seed: Seed = 0,
    form: Annotated[Format, typer.Option("--format", help="One .npz, or the kind of files that came in.")] = Format.npz,
    stages: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where an attack that trains something is kept and found again.")
    ] = None,
    device: Device = "auto",
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Poison a training set on purpose, for experiments."""
    from antibackdoor.bench.poisoned import poison as make
    from antibackdoor.bench.poisoned import write_poisoned
    from antibackdoor.data.file_lists import is_manifest
    from antibackdoor.files import check_free
    from antibackdoor.progress import show
    from antibackdoor.runs import refuse_inside
    from antibackdoor.training.job import make_fabric

    chosen = chosen_settings(settings, ctx)
    chosen |= {name: value for name, value in (("rate", rate), ("target", target)) if value is not None}
    check_free(out)
    splits = reading.load(data)
    refuse_inside(out, splits.source)
    with show(console(stderr=True), quiet=quiet, title=attack) as progress:
        poisoned = make(splits, attack, chosen, seed=seed, fabric=make_fabric(device), kept=stages, progress=progress)
    came_as_manifest = form is Format.folder and Path(data).suffix.lower() == ".csv" and is_manifest(Path(data))
    write_poisoned(poisoned, out, form="manifest" if came_as_manifest else form.value)
    if as_json:
        print_json(ctx, {**poisoned.attack, "out": str(out)})
    elif not quiet:
        counts, stealth = poisoned.attack["counts"], poisoned.attack["stealth"]
        names = {"psnr": "PSNR", "ssim": "SSIM", "relative_l2": "relative L2", "max_deviation": "largest deviation"}
        shown = [f"{names[key]} {stealth[key]['value']:.3g}" for key in names if stealth.get(key, {}).get("n")]
        visible = f"; {', '.join(shown)}" if shown else ""  # where nothing is poisoned, there is nothing to see
        typer.echo(
            f"{counts['poisoned']:,} of {counts['n']:,} samples poisoned ({counts['rate_of_set']:.1%} of the set, "
            f"{counts['rate_of_class']:.1%} of the target class) in {out}{visible}\n"
            f"Next: antibackdoor train {shlex.quote(str(out))} --truth {shlex.quote(str(out))} --out RUN"
        )
