"""The command line: thin, and slow to import nothing before a command needs it."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import antibackdoor
from antibackdoor.errors import InputError, visible

if TYPE_CHECKING:
    from rich.console import Console

DEBUG = "ANTIBACKDOOR_DEBUG"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it, ends a command as orderly as Ctrl-C does."""


class Group(TyperGroup):
    """Turns what goes wrong into a sentence and an exit status; ANTIBACKDOOR_DEBUG=1 shows tracebacks."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words of the command for the hint after an interruption."""
        ctx.meta["antibackdoor.words"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            _fail(str(error), 2)
        except KeyboardInterrupt as stop:
            words = ctx.meta["antibackdoor.words"]
            again = words + (["--resume"] if "--resume" not in words and words[:1] != ["bench"] else [])
            resumable = words[:1] in (["train"], ["scan"], ["bench"])
            hint = f"; go on with: antibackdoor {shlex.join(again)}" if resumable else "."
            terminated = isinstance(stop, Terminated)
            _fail(("terminated" if terminated else "interrupted") + hint, 143 if terminated else 130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(visible(f"{where}{error.strerror or error}."), 2)
        except MemoryError:
            _fail("the memory of this machine is used up; give fewer or smaller samples, or a smaller model.", 2)


def _examples(*lines: str) -> str:
    """Lines for the end of a help text, one below the other."""
    return "\n".join(("Examples:", *lines))


app = typer.Typer(
    cls=Group,
    name="antibackdoor",
    help="Train a clean model on images or time series nobody vouches for, and name the samples that look poisoned.",
    epilog=_examples(
        "antibackdoor demo                      see it work; the data come along",
        "antibackdoor train photos --out run    your own: a folder for each class",
        "antibackdoor review run                go through the suspects, export",
        "antibackdoor doctor                    what this machine has and lacks",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Missing(StrEnum):
    """What to do with gaps inside of series."""

    refuse = "refuse"
    interpolate = "interpolate"
    zero = "zero"


class Format(StrEnum):
    """How a poisoned set is written."""

    npz = "npz"
    folder = "folder"


class CleanedForm(StrEnum):
    """How a cleaned set is written."""

    npz = "npz"
    folder = "folder"
    csv = "csv"


class SuspectTable(StrEnum):
    """Which table of suspects is written."""

    suspects = "suspects"
    issues = "issues"


class Undecided(StrEnum):
    """What becomes of flagged samples that nobody decided about."""

    drop = "drop"
    keep = "keep"
    suggest = "suggest"


class What(StrEnum):
    """What can be listed."""

    attacks = "attacks"
    defenses = "defenses"
    detectors = "detectors"
    models = "models"
    datasets = "datasets"


class Engine(StrEnum):
    """Where the cells of a benchmark run."""

    local = "local"
    ray = "ray"


class TableFormat(StrEnum):
    """How tables are printed."""

    markdown = "markdown"
    csv = "csv"
    latex = "latex"


class Kind(StrEnum):
    """Which data the demo runs on."""

    image = "image"
    series = "series"
    both = "both"


DATA_PANEL, METHOD_PANEL, MACHINE_PANEL, TOLD_PANEL = "The data", "The method", "The machine", "What is told"

Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder of class folders, CSV manifest, .npz, .ts, .tsv, .arff, .parquet, .arrow, WebDataset .tar, folder "
        "written by `poison` or by Hugging Face's save_to_disk, or a name that `list datasets` shows.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set a hyper-parameter, as shown by `list`; can be repeated.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Everything random follows from it.", rich_help_panel=METHOD_PANEL)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE_PANEL)]
Devices = Annotated[
    int, typer.Option(min=1, help="Devices of this machine to train on together.", rich_help_panel=MACHINE_PANEL)
]
Nodes = Annotated[
    int, typer.Option(min=1, help="Machines to train on together, by torchrun.", rich_help_panel=MACHINE_PANEL)
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where NAME.npz of named data sets lie ($ANTIBACKDOOR_DATA).", rich_help_panel=DATA_PANEL
    ),
]
MissingOption = Annotated[
    Missing, typer.Option(help="What to do with gaps inside of series.", rich_help_panel=DATA_PANEL)
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out image files that are damaged.", rich_help_panel=DATA_PANEL)
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side in pixels that image files are resized to.", rich_help_panel=DATA_PANEL)
]
Test = Annotated[
    str | None, typer.Option(metavar="PATH", help="Clean test set; only used to measure.", rich_help_panel=DATA_PANEL)
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist, or be empty.")]
UndecidedOption = Annotated[
    Undecided,
    typer.Option(
        "--undecided",
        help="Reviews: what becomes of flagged samples that nobody decided about.",
        rich_help_panel=DATA_PANEL,
    ),
]
MemoryMap = Annotated[
    bool | None,
    typer.Option(
        help="Read images, or an .npz, from a copy on disk as needed, beside the data or in $ANTIBACKDOOR_CACHE.",
        show_default="where they would fill a quarter of the memory",
        rich_help_panel=DATA_PANEL,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=TOLD_PANEL)]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as JSON, for programs; progress is on stderr.", rich_help_panel=TOLD_PANEL
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Tell what is run, and every epoch.", rich_help_panel=TOLD_PANEL)
]


