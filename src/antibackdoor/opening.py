"""What every run starts with: arguments, data and network checked, the run folder held, a job in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Integral
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from antibackdoor.bench.judge import Experiment
from antibackdoor.data.core import Data, Splits, check_trainable
from antibackdoor.data.load import load
from antibackdoor.data.truth import truth_table
from antibackdoor.errors import InputError, unknown
from antibackdoor.files import write_csv
from antibackdoor.models import create
from antibackdoor.models.pretrained import read_weights, take_weights
from antibackdoor.runs import Beginning, describe_data
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.launch import Program, check_devices, first, processes
from antibackdoor.training.loop import Progress
from antibackdoor.training.scores import logits_of

PRECISIONS = ("auto", "32-true", "bf16-mixed")
TAKEN: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("defense", "detector"), (str, "a name")),
    "options": (Mapping | None, "a dictionary of names and values"),
    "model": (str | nn.Module, "the name of a model, or a torch module"),
    "network": (nn.Module | None, "a torch module, which `load_model` makes of a run folder"),
    "epochs": (Integral | None, "a whole number"),
    **dict.fromkeys(("seed", "devices", "nodes"), (Integral, "a whole number")),
    "device": (str | torch.device, "a device or the name of one"),
    "precision": (str, f"one of {', '.join(PRECISIONS)}"),
    **dict.fromkeys(("out", "weights"), (str | PathLike | None, "a path")),
    "track": (list | tuple, "a list of names"),
}
"""Of the arguments of a run: the types that are taken, and how they are called."""


def check_arguments(given: Mapping[str, Any]) -> None:
    """InputError where an argument of a run is of another type than those that are taken; the data check themselves."""
    for name, value in given.items():
        types, words = TAKEN.get(name, (object, ""))
        if not isinstance(value, types):
            raise InputError(f"{name} must be {words}, not {type(value).__name__}.")


@contextmanager
def open_run(
    data: Splits | Data | str | Path | Dataset[Any],
    config: dict[str, Any],
    *,
    model: str | nn.Module,
    epochs: int | None,
    seed: int,
    device: str | torch.device,
    precision: str,
    compiled: bool,
    out: str | Path | None,
    resume: bool,
    progress: Progress | None,
    experiment: Experiment | None,
    devices: int,
    nodes: int,
    program: Program,
    extras: Mapping[str, Data] | None = None,
    weights: str | Path | None = None,
) -> Iterator[tuple[Splits, Job, Beginning]]:
    """What every run starts with: data and settings checked, then the run folder, held till the end, and a job in it.

    Gives the data, the job, and what the folder tells from the beginning, which is there without a folder, too.
    config: what `config.json` says of the method; data, epochs, seed and extras are added. extras: what else a method
    is given, as "clean". weights: a file that every model starts from. program: what called this, for the processes of
    other devices, which keep nothing and say nothing. Raises InputError before anything is written.
    """
    epochs = None if epochs is None else index(epochs)  # JSON does not take NumPy's numbers
    seed, devices, nodes = map(index, (seed, devices, nodes))
    check_devices(str(device), devices, nodes)
    if compiled and devices * nodes > 1:
        raise InputError("a compiled network trains on one device; leave out --compile.")
    splits = splits_of(data)
    check_trainable(splits.train, splits.test)
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}.")
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    given = dict(extras or {})
    if "clean" in given:
        _check_clean(given["clean"], splits.train)
    # What does not fit is told before anything is written.
    pretrained = None if weights is None else read_weights(Path(weights))
    fabric = make_fabric(device, precision)
    if first(devices * nodes):
        _check_network(model, pretrained, weights, splits.train, fabric)
    settings = {**config, "epochs": epochs, "seed": seed} | {name: x.fingerprint() for name, x in given.items()}
    beginning = Beginning(settings=settings, described=describe_data(splits), source=splits.source)
    folder = Path(out) if out is not None and first(devices * nodes) else None
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(beginning.folder(folder, splits.train, resume=resume))
            if experiment is not None:
                write_csv(folder / "truth.csv", truth_table(splits.train, experiment.truth))
        silent = {"data": splits, "out": None, "resume": False, "progress": None}
        run, arguments = program
        stack.enter_context(processes(devices, nodes, (run, {**arguments, **silent}), _shared_bytes(splits)))
        fabric = make_fabric(device, precision, devices, nodes)
        job = Job(
            splits.train,
            model=model,
            seed=seed,
            fabric=fabric,
            folder=folder,
            progress=progress if first(devices * nodes) else None,
            extras=given,
            epochs=epochs,
            weights=pretrained,
            compiled=compiled,
        )
        yield splits, job, beginning


def _check_network(
    model: str | nn.Module, pretrained: Mapping[str, Tensor] | None, weights: object, data: Data, fabric: Fabric
) -> None:
    """InputError for a network that does not take the weights or two of the samples, or has other classes.

    pretrained: what the file `weights` holds.
    """
    network = create(model, data.spec) if isinstance(model, str) else copy.deepcopy(model)
    if pretrained is not None:
        take_weights(network, pretrained, weights)
    try:
        answers = tuple(logits_of(network.to(fabric.device), data, fabric, torch.arange(2)).shape[1:])
    except Exception as error:  # whatever a foreign module raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the network does not take these samples: {reason}") from None
    if answers != (len(data.spec.classes),):
        raise InputError(
            f"the network gives {' x '.join(map(str, answers)) or 1} logits a sample, but the data have "
            f"{len(data.spec.classes)} classes; give one with as many outputs as classes."
        )


def _shared_bytes(splits: Splits) -> int:
    """What the samples take in memory, where they are there."""
    parts = [part.x for part in (splits.train, splits.test) if part is not None]
    return sum(x.nbytes for x in parts if isinstance(x, Tensor))


def model_name(model: str | nn.Module) -> str:
    """How `config.json` calls a model."""
    return model if isinstance(model, str) else type(model).__name__


def splits_of(data: Splits | Data | str | Path | Dataset[Any]) -> Splits:
    """Whatever a user names as data."""
    if isinstance(data, str | Path):
        return replace(load(data), name=str(data))
    return Splits(data) if isinstance(data, Data) else data if isinstance(data, Splits) else load(data)


def _check_clean(clean: Data, untrusted: Data) -> None:
    """Clean samples must be of the same shape and name the same classes as the untrusted ones."""
    if len(clean) == 0:
        raise InputError("the clean set holds no samples.")
    if (clean.spec.kind, clean.spec.shape) != (untrusted.spec.kind, untrusted.spec.shape):
        raise InputError(
            f"the clean samples have shape {clean.spec.shape} but the untrusted ones {untrusted.spec.shape}; "
            "give both in one shape."
        )
    if clean.spec.classes != untrusted.spec.classes:
        raise InputError("the clean set and the untrusted set do not name the same classes in the same order.")
