"""The run folder: what a finished run leaves behind, and how a later one finds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator
from torch import Tensor, nn

from antibackdoor.attention import Attention
from antibackdoor.data.core import Data, Kind, Spec, Splits
from antibackdoor.errors import InputError
from antibackdoor.files import LOCK, atomically, from_csv_cell, lock, read_json, save_tensors, sweep, write_json
from antibackdoor.limits import MAX_CLASSES, containment, read_table
from antibackdoor.models import create
from antibackdoor.models.pretrained import read_shapes, read_weights

GALLERY_SIZE, REFERENCES = 48, 8
LONGEST_AXIS = 2**24
"""Numbers along one axis of a sample, at most: 16 million time steps."""


class ModelCard(BaseModel):
    """`model.json`: enough to rebuild the network and feed it, without the data; normalization is in the weights."""

    model_config = ConfigDict(extra="forbid")

    architecture: str | None
    kind: Kind
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        axes = 3 if self.kind == "image" else 2
        if len(self.shape) != axes or not all(1 <= size <= LONGEST_AXIS for size in self.shape):
            raise ValueError(f"a sample of kind {self.kind!r} has {axes} axes of 1..{LONGEST_AXIS:,}")
        if not 1 <= len(self.classes) <= MAX_CLASSES or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"there must be 1..{MAX_CLASSES:,} classes of different names")
        if self.low > self.high:
            raise ValueError("low is above high")
        return self

    def spec(self) -> Spec:
        """What one sample is."""
        return Spec(self.kind, self.shape, self.classes, self.low, self.high)


@contextmanager
def open_folder(
    folder: Path, config: dict[str, Any], *, resume: bool, source: Mapping[str, Any] | None = None
) -> Iterator[bool]:
    """Make a run folder, or take up one with the same settings, and hold it against other programs until the end.

    Gives True where the run there is finished already. source: how the data were read (`Splits.source`); kept beside
    the settings, for `review` to read them again. Raises InputError for a folder that another program is running in,
    one in use without `resume`, one of other settings, one among the data, and one that cannot be written.
    """
    settings = folder / "config.json"
    refuse_inside(folder, source)
    _in_use(folder, resume)  # before anything is written to it
    refuse_links_out(folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = stack.enter_context(lock(folder / LOCK, wait=False))
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another with --out.") from None
        if not mine:
            raise InputError(f"another program is running in {folder}; wait for its end, or choose another folder.")
        if not _in_use(folder, resume):
            write_json(settings, config)
        elif read_json(settings) != json.loads(json.dumps(config)):
            raise InputError(
                f"{folder} holds a run with other data or settings; resume it with its own, or choose another."
            )
        sweep(folder)
        if source is not None:
            write_json(folder / "source.json", dict(source))
        yield (folder / "result.json").exists()


def refuse_inside(out: Path, source: Mapping[str, Any] | None) -> None:
    """Refuse to write into the folders that data were read from: what lies there is read as a part of them.

    source: how they were read (`Splits.source`).
    """
    for place in filter(None, ((source or {}).get(name) for name in ("source", "test"))):
        if Path(place).is_dir() and out.resolve().is_relative_to(Path(place).resolve()):
            raise InputError(
                f"{out} lies in the folder of the data ({place}), and would be read as data; choose another."
            )


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a run folder tells before anything is found.

    settings: `config.json` but for the fingerprint of the data, which takes a pass over them. described: `data.json`.
    source: `source.json`, of data that `load` has read.
    """

    settings: Mapping[str, Any]
    described: Mapping[str, Any]
    source: Mapping[str, Any] | None

    @contextmanager
    def folder(self, folder: Path, data: Data, *, resume: bool = False) -> Iterator[None]:
        """A run folder on these data that tells so, held until the end; see `open_folder`."""
        config = {"data": data.fingerprint(), **self.settings}
        with open_folder(folder, config, resume=resume, source=self.source):
            write_json(folder / "data.json", dict(self.described))
            yield


def _in_use(folder: Path, resume: bool) -> bool:
    """Whether there is a run to go on with; a folder whose run was killed before it began counts as empty."""
    taken = folder.exists() and (
        not folder.is_dir() or any(path.name != LOCK and path.suffix != ".part" for path in folder.iterdir())
    )
    if taken and not resume:
        raise InputError(f"{folder} exists and is not empty; choose another folder, or --resume to go on with its run.")
    if taken and not (folder / "config.json").exists():
        raise InputError(f"{folder} is not empty and holds no run to go on with (no config.json in it).")
    return taken


def refuse_links_out(folder: Path) -> None:
    """Refuse a run folder, which somebody else may have made, with a link by which we would write somewhere else."""
    contained = containment(folder)
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not contained(path):
                raise InputError(f"{path} is a link out of the run folder; remove it.")