def _configure(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> None:
    """Take defaults from a file before the other options are read; see `settings`."""
    if path is not None:
        from antibackdoor.settings import read_settings

        known = [p.name for p in ctx.command.params if p.name and p.name not in {"config", "settings", "help"}]
        chosen, table = read_settings(path, known)
        ctx.default_map = {**(ctx.default_map or {}), **chosen}
        ctx.meta[CONFIG] = table


CONFIG = "antibackdoor.set"
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        callback=_configure,
        is_eager=True,
        help="Options from a file, and hyper-parameters in its \\[set] table; what is typed goes before it.",
    ),
]


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
    epilog=_examples(
        "antibackdoor train photos --out run",
        "antibackdoor train photos --out run --epochs 30 --set isolation_rate=0.1",
        "antibackdoor train sensors.npz --test held-out.npz --out run --json",
        "antibackdoor train --config run.toml --seed 1 --out run-1",
        "antibackdoor train photos --out run --resume    after an interruption",
    )
)
def train(
    ctx: typer.Context,
    data: Source,
    out: Out,
    test: Test = None,
    defense: Annotated[
        str, typer.Option(help="auto, NAME or NAME:PROFILE; see `list defenses`.", rich_help_panel=METHOD_PANEL)
    ] = "auto",
    settings: Settings = None,
    model: Annotated[
        str,
        typer.Option(help="auto, NAME or NAME-wWIDTH, see `list models`; or timm:NAME.", rich_help_panel=METHOD_PANEL),
    ] = "auto",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data in the main training.", rich_help_panel=METHOD_PANEL)
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, 32-true, bf16-mixed or 16-mixed.", rich_help_panel=MACHINE_PANEL)
    ] = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    image_size: ImageSize = None,
    missing: MissingOption = Missing.refuse,
    skip_unreadable: SkipUnreadable = False,
    memory_map: MemoryMap = None,
    data_root: DataRoot = None,
    clean: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A few samples known to be clean, for defenses that need them.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Experiments: folder of `poison`, to measure against the truth.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    review: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Train on a reviewed run's data as `review` cleaned them.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    undecided: UndecidedOption = Undecided.drop,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Fine-tune these local weights; never pickled ones.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Tell a tracker: tensorboard, mlflow or wandb; can be repeated.", rich_help_panel=TOLD_PANEL),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a clean model, name the samples that look poisoned, and give a verdict."""
    from antibackdoor.api import train as run
    from antibackdoor.bench.poisoned import read_experiment
    from antibackdoor.data.load import load
    from antibackdoor.progress import show
    from antibackdoor.training.launch import first

    chosen = _settings(settings, ctx)
    told = first(devices * nodes)
    quiet, verbose, as_json = quiet or not told, verbose and told, as_json and told
    splits = load(
        data,
        test=test,
        image_size=image_size,
        missing=missing.value,
        skip_unreadable=skip_unreadable,
        memory_map=memory_map,
        data_root=data_root,
    )
    splits = replace(splits, name=data)
    experiment = read_experiment(truth, splits) if truth else None
    trusted = clean and load(
        clean, image_size=image_size, missing=missing.value, skip_unreadable=skip_unreadable, data_root=data_root
    )
    if review is not None:
        from antibackdoor.review.session import open_session

        splits = open_session(review, splits).cleaned(undecided.value)
    if verbose:
        from antibackdoor.summary import print_plan

        print_plan(_console(stderr=True), splits, defense, chosen, model)
    with show(_console(stderr=True), quiet=quiet, every=verbose) as progress:
        result = run(
            splits,
            defense=defense,
            options=chosen,
            model=model,
            epochs=epochs,
            seed=seed,
            device=device,
            precision=precision,
            devices=devices,
            nodes=nodes,
            out=out,
            resume=resume,
            progress=progress,
            experiment=experiment,
            weights=weights,
            track=track or (),
            clean=trusted or None,
        )
    if as_json:
        from antibackdoor.summary import summary

        _print_json(summary(result, out))
    elif not quiet:
        from antibackdoor.summary import print_summary

        print_summary(_console(), result, out)


