"""What several commands take: their options, in groups, each written down once; and how results are printed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_type_hints

import typer

from antibackdoor.cli.frame import JSON, QUIET
from antibackdoor.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from antibackdoor.bench.judge import Experiment
    from antibackdoor.data.core import Splits

DATA, METHOD, MACHINE, TOLD = "The data", "The method", "The machine", "What is told"
"""Panels of a help text."""


class Missing(StrEnum):
    """What to do with gaps inside of series."""

    refuse = "refuse"
    interpolate = "interpolate"
    zero = "zero"


class Undecided(StrEnum):
    """What becomes of flagged samples that nobody decided about."""

    drop = "drop"
    keep = "keep"
    suggest = "suggest"


Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder of class folders or CSV manifest (of images or recordings), .npz, .ts, .tsv, .arff, .parquet, "
        ".arrow, WebDataset .tar, folder written by `poison` or by Hugging Face's save_to_disk, or a name that "
        "`list datasets` shows.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set a hyper-parameter, as shown by `list`; can be repeated.",
        rich_help_panel=METHOD,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", help="Everything random follows from it.", rich_help_panel=METHOD)
]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Passes over the data in the main training; small sets get more.",
        rich_help_panel=METHOD,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE)]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where NAME.npz of named data sets lie ($ANTIBACKDOOR_DATA).", rich_help_panel=DATA
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist, or be empty.")]
UndecidedOption = Annotated[
    Undecided,
    typer.Option(
        "--undecided",
        metavar="WAY",
        help="Reviews: drop, keep or suggest flagged samples that nobody decided about.",
        rich_help_panel=DATA,
    ),
]
OpenPage = Annotated[
    bool | None, typer.Option("--open/--no-open", help="Show it in a browser.", show_default="on a terminal")
]


def _remember(key: str) -> Callable[[typer.Context, bool], bool]:
    """For what every command runs within."""

    def remember(ctx: typer.Context, wanted: bool) -> bool:
        ctx.meta[key] = wanted
        return wanted

    return remember


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_remember(QUIET), help="Print nothing but errors.", rich_help_panel=TOLD),
]

AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_remember(JSON),
        help="Print the result, or what is wrong, as JSON for programs; progress is on stderr.",
        rich_help_panel=TOLD,
    ),
]


def _configure(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> None:
    """Take defaults from a file before the other options are read; see `settings`."""
    if path is not None:
        from antibackdoor.settings import read_settings

        spelled = {max(p.opts, key=len).lstrip("-"): p.name for p in ctx.command.params if p.name}
        chosen, table = read_settings(path, {k: v for k, v in spelled.items() if k not in {"config", "set", "help"}})
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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How samples are read."""

    missing: Annotated[
        Missing,
        typer.Option(
            metavar="WAY", help="With gaps inside of series: refuse, interpolate or zero.", rich_help_panel=DATA
        ),
    ] = Missing.refuse
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read.", rich_help_panel=DATA)
    ] = False
    data_root: DataRoot = None

    def given(self) -> dict[str, Any]:
        """As `data.load` takes it."""
        return {**vars(self), "missing": str(self.missing)}


@dataclass(frozen=True, kw_only=True)
class ReadingSets(Reading):
    """How sets to train on are read."""

    image_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Side in pixels that image files are resized to.", rich_help_panel=DATA),
    ] = None
    memory_map: Annotated[
        bool | None,
        typer.Option(
            help="Read images, or an .npz, as needed from a copy on disk, which lies in $ANTIBACKDOOR_CACHE.",
            show_default="where they would fill a quarter of the memory",
            rich_help_panel=DATA,
        ),
    ] = None
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Whether training may mirror images; not signs and text.",
            show_default="yes, unless the data say no",
            rich_help_panel=DATA,
        ),
    ] = None
    test: Annotated[
        str | None, typer.Option(metavar="PATH", help="Clean test set; only used to measure.", rich_help_panel=DATA)
    ] = None

    def as_in(self, run: Path) -> Self:
        """As the run in this folder read its data, but for what is said here."""
        from antibackdoor.review.session import read_told

        said = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
        return replace(self, **{**read_told(run).reading(), **said})

    def load(self, data: str) -> Splits:
        """The set, called as it was typed."""
        from antibackdoor.data.load import load

        return replace(load(data, **self.given()), name=data)


@dataclass(frozen=True, kw_only=True)
class Running:
    """What `train` and `scan` take beside data and method."""

    settings: Settings = None
    seed: Seed = 0
    device: Device = "auto"
    precision: Annotated[str, typer.Option(help="auto, 32-true or bf16-mixed.", rich_help_panel=MACHINE)] = "auto"
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the network, where the method allows: slow to start.", rich_help_panel=MACHINE
        ),
    ] = False
    devices: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Devices of this machine to train on together.", rich_help_panel=MACHINE),
    ] = 1
    nodes: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Machines to train on together; by torchrun.", rich_help_panel=MACHINE),
    ] = 1
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Experiments: folder of `poison`, to measure against the truth.", rich_help_panel=DATA
        ),
    ] = None
    config: Config = None
    as_json: AsJson = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what is run, and every epoch.", rich_help_panel=TOLD)
    ] = False
    quiet: Quiet = False

    def __post_init__(self) -> None:
        # Of the processes that torchrun starts, the first speaks for all.
        if self.devices * self.nodes > 1 and os.environ.get("RANK", "0") != "0":
            for name, value in (("quiet", True), ("verbose", False), ("as_json", False)):
                object.__setattr__(self, name, value)

    def given(self) -> dict[str, Any]:
        """As `antibackdoor.train` and `antibackdoor.scan` take it."""
        machine = {"device": self.device, "precision": self.precision, "devices": self.devices, "nodes": self.nodes}
        return {"seed": self.seed, "resume": self.resume, "compiled": self.compiled, **machine}

    def experiment(self, splits: Splits) -> Experiment | None:
        """The truth to measure against, if there is one."""
        from antibackdoor.bench.poisoned import read_experiment

        return read_experiment(self.truth, splits) if self.truth else None


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every field of a parameter that is a group, as `Reading`, as an option of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups, parameters = {}, []
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        groups[name], types = hints[name], get_type_hints(hints[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
            for f in fields(hints[name])
        ]

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        command(**given)

    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(called)["__signature__"] = inspect.Signature(parameters)
    return called


def chosen_settings(texts: list[str] | None, ctx: typer.Context | None = None) -> dict[str, Any]:
    """NAME=VALUE pairs, those of a file of settings first; the values are parsed by the options they belong to."""
    chosen: dict[str, Any] = {}
    for text in [*(ctx.meta.get(CONFIG, []) if ctx else []), *(texts or [])]:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes NAME=VALUE, got {text!r}.")
        chosen[name.strip()] = value.strip()
    return chosen


def print_json(ctx: typer.Context, value: Any) -> None:
    """For programs: nothing else goes to stdout, not even what may be found wrong later."""
    import json

    ctx.meta[JSON] = False
    typer.echo(json.dumps(value, indent=2))


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Colors and live displays only on a terminal; rich finds that out."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, highlight=False)


def show_in_browser(address: str, wanted: bool | None) -> None:
    """Open the page where that is wanted, and on a terminal where nothing is said."""
    import sys

    if sys.stdout.isatty() if wanted is None else wanted:
        import webbrowser

        webbrowser.open(address)