def save_model(folder: Path, model: nn.Module, architecture: str | None, spec: Spec) -> None:
    """Write `model.safetensors` and `model.json`."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", state)
    card = ModelCard(
        architecture=architecture, kind=spec.kind, shape=spec.shape, classes=spec.classes, low=spec.low, high=spec.high
    )
    write_json(folder / "model.json", card.model_dump(mode="json"))


def load_model(folder: str | Path, *, into: nn.Module | None = None) -> tuple[nn.Module, Spec]:
    """The trained network of a run folder, in evaluation mode on the CPU, and what it takes.

    into: a network of the same structure, for runs that brought their own module.
    Raises InputError where files are missing, damaged or do not fit together.
    """
    folder = Path(folder)
    try:
        card = ModelCard.model_validate(read_json(folder / "model.json"))
    except ValidationError as error:
        told = error.errors()[0]
        raise InputError(f"{folder / 'model.json'} is not a model card: {_place(told['loc'])}{told['msg']}.") from None
    if card.architecture is None and into is None:
        raise InputError(f"{folder} holds a model of your own; give a fresh instance of it with `into`.")
    spec, path = card.spec(), folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} holds no model.safetensors.")
    if into is None:
        _check_fits(str(card.architecture), spec, read_shapes(path), f"{path} does not fit {folder / 'model.json'}")
    model = into if into is not None else create(str(card.architecture), spec)
    weights = read_weights(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # wrong names or shapes
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{path} does not fit {folder / 'model.json'}: {reason}") from None
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise InputError(f"{path} holds weights that are not finite, in {bad[0]!r}; such a model answers nothing.")
    return model.eval(), spec


def _place(path: Sequence[str | int]) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""


def _check_fits(architecture: str, spec: Spec, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse a card whose network has other weights than the file, before any memory is taken for that network."""
    try:
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in create(architecture, spec).state_dict().items()}
    except InputError:
        raise
    except (RuntimeError, ValueError, OverflowError) as error:
        raise InputError(f"{what}: no such network can be made ({str(error).splitlines()[0]}).") from None
    wrong = [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]
    if wrong:
        raise InputError(f"{what}: {len(wrong)} weights have other names or shapes, {min(wrong)!r} among them.")


def describe_data(splits: Splits) -> dict[str, Any]:
    """`data.json`: what the run was given, in numbers, and what the user called it."""
    data = splits.train
    counts = torch.bincount(data.y.cpu(), minlength=len(data.spec.classes)).tolist()
    return {
        "name": splits.name,
        "kind": data.spec.kind,
        "shape": list(data.spec.shape),
        "training_samples": len(data),
        "test_samples": 0 if splits.test is None else len(splits.test),
        "samples_by_class": dict(zip(data.spec.classes, counts, strict=True)),
        "notes": list(splits.notes),
    }


def read_suspects(folder: Path) -> pd.DataFrame:
    """`suspects.csv` of a run folder as `Result.suspects` was: names as they are, flags as booleans.

    Raises InputError where it is not there, cannot be read or lacks a column.
    """
    path = folder / "suspects.csv"
    text = ["id", "label", "suggested_label", "reason"]
    if not path.exists():
        raise InputError(f"{folder} holds no suspects.csv; give the folder of a finished run.")
    kinds = {**dict.fromkeys([*text, "flagged", "probability"], str), "score": "float64"}
    table = read_table(path, kinds, encoding_errors="surrogateescape")
    missing = [name for name in (*text, "score", "probability", "flagged") if name not in table]
    if missing:
        raise InputError(f"cannot read {path}: it has no column {missing[0]!r}.")
    for name in text:
        table[name] = table[name].map(from_csv_cell)
    table["probability"] = pd.to_numeric(table["probability"], errors="coerce")  # not every detector estimates one
    table["flagged"] = table["flagged"].str.lower().isin(["true", "1"])
    return table


def issues_table(suspects: pd.DataFrame, ids: Sequence[str]) -> pd.DataFrame:
    """Suspects in the form of cleanlab's issue tables: one row a sample, in the order of `ids`.

    is_backdoor_issue: flagged. backdoor_score: in [0, 1], LOW for a suspicious sample, as all scores there; one minus
    the probability or, of detectors that estimate none, minus the rank.
    given_label, and predicted_label: the suggested label, else the given one.
    """
    table = suspects.set_index("id").loc[list(ids)]
    chance = table["probability"].astype(float)
    if chance.isna().any():  # some detectors only order the samples
        chance = table["score"].rank(pct=True)
    suggested = table["suggested_label"].where(table["suggested_label"] != "", table["label"])
    return pd.DataFrame(
        {
            "is_backdoor_issue": table["flagged"].astype(bool),
            "backdoor_score": 1 - chance.clip(0, 1),
            "given_label": table["label"],
            "predicted_label": suggested,
        }
    )


def save_gallery(folder: Path, data: Data, suspects: pd.DataFrame, reference: Tensor | None = None) -> None:
    """Keep the most suspicious samples, so that the report can be rebuilt without the data.

    reference: row numbers of trusted samples to show beside them.
    """
    place = {name: row for row, name in enumerate(data.ids)}
    ids = suspects["id"].head(GALLERY_SIZE).tolist()
    rows = torch.tensor([place[name] for name in ids], dtype=torch.int64)
    arrays: dict[str, Any] = {"ids": np.array(ids), **_samples(data, rows)}
    if reference is not None:
        reference = reference[:REFERENCES]
        arrays |= {f"reference_{name}": value for name, value in _samples(data, reference).items()}
        arrays["reference_label"] = np.array([data.spec.classes[k] for k in data.y[reference].tolist()])
    _save_arrays(folder / "gallery.npz", arrays)


def save_attention(folder: Path, attention: Attention) -> None:
    """Write `attention.npz`."""
    _save_arrays(folder / "attention.npz", attention.arrays())


def _samples(data: Data, rows: Tensor) -> dict[str, np.ndarray]:
    """Samples as stored, images with the channels last."""
    x = data.x[rows].cpu().numpy()
    found = {"x": x.transpose(0, 2, 3, 1) if data.spec.kind == "image" else x}
    if data.lengths is not None:
        found["lengths"] = data.lengths[rows.to(data.lengths.device)].cpu().numpy()
    return found


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    atomically(path, write)
