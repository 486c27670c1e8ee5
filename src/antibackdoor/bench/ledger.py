"""The ledger: one small JSON a cell, written once and never edited; tables are made from it."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from antibackdoor.bench.cell import GATE, GATES, Cell, run_cell
from antibackdoor.files import read_json, write_json
from antibackdoor.training.loop import Progress

COLUMNS = {
    "CA": "clean_accuracy",
    "ASR": "attack_success_rate",
    "excess ASR": "excess_attack_success_rate",
    "RA": "recovery_accuracy",
}


def run_cells(
    cells: Iterable[Cell],
    ledger: Path,
    *,
    stages: Path,
    device: str = "auto",
    progress: Progress | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Run the cells that the ledger lacks, one after the other; returns how many broke.

    A cell that breaks leaves `NAME.error.json` and does not stop the rest; it is tried again next time. stages: a
    scratch folder in which a killed cell's checkpoints wait for the next call.
    """
    ledger.mkdir(parents=True, exist_ok=True)
    broken = 0
    for cell in cells:
        path, error = ledger / f"{cell.name()}.json", ledger / f"{cell.name()}.error.json"
        if path.exists():
            continue
        tell(f"{cell.name()} ...")
        folder = stages / cell.name()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            record = run_cell(cell, folder=folder, attacks=stages / "attacks", device=device, progress=progress)
            write_json(path, record)
        except Exception as problem:
            broken += 1
            write_json(error, {"cell": cell.resolved(), "error": repr(problem), "traceback": traceback.format_exc()})
            tell(f"  broke: {problem}")
            continue
        error.unlink(missing_ok=True)
        measures = record["measures"]
        shown = [f"{short} {measures[long]['value']:.3f}" for short, long in COLUMNS.items() if long in measures]
        tell(f"  {', '.join(shown)} in {record['cost']['seconds']:.0f} s")
    return broken


def read_ledger(ledger: Path) -> list[dict[str, Any]]:
    """All records of a ledger folder, by name."""
    paths = sorted(ledger.rglob("*.json")) if ledger.is_dir() else []
    return [read_json(path) for path in paths if not path.name.endswith(".error.json")]


def table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each (data, budget, model, attack, defense): mean and standard deviation over n seeds, in per cent.

    Rows of attacks that stay under their gate without a defense say "attack did not take"; where the undefended cell is
    not in the ledger, they say so.
    """
    groups = _groups(records)
    rows = []
    for key, members in groups.items():
        row = _labels(key)
        for short, long in COLUMNS.items():
            row[short] = _mean(_values(members, long))
        row["n"] = len(members)
        undefended = [m for k, ms in groups.items() if k[:-1] == key[:-1] for m in ms if m["cell"]["defense"] == "none"]
        row["gate"] = _gate(undefended, key[3])
        rows.append(row)
    return pd.DataFrame(rows)


DETECTION = {
    "precision clean set": "precision_clean_set",
    "precision top 1 %": "precision_top_1_percent",
    "recall isolated set": "recall_isolated_set",
    "true labels recovered": "true_labels_recovered",
}


def detection_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """As the paper's Table II: the partition at the end of training; one row a group, over n seeds, in per cent."""
    rows = []
    for key, members in _groups(records).items():
        split = [m for m in members if m["measures"].get("partitions") and m["measures"]["poisoned_samples"]["count"]]
        if not split:
            continue
        row = _labels(key)
        for short, long in DETECTION.items():
            last = [{"measures": m["measures"]["partitions"][-1]} for m in split]
            row[short] = _mean(_values(last, long))
        for long in ("flagged_precision", "flagged_recall"):
            row[long.replace("_", " ")] = _mean(
                _values([{"measures": m["measures"]["detection"]} for m in split], long)
            )
        row["n"] = len(split)
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """A frame of short texts as a Markdown table."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


Key = tuple[Any, ...]


def _groups(records: list[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Records that differ in their seed only, by (data, budget, model, attack, attack settings, defense)."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for record in records:
        cell = record["cell"]
        settings = str(sorted(cell["attack_options"].items()))
        budget = (cell.get("train_size"), cell.get("epochs"), cell.get("batch_size"))
        key = (cell["data"], budget, cell["model"], cell["attack"], settings, _variant(cell))
        groups.setdefault(key, []).append(record)
    return dict(sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))))


def _labels(key: Key) -> dict[str, Any]:
    data, (size, epochs, batch), model, attack, _, variant = key
    budget = ", ".join(f"{name} {value}" for name, value in (("epochs", epochs), ("batch", batch)) if value)
    row = {"data": data, "training samples": size or "all", "budget": budget or "default", "model": model}
    return {**row, "attack": attack, "defense": variant}


def _values(records: list[dict[str, Any]], measure: str) -> list[float]:
    found = [record["measures"][measure]["value"] for record in records if measure in record["measures"]]
    return [value for value in found if value is not None]


def _variant(cell: dict[str, Any]) -> str:
    """The defense with the clean samples it was given and the settings that its cell changed: rows of their own."""
    changed = cell.get("defense_changes") or {}
    clean = [f"+ {cell['clean_share']:.0%} clean"] if cell.get("clean_share") else []
    return " ".join([cell["defense"], *clean, *(f"{name}={value}" for name, value in sorted(changed.items()))])


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _gate(undefended: list[dict[str, Any]], attack: str) -> str:
    if attack == "none":
        return ""
    if not undefended:
        return "no undefended cell"
    reached = statistics.mean(r["measures"]["attack_success_rate"]["value"] for r in undefended)
    return "takes" if reached >= GATES.get(attack, GATE) else "attack did not take"
