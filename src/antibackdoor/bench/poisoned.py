"""Sets poisoned on purpose, to measure a defense: made by an attack, kept in a folder, read back by the judge."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric

from antibackdoor.attacks import ATTACKS, Attack, Fitted, State
from antibackdoor.bench.folders import Written, write_files
from antibackdoor.bench.judge import Experiment
from antibackdoor.bench.stealth import stealth_measures
from antibackdoor.data.arrays import load_npz, write_npz, write_part
from antibackdoor.data.core import Data, Splits, Truth
from antibackdoor.data.truth import rates, read_targets, read_truth, targets_table, truth_table
from antibackdoor.errors import InputError, unknown
from antibackdoor.files import LOCK, at_once, load_state, lock, save_state, sweep, write_csv, write_json
from antibackdoor.models import resolve
from antibackdoor.options import build, values
from antibackdoor.seeds import derive
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.loop import Progress

Format = Literal["npz", "folder", "manifest"]


@dataclass(frozen=True)
class Poisoned:
    """splits: what a defender gets, and the clean test set. experiment: what only the judge reads."""

    splits: Splits
    experiment: Experiment
    attack: dict[str, Any]


def poison(
    splits: Splits,
    attack: str,
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    victim: str = "auto",
    fabric: Fabric | None = None,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> Poisoned:
    """Poison the training set with a registered attack, and trigger the test set.

    settings: the attack's hyper-parameters; "target" may be a class name. victim: the network that an attack trains
    as its surrogate where it is not told another. kept: a folder in which attacks that train something are kept and
    found again. Raises InputError where the settings do not fit.
    """
    entry = ATTACKS[attack]
    if splits.train.spec.kind not in entry.kinds:
        raise InputError(f"the attack {attack!r} does not work on data of kind {splits.train.spec.kind!r}.")
    if splits.test is None:
        raise InputError("there is no test set to measure the attack on; give one with --test.")
    settings = dict(settings or {})
    if "target" in settings:
        settings["target"] = class_number(settings["target"], splits.train.spec.classes)
    method = build(entry.make, settings, f"attack {attack}")
    method.check(splits.train)
    own_seed = derive(seed, "attack", attack) & 0x7FFFFFFF
    fabric = fabric or make_fabric()
    state = fitted(method, splits.train, seed=own_seed, victim=victim, fabric=fabric, kept=kept, progress=progress)
    train, truth = method.poison(splits.train, state, own_seed)
    triggered, targets = method.triggered(splits.test, state)
    told: dict[str, Any] = {"attack": attack, "options": values(method), "seed": seed, "counts": rates(truth)}
    told["stealth"] = stealth_measures(splits.train, train, truth.poisoned.nonzero().flatten())
    return Poisoned(Splits(train, splits.test, name=splits.name), Experiment(truth, triggered, targets), told)


def fitted(
    method: Attack,
    clean: Data,
    *,
    seed: int,
    victim: str = "auto",
    fabric: Fabric | None = None,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> State:
    """What an attack learns from the clean set; of an attack that trains, read from the folder `kept` where it can be.

    There it lies under a hash of the attack's settings and source text, the data, the seed and the surrogate, so that
    every run that would train the same finds it; a training that was killed goes on.
    """
    if not isinstance(method, Fitted):
        return method.fit(clean, Job(clean, seed=seed, fabric=fabric))
    surrogate = resolve(victim if method.surrogate == "auto" else method.surrogate, clean.spec)
    job = partial(Job, clean, model=surrogate, seed=seed, fabric=fabric, progress=progress)
    if kept is None:
        return method.fit(clean, job())
    own = _sources(type(method))
    name = type(method).__name__.lower()
    settings = {**values(method), "surrogate": surrogate}
    told = json.dumps([name, settings, own, clean.fingerprint(), seed], sort_keys=True)
    folder = kept / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    path = folder / "state.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK):  # another process that trains the same is waited for
        sweep(folder)
        if not path.exists():
            save_state(path, method.fit(clean, job(folder=folder)))
        shutil.rmtree(folder / "stages", ignore_errors=True)
    state: State = load_state(path)
    return state


def _sources(attack: type[Attack]) -> list[str]:
    """The source text of an attack and of what it takes from its room: another code may learn something else."""
    module = sys.modules[attack.__module__]
    used = {getattr(value, "__module__", None) or "" for value in vars(module).values()}
    names = {attack.__module__, *(name for name in used if name.startswith("antibackdoor.attacks."))}
    return [inspect.getsource(sys.modules[name]) for name in sorted(names)]


def class_number(target: str | int, classes: Sequence[str]) -> int:
    """The number of a class given by its name or, where no class has that name, by its number."""
    if str(target) in classes:
        return list(classes).index(str(target))
    if str(target).isdigit() and int(target) < len(classes):
        return int(target)
    raise unknown("class", str(target), classes)


def write_poisoned(poisoned: Poisoned, out: Path, *, form: Format = "npz") -> None:
    """Write `data.npz`, or files of the kind that came in (see `write_files`), and what only the judge may read.

    form: "npz"; "folder", class folders of PNG files or `.ts` files; "manifest", PNG files and a CSV that names them.
    For the judge there is `truth.csv`, `triggered.npz`, the `triggered.csv` that tells the target of each of its
    samples, and `attack.json`.
    The folder appears complete or not at all. Raises InputError where it is in use or cannot be written.
    """
    with at_once(out) as part:
        if form == "npz":
            write_npz(part / "data.npz", poisoned.splits)
        else:
            poisoned = _as_read(poisoned, write_files(poisoned.splits, part, manifest=form == "manifest"))
        data, experiment = poisoned.splits.train, poisoned.experiment
        write_csv(part / "truth.csv", truth_table(data, experiment.truth))
        write_part(part / "triggered.npz", experiment.triggered)
        write_csv(part / "triggered.csv", targets_table(experiment.triggered, experiment.targets))
        write_json(part / "attack.json", poisoned.attack)


def read_experiment(folder: Path, splits: Splits) -> Experiment:
    """The truth about `splits` from a folder that `write_poisoned` made."""
    for name in ("truth.csv", "triggered.npz", "triggered.csv"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}; give the folder that `antibackdoor poison` wrote.")
    if splits.test is None:
        raise InputError("measuring an attack needs the clean test set; give it with --test.")
    truth, triggered = read_truth(folder / "truth.csv", splits.train), load_npz(folder / "triggered.npz").train
    if not set(triggered.ids) <= set(splits.test.ids) or triggered.spec.shape != splits.test.spec.shape:
        raise InputError(f"{folder / 'triggered.npz'} does not belong to this test set: its ids or shapes differ.")
    return Experiment(truth, triggered, read_targets(folder / "triggered.csv", triggered))


def _as_read(poisoned: Poisoned, written: Written) -> Poisoned:
    """The set and its truth in the order, and under the ids and classes, of the files that were written."""
    again, truth, triggered = written.splits, poisoned.experiment.truth, poisoned.experiment.triggered
    assert again.test is not None and poisoned.splits.test is not None
    known = again.train.spec.classes
    numbers = torch.tensor([known.index(name) if name in known else -1 for name in written.classes])
    place = {name: row for row, name in enumerate(written.ids["train"])}
    rows = torch.tensor([place[name] for name in again.train.ids], dtype=torch.int64)
    labels, targets = numbers[truth.labels[rows]], numbers[truth.targets[rows]]
    led_to, y = numbers[poisoned.experiment.targets], numbers[triggered.y]
    if min(int(group.min()) for group in (labels, targets, led_to, y)) < 0:
        raise InputError(
            "poisoning leaves a class without training samples, which a folder cannot hold; use --format npz."
        )
    spec = again.train.spec
    names = dict(zip(poisoned.splits.test.ids, written.ids["test"], strict=True))
    x = torch.as_tensor(triggered.x[torch.arange(len(triggered))])
    # Gray images are read as RGB, and no file tells how far beyond the longest series the padding went.
    x = x.expand(-1, 3, -1, -1) if spec.kind == "image" else x[..., : spec.shape[1]]
    shown = replace(triggered, x=x, y=y, spec=spec, ids=[names[name] for name in triggered.ids])
    known_truth = Truth(truth.poisoned[rows], truth.cover[rows], labels, targets)
    return Poisoned(again, Experiment(known_truth, shown, led_to), poisoned.attack)


__all__ = [
    "Format",
    "Poisoned",
    "class_number",
    "fitted",
    "poison",
    "read_experiment",
    "write_poisoned",
]
