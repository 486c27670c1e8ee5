"""Writing so that nothing half-written is ever found, and state trees without pickle."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save

from antibackdoor.errors import InputError, visible
from antibackdoor.limits import read_text, refuse_special

if TYPE_CHECKING:
    from pandas import DataFrame

Tree: TypeAlias = Any
"""A state: dicts with string or integer keys, lists, tensors, numbers, strings, booleans, None."""


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbor of `path`, then put it in place in one step.

    A reader sees the old file or the whole new one, and sees the new one also after the power failed. A program that is
    killed here leaves `.NAME.PID.part`, see `sweep`.
    Raises InputError where the disk or the permissions refuse, and where something else than a plain file lies there.
    """
    refuse_other(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)  # whoever made the folder may have put a link there
        part.touch(exist_ok=False)
        write(part)
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder."
        ) from None
    finally:
        with suppress(OSError):
            part.unlink()


def refuse_other(path: Path) -> None:
    """Refuse to write where something lies that is no plain file; a link, above all, may lead anywhere."""
    try:
        found = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(found):
        raise InputError(f"{path} is a link, a folder, a pipe or a device; only plain files are written to.")


def append_to(path: Path) -> IO[bytes]:
    """Open a plain file at its end; it is made where there is none, and nothing of it is cut off.

    For folders that somebody else may have made: raises InputError for a link and for all that is no plain file.
    """
    refuse_other(path)
    new, careful = not path.exists(), getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | careful, 0o666), "ab")
    if new:
        flush_folder(path.parent)
    return file


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; some systems (Windows) and file systems have no way to."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sweep(folder: Path) -> None:
    """Remove what killed programs left half-written anywhere under `folder`; for whoever holds its lock."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


@contextmanager
def at_once(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden neighbor folder to fill; it becomes `out` in one step where the block ends well, else it is removed.

    What a killed program left there goes first. replace: take the place of an earlier `out`. What it holds is on the
    disk before it appears.
    Raises InputError where `out` is in use, where another program is at it, and where disk or permissions refuse.
    """
    part, old = (out.parent / f".{out.name}.{end}" for end in ("part", "old"))
    busy = InputError(f"another program is writing {out}; wait for it, or choose another folder.")
    try:
        for place in (part, old):  # what a link leads to would be emptied
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise InputError(f"{place} is no plain folder; remove it.")
        part.mkdir(parents=True, exist_ok=True)
        with lock(part / LOCK, wait=False) as mine:
            if not mine or not (part / LOCK).exists():  # gone: the other one has just finished
                raise busy
            try:
                if not replace:
                    check_free(out)
                for entry in part.iterdir():
                    if entry.name != LOCK:
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                yield part
                (part / LOCK).unlink()
                shutil.rmtree(old, ignore_errors=True)
                if hasattr(os, "sync"):
                    os.sync()  # one call for thousands of files; each by itself takes milliseconds
                if out.is_dir() and any(out.iterdir()):
                    out.rename(old)
                elif out.is_dir():
                    out.rmdir()  # not every system renames onto an empty one
                part.rename(out)
                flush_folder(out.parent)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another folder.") from None


def check_free(out: Path) -> None:
    """Refuse a place to write to that is in use."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "exists and is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}; choose another folder.")


def check_replaceable(out: Path, columns: Sequence[str]) -> None:
    """Refuse to write a file over anything but what the same command may have written there before.

    That is a CSV table that begins with these columns; of other files nobody can tell as soon.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file to write.")
    if not out.is_file() or out.is_symlink():
        return  # links, pipes and devices are refused by whoever writes
    if out.suffix.lower() == ".csv":
        with out.open("rb") as file:
            first = file.readline(1000).decode("utf-8", "replace").strip()
        if first and first.replace('"', "").split(",")[: len(columns)] != list(columns):
            raise InputError(f"{out} is there already and is no such table; choose another name, or remove it first.")
    else:
        raise InputError(f"{out} is there already; choose another name, or remove it first.")


