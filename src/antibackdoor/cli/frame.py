"""What every command runs within: what goes wrong becomes one sentence and a status, a signal an orderly end."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from antibackdoor.errors import InputError, LeftOut, unknown, visible

DEBUG = "ANTIBACKDOOR_DEBUG"
JSON = "antibackdoor.json"
"""Whether a program waits for JSON that was not printed yet."""
QUIET = "antibackdoor.quiet"
"""Whether nothing but errors is printed."""
ORDER = ("train", "scan", "review", "predict", "export", "report", "demo", "poison", "bench", "list", "doctor")
"""Of the commands in the help."""
DEFEND, MEASURE, ABOUT = "Defend", "Try and measure", "Find your way"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it, ends a command as orderly as Ctrl-C does."""


RECEIVED: list[int] = []
"""Signals that were to end the command that runs."""


def stop_by(number: int) -> KeyboardInterrupt:
    """What a signal that ends a command raises."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


class Group(TyperGroup):
    """Turns what goes wrong into a sentence and an exit status; ANTIBACKDOOR_DEBUG=1 shows tracebacks."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order in which one needs them."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words of the command for the hint after an interruption, and see early what waits for JSON."""
        ctx.meta["antibackdoor.words"] = list(args)
        ctx.meta[JSON] = "--json" in args  # before anything of the command is read, which may be wrong already
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        RECEIVED.clear()
        try:
            try:
                with notes_shown(ctx):
                    return super().invoke(ctx)
            except Exception:
                if RECEIVED:  # a library took the signal for a failure of its own, as aeon's do while they are imported
                    raise stop_by(RECEIVED[0]) from None
                raise
        except InputError as error:
            fail(ctx, str(error), 2)
        except typer.TyperException as error:  # a word that the command does not take
            sentence = told(error)
            if not ctx.meta[JSON] and not isinstance(sentence, InputError):
                raise  # with the usage, in colors
            fail(ctx, str(sentence), 2)
        except KeyboardInterrupt as stop:
            words = ctx.meta["antibackdoor.words"]
            again = words + (["--resume"] if "--resume" not in words and words[:1] != ["bench"] else [])
            resumable = words[:1] in (["train"], ["scan"], ["bench"])
            hint = f"; go on with: antibackdoor {shlex.join(again)}" if resumable else "."
            terminated = isinstance(stop, Terminated)
            fail(ctx, ("terminated" if terminated else "interrupted") + hint, 143 if terminated else 130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            fail(ctx, visible(f"{where}{error.strerror or error}."), 2)
        except (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)):  # or of a GPU
            what = "the memory of this machine, or of its device, is used up"
            fail(ctx, f"{what}; give fewer or smaller samples, a smaller batch or a smaller model.", 2)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            reason = visible(str(error).splitlines()[0])[:500] if str(error) else "no message"
            what = f"something unexpected went wrong ({type(error).__name__}: {reason})"
            fail(ctx, f"{what}; set {DEBUG}=1 to see the traceback.", 1)


@contextmanager
def notes_shown(ctx: Any) -> Iterator[None]:
    """Print what a reader leaves out as a note on stderr, in place of Python's warning with its line of code."""
    with warnings.catch_warnings():
        others = warnings.showwarning
        warnings.simplefilter("always", LeftOut)

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, LeftOut):
                others(message, category, filename, lineno, file, line)
            elif not ctx.meta.get(QUIET):
                typer.echo(f"note: {message}", err=True)

        warnings.showwarning = show
        yield


def told(error: typer.TyperException) -> InputError | str:
    """What is wrong with the words of a command; for one that is in no closed list, with the nearest that is."""
    message, names = error.format_message(), getattr(getattr(error, "param", None), "opts", ())
    option = next((name for name in names if name.startswith("--")), "")
    found = re.search(r"'(?P<given>[^']*)' is not one of (?P<known>'.*')", message)
    if not found:
        return message
    what = f"value of {option}" if option else "word"
    return unknown(what, found["given"], re.findall(r"'([^']+)'", found["known"]))


def examples(*lines: str) -> str:
    """Lines for the end of a help text, one below the other."""
    return "\n".join(("Examples:", *lines))


app = typer.Typer(
    cls=Group,
    name="antibackdoor",
    help="Train a clean model on images or time series nobody vouches for, and name the samples that look poisoned.",
    epilog=examples(
        "antibackdoor demo                      see it work; the data come along",
        "antibackdoor train photos --out run    your own: a folder for each class",
        "antibackdoor review run                go through the suspects, export",
        "antibackdoor doctor                    what this machine has and lacks",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(ctx: Any, sentence: str, status: int) -> NoReturn:
    """End with the sentence on stderr, for programs on stdout too; or, if that is wanted, with the traceback."""
    if os.environ.get(DEBUG) and sys.exc_info()[1] is not None:
        raise  # noqa: PLE0704 (called while an exception is handled)
    typer.echo(sentence if status in (130, 143) else f"error: {sentence}", err=True)
    if ctx.meta[JSON]:
        import json

        typer.echo(json.dumps({"error": sentence}, indent=2))
    raise typer.Exit(status)


def end_orderly() -> None:
    """Let SIGTERM unwind the command as Ctrl-C does, so that it closes what it holds and says how to go on."""

    def stop(number: int, frame: object) -> NoReturn:
        RECEIVED.append(number)
        raise stop_by(number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, stop)


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