@app.command(
    epilog=_examples(
        "antibackdoor scan photos --out scan",
        "antibackdoor scan photos --out scan --fail-on-poison    status 3 where they look poisoned",
        "antibackdoor scan photos --out scan --detector spectral_signatures --network run",
    )
)
def scan(
    ctx: typer.Context,
    data: Source,
    out: Out,
    detector: Annotated[
        str, typer.Option(help="auto or NAME; see `list detectors`.", rich_help_panel=METHOD_PANEL)
    ] = "auto",
    fail_on_poison: Annotated[
        bool, typer.Option("--fail-on-poison", help="End with status 3 where the data look poisoned: a gate.")
    ] = False,
    settings: Settings = None,
    model: Annotated[
        str,
        typer.Option(
            help="What the detector trains: auto, NAME or NAME-wWIDTH; see `list models`.", rich_help_panel=METHOD_PANEL
        ),
    ] = "auto",
    network: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Judge with the model of a run folder instead of training one.",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the data in the detector's training.", rich_help_panel=METHOD_PANEL),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, 32-true, bf16-mixed or 16-mixed.", rich_help_panel=MACHINE_PANEL)
    ] = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    test: Test = None,
    image_size: ImageSize = None,
    missing: MissingOption = Missing.refuse,
    skip_unreadable: SkipUnreadable = False,
    memory_map: MemoryMap = None,
    data_root: DataRoot = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Experiments: folder of `poison`, to measure against the truth.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Only look for poison: verdict and suspects, for much less than `train` costs."""
    from antibackdoor.bench.poisoned import read_experiment
    from antibackdoor.data.load import load
    from antibackdoor.detectors import make_detector
    from antibackdoor.progress import show
    from antibackdoor.runs import load_model
    from antibackdoor.scanning import scan as run
    from antibackdoor.training.launch import first

    chosen = _settings(settings, ctx)
    told = first(devices * nodes)
    quiet, verbose, as_json = quiet or not told, verbose and told, as_json and told
    if fail_on_poison and not make_detector(detector, chosen).decides:
        raise InputError(f"the detector {detector!r}, so set, only ranks samples; a gate needs a verdict.")
    splits = load(
        data,
        test=test,
        image_size=image_size,
        missing=missing.value,
        skip_unreadable=skip_unreadable,
        memory_map=memory_map,
        data_root=data_root,
    )
    splits = replace(splits, name=data)
    experiment = read_experiment(truth, splits) if truth else None
    with show(_console(stderr=True), quiet=quiet, every=verbose) as progress:
        found = run(
            splits,
            detector=detector,
            options=chosen,
            model=model,
            network=load_model(network)[0] if network else None,
            epochs=epochs,
            seed=seed,
            device=device,
            precision=precision,
            devices=devices,
            nodes=nodes,
            out=out,
            resume=resume,
            progress=progress,
            experiment=experiment,
        )
    from antibackdoor.summary import flagged_rows, print_summary, summary

    if as_json:
        _print_json({**summary(found, out), "suspects": flagged_rows(found)})
    elif not quiet:
        print_summary(_console(), found, out)
    if fail_on_poison and found.verdict.poisoned:
        raise typer.Exit(3)
    if fail_on_poison and not found.verdict.confidence:
        raise InputError(f"the data could not be judged, so they do not pass: {' '.join(found.verdict.evidence)}")


@app.command(
    epilog=_examples(
        "antibackdoor predict run new-photos --out predictions.csv",
        "antibackdoor predict run cat.png --out one.csv",
    )
)
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
    device: Device = "auto",
    missing: MissingOption = Missing.refuse,
    skip_unreadable: SkipUnreadable = False,
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Predict classes with a trained model; of data with a test set, that of the test set."""
    from antibackdoor.summary import predict_table

    table = predict_table(
        folder, data, device=device, missing=missing.value, skip_unreadable=skip_unreadable, data_root=data_root
    )
    from antibackdoor.files import write_csv

    if out.is_dir():
        raise InputError(f"{out} is a folder; give --out the name of a file to write.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out, table)
    if not quiet:
        right = f", {(table['predicted'] == table['label']).mean():.1%} as labeled" if "label" in table else ""
        typer.echo(f"{len(table):,} predictions in {out}{right}")


@app.command(
    epilog=_examples(
        "antibackdoor poison digits --attack badnets --rate 0.1 --target 0 --out poisoned",
        "antibackdoor poison photos --attack blend --format folder --out poisoned",
        "antibackdoor list attacks blend       its hyper-parameters",
    )
)
def poison(
    ctx: typer.Context,
    data: Source,
    attack: Annotated[str, typer.Option(help="See `list attacks`.")],
    out: Out,
    rate: Annotated[float | None, typer.Option(help="Poisoned share of the whole training set.")] = None,
    target: Annotated[str | None, typer.Option(metavar="CLASS", help="Name or number of the class to lead to.")] = None,
    settings: Settings = None,
    seed: Seed = 0,
    form: Annotated[Format, typer.Option("--format", help="One .npz, or the kind of files that came in.")] = Format.npz,
    stages: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where an attack that trains something is kept and found again.")
    ] = None,
    test: Test = None,
    device: Device = "auto",
    image_size: ImageSize = None,
    missing: MissingOption = Missing.refuse,
    skip_unreadable: SkipUnreadable = False,
    data_root: DataRoot = None,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Poison a training set on purpose, for experiments."""
    from antibackdoor.bench.poisoned import poison as make
    from antibackdoor.bench.poisoned import write_poisoned
    from antibackdoor.data.load import load
    from antibackdoor.files import check_free
    from antibackdoor.progress import show
    from antibackdoor.training.job import make_fabric

    chosen = _settings(settings)
    chosen |= {name: value for name, value in (("rate", rate), ("target", target)) if value is not None}
    check_free(out)
    splits = load(
        data,
        test=test,
        image_size=image_size,
        missing=missing.value,
        skip_unreadable=skip_unreadable,
        data_root=data_root,
    )
    with show(_console(stderr=True), quiet=quiet, title=attack) as progress:
        poisoned = make(splits, attack, chosen, seed=seed, fabric=make_fabric(device), kept=stages, progress=progress)
    came_as_manifest = form is Format.folder and Path(data).suffix.lower() == ".csv"
    write_poisoned(poisoned, out, form="manifest" if came_as_manifest else form.value)
    if not quiet:
        counts, stealth = poisoned.attack["counts"], poisoned.attack["stealth"]
        names = {"psnr": "PSNR", "ssim": "SSIM", "relative_l2": "relative L2", "max_deviation": "largest deviation"}
        shown = [f"{names[key]} {stealth[key]['value']:.3g}" for key in names if stealth.get(key, {}).get("n")]
        typer.echo(
            f"{counts['poisoned']:,} of {counts['n']:,} samples poisoned ({counts['rate_of_set']:.1%} of the set, "
            f"{counts['rate_of_class']:.1%} of the target class) in {out}; {', '.join(shown)}\n"
            f"Next: antibackdoor train {shlex.quote(str(out))} --truth {shlex.quote(str(out))} --out RUN"
        )


@app.command(
    "list",
    epilog=_examples(
        "antibackdoor list                     everything",
        "antibackdoor list defenses e2abl      one, with its hyper-parameters",
        "antibackdoor list datasets --json",
    ),
)
def list_(
    what: Annotated[What | None, typer.Argument(metavar="attacks|defenses|detectors|models|datasets")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them, with its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what there is; with a name, its options."""
    from antibackdoor.listing import listing, print_listing

    found = listing(what.value if what else None, name)
    if as_json:
        _print_json(found)
    else:
        print_listing(_console(), found)


@app.command()
def doctor(
    data_root: DataRoot = None, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False
) -> None:
    """Tell versions, devices, threads, data and extras of this machine; status 1 if something is wrong."""
    from antibackdoor.doctor import examine, print_examination

    found = examine(data_root)
    if as_json:
        _print_json(found)
    else:
        print_examination(_console(), found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]) -> None:
    """Build report.html again from what lies in a run folder."""
    from antibackdoor.report import build_report

    typer.echo(str(build_report(folder)))