LOCK = ".lock"


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `path`, which is made where it does not exist, against other processes; the lock ends with its holder.

    wait: for whoever holds it; without, False is given where somebody does. Systems without such locks always give
    True. Raises InputError where `path` is a link or no plain file.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    with append_to(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def write_text(path: Path, text: str) -> None:
    """Write text atomically, UTF-8."""
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, so that any reader can parse it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write rows atomically, each as JSON on a line of its own."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read JSON; InputError where it is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except RecursionError:
        raise InputError(f"cannot read {path}: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}.") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError where it is missing, damaged, or another kind of JSON."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not {type(value).__name__}.")
    return value


def save_state(path: Path, tree: Tree) -> None:
    """Write a state tree as one safetensors file: tensors as tensors, everything else as JSON in its header."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node: Tree) -> Any:
        if isinstance(node, torch.Tensor):
            key = str(len(tensors))
            tensors[key] = node.detach().cpu().contiguous().clone()
            return {"tensor": key}
        if isinstance(node, dict):
            return {"dict": [[key, strip(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list": [strip(value) for value in node]}
        return {"value": node}

    skeleton = json.dumps(strip(tree))
    save_tensors(path, tensors or {"empty": torch.zeros(0)}, {"tree": skeleton})


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    By way of bytes: the library's own writing to a file leaves names of its choice behind where it is killed, and has
    an error type of its own for a full disk.
    """
    atomically(path, lambda part: part.write_bytes(save(tensors, metadata)))


def load_state(path: Path) -> Tree:
    """Read what `save_state` wrote; InputError where the file is damaged."""
    tensors: dict[str, torch.Tensor] = {}

    def dress(node: Any) -> Tree:
        if "tensor" in node:
            return tensors[node["tensor"]]
        if "dict" in node:
            return {key: dress(value) for key, value in node["dict"]}
        if "list" in node:
            return [dress(value) for value in node["list"]]
        return node["value"]

    refuse_special(path)
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads(file.metadata()["tree"])
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
        return dress(skeleton)
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own type, which it does not export for catching
        raise InputError(f"cannot read the state in {path}: {error}; delete it to start that stage again.") from None


def write_csv(path: Path, table: DataFrame) -> None:
    """Write a table atomically: text quoted, so that no line break in a name ends a row, and free of formulas."""
    safe = table.apply(lambda column: column.map(lambda v: csv_cell(v) if isinstance(v, str) else v))
    atomically(
        path,
        lambda part: safe.to_csv(part, index=False, quoting=csv.QUOTE_NONNUMERIC),
    )


FORMULA = ("=", "+", "-", "@", "'", "＝", "＋", "－", "＠")
HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LATER = re.compile(r";(?=[\s\"']*[=+\-@＝＋－＠])")
"""A formula behind a semicolon: many spreadsheets take that for the separator, and then not every quote for one."""
ESCAPE = re.compile(r"\\(\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4})")


def csv_cell(text: str) -> str:
    """Text for a cell of a table that does nothing where it is opened or printed; `from_csv_cell` gives it back.

    Names come from whoever made the data. A cell that begins like a formula runs in a spreadsheet, so it gets a quote
    in front. Semicolons before a formula, line breaks, terminal escapes, marks that turn the reading direction and
    bytes that are no text are spelled out as in Python (and backslashes doubled) in a cell that then begins with a
    quote and a backslash.
    """
    if HARMFUL.search(text) or LATER.search(text):
        spelled = HARMFUL.sub(lambda found: visible(found[0]), text.replace("\\", "\\\\"))
        return "'\\" + LATER.sub(r"\\x3b", spelled)
    return f"'{text}" if text.startswith(FORMULA) else text


def from_csv_cell(cell: str) -> str:
    """The text that `csv_cell` was given."""
    if not cell.startswith("'\\"):
        return cell[1:] if cell.startswith("'") else cell
    return ESCAPE.sub(lambda found: found[0][1] if found[0] == "\\\\" else _unescaped(found[0]), cell[2:])


def _unescaped(escape: str) -> str:
    return escape.encode("ascii").decode("unicode_escape")
