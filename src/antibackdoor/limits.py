"""What no file may do to the machine: the limits that every reader keeps, in one place.

Data come from the adversary, so what a file declares is checked before anything is made of it. Each limit is far from
what an honest set needs.
"""

from __future__ import annotations

import csv
import os
import re
import stat
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antibackdoor.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

GIB = 2**30
MAX_SAMPLE = 64 * 2**20
"""Bytes of one sample's file, or of one sample inside of a container."""
MAX_DOCUMENT = 64 * 2**20
"""Bytes of a JSON or TOML file."""
MAX_TEXT = 4 * GIB
"""Bytes of a file of series or a manifest, which are text."""
MAX_TABLE = GIB
"""Bytes of a table, a history or a list of decisions in a run folder."""
MAX_COLUMNS = 1000
"""Columns of such a table, of which ours have seven."""
MAX_NAME = 4096
"""Characters of an id or of the name of a class; no path is longer."""
MAX_CLASSES = 100_000
"""Classes of a set; the last layer of every network has a row for each."""
MAX_HEADER = 10_000
"""Lines of a .ts file before its data; each costs a parser some microseconds, also where it holds nothing."""
MAX_STEPS = 2**22
"""Values in a line of a table of series; 95 seconds of sound on a compact disc."""
MAX_LINE, MAX_CHANNELS = 2**24, 10_000
"""Characters in a line of a recording, all of which are taken apart at once; channels that it may have."""
UNPACKED, RATIO = 2**27, 200
"""What grows to more than UNPACKED bytes and to more than RATIO times its size is a bomb."""
MAX_MEMBERS = 10_000
"""Files in an archive of arrays; each takes time whenever the archive is opened."""
ROW_BYTES, ROW_COST = 4, 256
"""Bytes of a file that a row takes at least, so that a repeated one costs something; bytes of memory for its name."""


def memory() -> int | None:
    """Bytes of memory of this machine, or of the container it runs in; None where that cannot be told."""
    found = []
    with suppress(AttributeError, ValueError, OSError):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        with suppress(ValueError, OSError):
            found.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
    return min(found, default=None)


def refuse_beyond_memory(where: object, needed: int) -> None:
    """Refuse what would take `needed` bytes of memory where there are fewer in all."""
    there = memory()
    if there is not None and needed > there:
        raise InputError(
            f"{where} would take {needed / GIB:,.1f} GiB of memory, but this machine has {there / GIB:,.1f}; use a "
            "smaller size, or fewer samples."
        )


def refuse_special(path: Path, limit: int | None = None) -> None:
    """Refuse a pipe, a device or a socket, whose reading may never end, and a file of more than `limit` bytes.

    A folder passes, and so does what does not exist: the reader tells what it wants.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a pipe, a device or a socket; only plain files are read.")
    if limit is not None and stat.S_ISREG(found.st_mode) and found.st_size > limit:
        raise InputError(f"{path} has {found.st_size:,} bytes; at most {limit:,} are read from a file of this kind.")


def read_bytes(path: Path, limit: int = MAX_SAMPLE) -> bytes:
    """The content of a plain file of at most `limit` bytes."""
    refuse_special(path, limit)
    return path.read_bytes()


def read_text(path: Path, limit: int = MAX_DOCUMENT) -> str:
    """The content of a plain file of at most `limit` bytes as UTF-8."""
    return read_bytes(path, limit).decode("utf-8")


def read_table(path: Path, kinds: Mapping[str, Any], **more: Any) -> DataFrame:
    """A CSV table of a run folder or of a truth, a plain file of at most MAX_TABLE bytes; no word means "missing".

    kinds: the type of each column that is not left to pandas; more: for `pandas.read_csv`.
    Raises InputError where it cannot be read, for a header of more than MAX_COLUMNS, and for a first row with more
    fields than the header: pandas takes these for an index, and minutes for hundreds of thousands of columns.
    """
    import pandas as pd

    refuse_special(path, MAX_TABLE)
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = iter(partial(file.readline, 2**20), "")  # one line may be as long as the file
            header, row = [*(len(row) for row in islice(filter(None, csv.reader(lines)), 2)), 0, 0][:2]
        if header > MAX_COLUMNS:
            raise ValueError(f"it has {header:,} columns, more than {MAX_COLUMNS:,}")
        if row > header:
            raise ValueError(f"its first row has {row:,} fields, its header {header:,}")
        table: DataFrame = pd.read_csv(path, dtype=dict(kinds), keep_default_na=False, **more)
    except (OSError, ValueError, csv.Error) as error:
        if "out of memory" in str(error):
            raise MemoryError(str(error)) from None
        raise InputError(f"cannot read {path}: {error}.") from None
    return table


def read_toml(path: Path, wrong: str) -> dict[str, Any]:
    """The content of a TOML file; InputError that begins with `wrong` where it is none. A missing file raises OSError.

    Keys of thousands of parts, which take the parser minutes and gigabytes, are refused before.
    """
    try:
        text = read_text(path)
        if DOTTED.search(text):
            raise InputError(f"{wrong}: a key has more than {DEPTH} parts.")
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{wrong}: it is nested too deeply.") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{wrong}: {error}.") from None


DEPTH = 64
DOTTED = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){{{DEPTH}}}""")
"""Possessive, and from the start of a word only, so that it takes linear time."""


def refuse_rows(where: object, rows: int, size: int) -> None:
    """Refuse `rows` that a header declares where the `size` bytes of its file, or the memory, cannot hold as many.

    For readers to ask before they make a list with an entry for each row.
    """
    if rows > size // ROW_BYTES:
        raise InputError(f"{where} declares {rows:,} rows in {size:,} bytes; it is a bomb.")
    refuse_beyond_memory(f"{where}, for its {rows:,} rows alone,", ROW_COST * rows)


def refuse_growth(where: object, unpacked: int, size: int) -> None:
    """Refuse `size` bytes that declare themselves to be worth far more than those of any honest data."""
    if unpacked > max(UNPACKED, RATIO * size):
        raise InputError(
            f"{where} would take {unpacked / 2**20:,.0f} MiB, {unpacked // max(size, 1):,} times its size; it is a "
            "bomb, or holds nothing."
        )


def refuse_bomb(path: Path) -> None:
    """Refuse a zip archive whose members, as they declare themselves, unpack to far more than any honest array.

    Nothing beyond the declared size is ever unpacked, so a declaration that lies only loses its end.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise InputError(f"{path} holds {len(members):,} files; at most {MAX_MEMBERS:,} make sense.")
    unpacked = sum(member.file_size for member in members)
    refuse_growth(path, unpacked, path.stat().st_size)


def containment(folder: Path) -> Callable[[Path], bool]:
    """A test whether a path stays inside of `folder`, links followed; each parent is resolved only once."""
    root, parents = folder.resolve(), dict[Path, bool]()

    def resolved(path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # links that lead to each other
            return False

    def contained(path: Path) -> bool:
        if path.parent not in parents:
            parents[path.parent] = resolved(path.parent)
        return parents[path.parent] and (not path.is_symlink() or resolved(path))

    return contained


def inside(path: Path, folder: Path) -> Path:
    """`path`, found in a data set's `folder`; InputError where it is a link that leads out of it."""
    try:
        contained = containment(folder)(path)
    except OSError as error:  # a name that is too long to be one
        raise InputError(f"cannot read {path}: {error.strerror}.") from None
    if not contained:
        raise InputError(f"{path} is a link out of the data set; put the file itself there.")
    return path
