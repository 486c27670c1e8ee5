"""A grid: a TOML file of blocks, each the cross product of its lists, turned into cells."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

from antibackdoor.bench.cell import Cell
from antibackdoor.errors import InputError, unknown
from antibackdoor.options import build

LISTS = {"data": "data", "attacks": "attack", "defenses": "defense", "models": "model", "seeds": "seed"}
"""Keys of a block that hold lists, and the field of a cell that each fills."""
SINGLE = {"train_size", "epochs", "batch_size", "clean_share", "attack_options", "defense_options", "detectors"}


def read_grid(path: Path) -> list[Cell]:
    """The cells of a grid file, in order, without duplicates.

    A block is `[[cells]]` with the lists `data`, `attacks`, `defenses`, `models`, `seeds` and, for all its cells,
    `train_size`, `epochs`, `batch_size`, `clean_share`, `attack_options`, `defense_options`, `detectors`. Raises
    InputError for anything else.
    """
    try:
        grid = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is not a grid: {error}.") from None
    blocks = grid.get("cells")
    if not isinstance(blocks, list) or set(grid) != {"cells"}:
        raise InputError(f"{path} is not a grid: it must consist of [[cells]] blocks.")
    cells = [cell for number, block in enumerate(blocks, 1) for cell in _block(block, f"{path}, block {number}")]
    return list({cell.name(): cell for cell in cells}.values())


def _block(block: dict[str, Any], where: str) -> list[Cell]:
    for key in block:
        if key not in LISTS and key not in SINGLE:
            raise unknown(f"key of {where}", key, [*LISTS, *SINGLE])
    lists = {LISTS[key]: value for key, value in block.items() if key in LISTS}
    for name, value in lists.items():
        if not isinstance(value, list) or not value:
            raise InputError(f"{where}: {name} must be a list with at least one entry.")
    shared = {key: value for key, value in block.items() if key in SINGLE}
    return [
        build(Cell, {**shared, **dict(zip(lists, chosen, strict=True))}, where)
        for chosen in itertools.product(*lists.values())
    ]
