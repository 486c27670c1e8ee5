"""Tables of a ledger: an overview of all it holds, in Markdown, CSV or LaTeX."""

from __future__ import annotations

import statistics
from typing import Any, Literal

import pandas as pd

from antibackdoor.attacks import ATTACKS
from antibackdoor.bench.cell import GATE, GATES
from antibackdoor.bench.ledger import Record
from antibackdoor.options import flat, values

Format = Literal["markdown", "csv", "latex"]
COLUMNS = {
    "CA": "clean_accuracy",
    "ASR": "attack_success_rate",
    "excess ASR": "excess_attack_success_rate",
    "RA": "recovery_accuracy",
}
LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$",
         "×": r"$\times$", "−": "$-$"}  # fmt: skip


def table(records: list[Record]) -> pd.DataFrame:
    """One row for each (data, budget, model, attack, defense): mean and standard deviation over n seeds, in per cent.

    "rate" is the poisoned share of the training set that was asked for.

    Rows of attacks that stay under their gate without a defense say "attack did not take"; where the undefended cell is
    not in the ledger, they say so.
    """
    groups = _groups(records)
    rows = []
    for key, members in groups.items():
        row = _labels(key, members[0])
        for short, long in COLUMNS.items():
            row[short] = _mean(_values(members, long))
        row["n"] = len(members)
        others = [m for k, ms in groups.items() if k[:-1] == key[:-1] for m in ms if m["cell"]["defense"] == "none"]
        row["gate"] = gate(undefended_as(members[0]["cell"], others), key[3])
        rows.append(row)
    return pd.DataFrame(rows)


DETECTION = {
    "precision clean set": "precision_clean_set",
    "precision top 1 %": "precision_top_1_percent",
    "recall isolated set": "recall_isolated_set",
    "true labels recovered": "true_labels_recovered",
}


def detection_table(records: list[Record]) -> pd.DataFrame:
    """As the paper's Table II: the partition at the end of training; one row a group, over n seeds, in per cent."""
    rows = []
    for key, members in _groups(records).items():
        split = [m for m in members if m["measures"].get("partitions") and _poisoned(m)]
        if not split:
            continue
        row = _labels(key, members[0])
        for short, long in DETECTION.items():
            last = [{"measures": m["measures"]["partitions"][-1]} for m in split]
            row[short] = _mean(_values(last, long))
        for long in ("flagged_precision", "flagged_recall"):
            row[long.replace("_", " ")] = _mean(
                _values([{"measures": m["measures"].get("detection", {})} for m in split], long)
            )
        row["n"] = len(split)
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """A frame of short texts as a Markdown table."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def latex(frame: pd.DataFrame) -> str:
    """A frame of short texts as a LaTeX tabular, without packages."""
    lines = [list(map(str, frame.columns)), *frame.astype(str).to_numpy().tolist()]
    rows = [" & ".join("".join(LATEX.get(sign, sign) for sign in cell) for cell in cells) + r" \\" for cells in lines]
    rule = r"\hline"
    start = f"\\begin{{tabular}}{{{'l' * len(frame.columns)}}}"
    return "\n".join([start, rule, rows[0], rule, *rows[1:], rule, r"\end{tabular}"]) + "\n"


def render(frame: pd.DataFrame, form: Format) -> str:
    """A frame in one of the three forms."""
    if form == "csv":
        return frame.to_csv(index=False, lineterminator="\n")
    return latex(frame) if form == "latex" else markdown(frame)


Key = tuple[Any, ...]


def _groups(records: list[Record]) -> dict[Key, list[Record]]:
    """Records that differ in their seed only, by (data, budget, model, attack, attack settings, defense)."""
    groups: dict[Key, dict[int, Record]] = {}
    for record in records:
        cell = record["cell"]
        settings = str(sorted(cell["attack_options"].items()))
        budget = (cell.get("train_size"), cell.get("epochs"), cell.get("batch_size"))
        key = (cell["data"], budget, cell["model"], cell["attack"], settings, _variant(cell))
        groups.setdefault(key, {})[cell["seed"]] = record  # a traced cell is trained like the one that is not
    ordered = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    return {key: list(members.values()) for key, members in ordered}


def _labels(key: Key, member: Record) -> dict[str, Any]:
    data, (size, epochs, batch), model, _, _, variant = key
    budget = ", ".join(f"{name} {value}" for name, value in (("epochs", epochs), ("batch", batch)) if value)
    row = {"data": data, "training samples": size or "all", "budget": budget or "default", "model": model}
    rate = member["cell"]["attack_options"].get("rate")
    return {**row, "attack": _attack(member["cell"]), "rate": "" if rate is None else f"{rate:.3g}", "defense": variant}


def _values(records: list[Record], measure: str) -> list[float]:
    found = [record["measures"][measure]["value"] for record in records if measure in record["measures"]]
    return [value for value in found if value is not None]


def _poisoned(record: Record) -> int:
    return int(record["measures"].get("poisoned_samples", {}).get("count", 0))


def _attack(cell: Record) -> str:
    """The attack with the settings that are not its defaults of today, but for the rate, which has a column."""
    usual = {} if cell["attack"] not in ATTACKS else dict(flat(values(ATTACKS[cell["attack"]].make())))
    changed = {k: v for k, v in flat(cell["attack_options"]) if k != "rate" and usual.get(k, v) != v}
    return " ".join([cell["attack"], *(f"{name}={_short(value)}" for name, value in sorted(changed.items()))])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _variant(cell: Record) -> str:
    """The defense with the clean samples it was given and the settings that its cell changed: rows of their own."""
    changed = cell.get("defense_changes") or {}
    clean = [f"+ {cell['clean_share']:.0%} clean"] if cell.get("clean_share") else []
    return " ".join([cell["defense"], *clean, *(f"{name}={value}" for name, value in sorted(changed.items()))])


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def undefended_as(cell: Record, undefended: list[Record]) -> list[Record]:
    """Those that were trained as this cell; as they come, or all, if none was.

    That is with its settings, if it has no defense itself; else with the usual ones, but for the augmentation of its
    main training, which decides how soon a trigger is learned.
    """

    def alike(other: Record) -> bool:
        changes = other.get("defense_changes") or {}
        if cell["defense"] == "none":
            return bool(changes == (cell.get("defense_changes") or {}))
        return set(changes) <= {"recipe.augment"} and _augmentation(other) == _augmentation(cell)

    return [m for m in undefended if alike(m["cell"])] or undefended


MAIN_TRAINING = ("recipe", "main", "training", "supervised")
"""What the defenses call the training that would learn the trigger; each has one of these."""


def _augmentation(cell: Record) -> Any:
    options = cell.get("defense_options", {})
    return next((options[name]["augment"] for name in MAIN_TRAINING if name in options), None)


def gate(undefended: list[Record], attack: str) -> str:
    """What these cells, which differ in their seed only, say of their attack; at a rate of 0 nothing was poisoned."""
    if attack == "none":
        return ""
    if not undefended:
        return "no undefended cell"
    if all(member["cell"].get("attack_options", {}).get("rate") == 0 for member in undefended):
        return "nothing poisoned"
    reached = _values(undefended, "attack_success_rate")
    return "takes" if reached and statistics.mean(reached) >= GATES.get(attack, GATE) else "attack did not take"