@app.command(
    epilog=_examples(
        "antibackdoor export run suspects.parquet",
        "antibackdoor export run issues.csv --table issues",
        "antibackdoor export run model.onnx",
    )
)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")],
    out: Annotated[
        Path, typer.Argument(metavar="FILE", help="By its ending: a table .csv or .parquet, or the model .onnx.")
    ],
    table: Annotated[
        SuspectTable, typer.Option(help="suspects: as in suspects.csv. issues: columns as in cleanlab's tables.")
    ] = SuspectTable.suspects,
    quiet: Quiet = False,
) -> None:
    """Write suspects as a table, or the model as ONNX, for other programs."""
    from antibackdoor.exports import export_run

    told = export_run(folder, out, table.value)
    if not quiet:
        typer.echo(told)


@app.command(
    epilog=_examples(
        "antibackdoor review run",
        "antibackdoor review run --export cleaned --format folder",
        "antibackdoor train photos --review run --out clean-run",
    )
)
def review(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder that `train` or `scan` wrote.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Where the data are now, if not where the run read them.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 lets the system choose.")] = 0,
    open_page: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Show the page in a browser.", show_default="on a terminal")
    ] = None,
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
        if sys.stdout.isatty() if open_page is None else open_page:
            import webbrowser

            webbrowser.open(address)

    with contextlib.suppress(KeyboardInterrupt):
        serve(session, port, ready=ready)
    if not quiet:
        again = f"antibackdoor train {shlex.quote(data or 'DATA')} --review {shlex.quote(str(folder))} --out RUN"
        typer.echo(f"\nDecisions are in {folder / 'review.jsonl'}. Train on the cleaned set: {again}")


