"""Settings in a file: `--config FILE.toml` holds what would otherwise be typed; what is typed goes before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from antibackdoor.errors import InputError, unknown
from antibackdoor.limits import read_toml


def read_settings(path: Path, known: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """What the file says of options, by their names in Python, and its [set] table as NAME=VALUE.

    known: the name in Python of every option, by its spelling. An option is written as on the command line without
    the dashes in front (`image-size = 64`); hyper-parameters stand in a table of their own, nested or with dots
    (`main.epochs = 30`). Raises InputError for a file that is not TOML, and for a name that is no option.
    """
    try:
        read = read_toml(path, f"cannot read the settings in {path}")
    except OSError as error:
        raise InputError(f"cannot read the settings in {path}: {error}.") from None
    table = read.pop("set", {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: [set] must be a table of hyper-parameters.")
    chosen = {}
    for key, value in read.items():
        option = key.replace("_", "-")
        if option not in known:
            raise unknown(f"option in {path}", key, known)
        if isinstance(value, dict):
            raise InputError(f"{path}: {key!r} takes a value, not a table.")
        chosen[known[option]] = value
    return chosen, [f"{name}={_text(value)}" for name, value in _flat(table)]


def _flat(table: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A value as it would be typed."""
    import json

    return value if isinstance(value, str) else json.dumps(value)
