"""The truth about a poisoned set as a table: written by `poison`, read back only by the judge."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from antibackdoor.data.core import Data, Truth
from antibackdoor.errors import InputError
from antibackdoor.files import from_csv_cell
from antibackdoor.limits import read_table

COLUMNS = ["id", "role", "label", "true_label", "target"]


def truth_table(data: Data, truth: Truth) -> pd.DataFrame:
    """One row a sample: id, role (clean, poison, cover), label as given, true label, target; classes as numbers.

    The target of a clean sample is the class that it would be led to.
    """
    role = torch.where(truth.poisoned, 1, 0) + torch.where(truth.cover, 2, 0)
    names = [("clean", "poison", "cover")[r] for r in role.tolist()]
    columns = (list(data.ids), names, data.y.tolist(), truth.labels.tolist(), truth.targets.tolist())
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def read_truth(path: Path, data: Data) -> Truth:
    """Read the table back for `data`; InputError where it is damaged or speaks of other samples."""
    table = read_table(path, {"id": str, "role": str})
    table = table.assign(id=table["id"].map(from_csv_cell)) if "id" in table else table
    if list(table.columns) != COLUMNS or table["id"].tolist() != list(data.ids):
        raise InputError(f"{path} does not speak of these samples: its ids must be those of the data, in their order.")
    numbers = table[COLUMNS[2:]]
    whole = all(pd.api.types.is_integer_dtype(kind) for kind in numbers.dtypes)
    if table.empty or not whole or not ((numbers >= 0) & (numbers < len(data.spec.classes))).all(axis=None):
        raise InputError(f"{path}: labels and target must be class numbers in 0..{len(data.spec.classes) - 1}.")
    if table["label"].tolist() != data.y.tolist():
        raise InputError(f"{path} does not speak of this set: its labels differ.")
    roles = table["role"]
    if not roles.isin(["clean", "poison", "cover"]).all():
        raise InputError(f"{path}: a role must be clean, poison or cover.")
    return Truth(
        torch.tensor((roles == "poison").to_numpy()),
        torch.tensor((roles == "cover").to_numpy()),
        torch.tensor(table["true_label"].to_numpy(), dtype=torch.int64),
        torch.tensor(table["target"].to_numpy(), dtype=torch.int64),
    )


def targets_table(triggered: Data, targets: Tensor) -> pd.DataFrame:
    """One row a triggered test sample: id, true label, and the class that its trigger leads to."""
    return pd.DataFrame({"id": list(triggered.ids), "true_label": triggered.y.tolist(), "target": targets.tolist()})


def read_targets(path: Path, triggered: Data) -> Tensor:
    """The targets `(m,)` of `triggered`; InputError where the table is damaged or speaks of other samples."""
    table = read_table(path, {"id": str})
    table = table.assign(id=table["id"].map(from_csv_cell)) if "id" in table else table
    if list(table.columns) != ["id", "true_label", "target"] or table["id"].tolist() != list(triggered.ids):
        raise InputError(f"{path} does not speak of the samples in triggered.npz.")
    target = table["target"]
    if not pd.api.types.is_integer_dtype(target) or not target.between(0, len(triggered.spec.classes) - 1).all():
        raise InputError(f"{path}: a target must be a class number in 0..{len(triggered.spec.classes) - 1}.")
    return torch.tensor(target.to_numpy(), dtype=torch.int64)


def rates(truth: Truth) -> dict[str, float | int]:
    """The poison rate both ways: of the whole set, and of the samples now labeled with a target class."""
    count, n = int(truth.poisoned.sum()), len(truth.poisoned)
    now = torch.where(truth.poisoned, truth.targets, truth.labels)
    of_class = int(torch.isin(now, truth.targets[truth.poisoned]).sum())
    return {
        "poisoned": count,
        "cover": int(truth.cover.sum()),
        "n": n,
        "rate_of_set": count / n,
        "rate_of_class": count / max(of_class, 1),
    }