@app.command(
    epilog=_examples(
        "antibackdoor bench grid.toml --out results --plan    what is missing",
        "antibackdoor bench grid.toml --out results           run it, or go on",
        "antibackdoor bench --out results --table             only the tables",
    )
)
def bench(
    grid: Annotated[Path | None, typer.Argument(metavar="GRID.toml", help="Which cells to run.")] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The ledger: one JSON a cell; what lies anywhere under it is not run again."),
    ] = Path("results"),
    profile: Annotated[str | None, typer.Option(help="One of the grid's profiles.", show_default="its first")] = None,
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
    from antibackdoor.progress import show_cells

    if grid is None and not table:
        raise InputError("give a grid to run, or --table to see what the ledger holds.")
    read = None if grid is None else read_grid(grid, profile)
    cells, ledger, broken = [] if read is None else read.cells(), Ledger(out), []
    if plan and read is not None:
        names = [name for cell in cells if (name := cell.name()) in ledger]
        typer.echo(
            plan_text(
                cells, read.excluded(), names, Estimates(out, device), max(1, cores() if workers is None else workers)
            )
        )
        return
    if not table:
        chosen = make_engine(engine.value, workers=workers, address=address, cpus=cpus, gpus=gpus)
        with show_cells(_console(stderr=True), quiet=quiet) as watcher:
            broken = run_cells(
                cells, ledger, chosen, stages=(stages or out / ".stages").resolve(), device=device, watcher=watcher
            )
    if not quiet or table:
        typer.echo(tables_text(read, out, form.value))
    if broken:
        raise InputError(f"{len(broken)} of {len(cells)} cells broke; their *.error.json in {out} tell why.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs.")] = Path("antibackdoor-demo"),
    kind: Annotated[Kind, typer.Option(help="Images, time series, or both.")] = Kind.both,
    open_report: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Show the reports in a browser.", show_default="on a terminal"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data in the main training.")] = None,
    settings: Settings = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Poison real data (embedded, nothing is downloaded), train with and without a defense, and compare."""
    from antibackdoor.demo import run_demo

    kinds = ("image", "series") if kind is Kind.both else (kind.value,)
    console = _console(quiet=quiet)
    reports = run_demo(
        out, kinds, console, _console(stderr=True), epochs=epochs, settings=_settings(settings), seed=seed, quiet=quiet
    )
    if sys.stdout.isatty() if open_report is None else open_report:
        import webbrowser

        for path in reports:
            webbrowser.open(path.resolve().as_uri())


def _settings(texts: list[str] | None, ctx: typer.Context | None = None) -> dict[str, Any]:
    """NAME=VALUE pairs, those of a file of settings first; the values are parsed by the options they belong to."""
    chosen: dict[str, Any] = {}
    for text in [*(ctx.meta.get(CONFIG, []) if ctx else []), *(texts or [])]:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes NAME=VALUE, got {text!r}.")
        chosen[name.strip()] = value.strip()
    return chosen


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Colors and live displays only on a terminal; rich finds that out."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, highlight=False)


def _fail(sentence: str, status: int) -> NoReturn:
    if os.environ.get(DEBUG) and sys.exc_info()[1] is not None:
        raise  # noqa: PLE0704 (called while an exception is handled)
    typer.echo(sentence if status in (130, 143) else f"error: {sentence}", err=True)
    raise typer.Exit(status)


def end_orderly() -> None:
    """Let SIGTERM unwind the command as Ctrl-C does, so that it closes what it holds and says how to go on."""

    def terminate(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def main() -> None:
    """Entry point of the `antibackdoor` command."""
    # Threads that spin while they wait make a training many times slower where cores are shared with other programs.
    # Read when torch is loaded, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_orderly()
    try:
        app()
    except SystemExit as end:
        # Before and after the command itself, the framework makes a silent exit of an interruption.
        stop = getattr(end.__context__, "__cause__", None)
        if not isinstance(stop, KeyboardInterrupt):
            raise
        terminated = isinstance(stop, Terminated)
        typer.echo("terminated." if terminated else "interrupted.", err=True)
        sys.exit(143 if terminated else 130)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        reason = visible(str(error).splitlines()[0])[:500] if str(error) else "no message"
        typer.echo(
            f"error: something unexpected went wrong ({type(error).__name__}: {reason}); "
            f"set {DEBUG}=1 to see the traceback.",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
