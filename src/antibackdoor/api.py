"""The Python surface: `train` on data nobody vouches for, and the `Result` with model, suspects and verdict."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from antibackdoor.attention import Attention, attention_of
from antibackdoor.bench.judge import Experiment, accuracy, attack_measures, detection_measures
from antibackdoor.data.core import Data, Spec, Splits, as_stored, check_trainable
from antibackdoor.data.load import load
from antibackdoor.data.truth import truth_table
from antibackdoor.defenses import AUTO, Outcome, check_given, make_defense
from antibackdoor.environment import environment
from antibackdoor.errors import InputError, unknown
from antibackdoor.files import check_free, write_csv, write_json, write_lines
from antibackdoor.models import create, resolve
from antibackdoor.models.pretrained import fingerprint, read_weights, take_weights
from antibackdoor.options import values
from antibackdoor.report import build_report
from antibackdoor.runs import Beginning, describe_data, issues_table, save_attention, save_gallery, save_model
from antibackdoor.tracking import Tracking, check_trackers
from antibackdoor.training.job import Job, make_fabric
from antibackdoor.training.launch import Program, check_devices, first, processes
from antibackdoor.training.loop import Progress
from antibackdoor.training.objectives import forward
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import Verdict, decide

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


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is said of an untrusted set.

    suspects: every sample, most suspicious first. attention: where the backdoor shows, for the report. beginning: what
    was run, for its folder.
    """

    suspects: pd.DataFrame
    verdict: Verdict
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    data: Data
    beginning: Beginning
    environment: dict[str, Any]
    attention: Attention | None = None

    def issues(self) -> pd.DataFrame:
        """One row a sample in the order of the data, with the columns of cleanlab's issue tables."""
        return issues_table(self.suspects, self.data.ids)

    def save(self, folder: str | Path) -> Path:
        """Make the run folder that `out` makes, report included, but for the known truth and what resumes a run.

        Raises InputError for a folder that is in use.
        """
        folder = Path(folder)
        check_free(folder)
        with self.beginning.folder(folder, self.data):
            self.write(folder)
        return folder

    def write(self, folder: Path) -> None:
        """Add what was found to the folder of the run, and the report; `result.json` comes last and means done."""
        write_csv(folder / "suspects.csv", self.suspects)
        write_lines(folder / "history.jsonl", self.history)
        write_csv(folder / "history.csv", pd.DataFrame(self.history))
        reference = None if self.attention is None else self.attention.reference
        save_gallery(folder, self.data, self.suspects, reference)
        if self.attention is not None:
            save_attention(folder, self.attention)
        write_json(folder / "verdict.json", self.verdict.as_json())
        write_json(folder / "metrics.json", self.metrics)
        write_json(folder / "env.json", self.environment)
        build_report(folder)
        summary = {
            "poisoned": self.verdict.poisoned,
            "flagged": int(self.suspects["flagged"].sum()),
            "n": len(self.data),
        }
        write_json(folder / "result.json", summary)


@dataclass(frozen=True, kw_only=True)
class Result(Findings):
    """Findings, and the clean classifier that was trained: a plain module."""

    model: nn.Module
    spec: Spec
    architecture: str | None

    @torch.no_grad()
    def predict(self, x: Data | Tensor | np.ndarray, lengths: Tensor | None = None) -> np.ndarray:
        """Class numbers `(n,)` for a `Data`, or for samples: `(n, C, H, W)` as uint8 or in [0, 1], or `(n, C, T)`.

        Raises InputError for images in another range and for values that are not finite.
        """
        if not isinstance(x, Data):
            stored = as_stored(torch.as_tensor(x), self.spec.kind)
            none = torch.zeros(len(stored), dtype=torch.int64)
            given = tuple(stored.shape[1:])  # series may be shorter or longer than those of the training set
            series = self.spec.kind == "series" and given[:1] == self.spec.shape[:1]
            spec = replace(self.spec, shape=given) if series else self.spec
            x = Data(stored, none, spec, [str(i) for i in range(len(stored))], lengths)
        device = next(self.model.parameters()).device
        fabric = make_fabric(str(device), "32-true")
        return logits_of(self.model, x, fabric).argmax(1).numpy()

    def write(self, folder: Path) -> None:
        """The model too, before all else."""
        save_model(folder, self.model, self.architecture, self.spec)
        super().write(folder)


def train(
    data: Splits | Data | str | Path | Dataset[Any],
    *,
    defense: str = "auto",
    options: dict[str, Any] | None = None,
    model: str | nn.Module = "auto",
    epochs: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compiled: bool = False,
    devices: int = 1,
    nodes: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    experiment: Experiment | None = None,
    clean: Splits | Data | str | Path | Dataset[Any] | None = None,
    weights: str | Path | None = None,
    track: Sequence[str] = (),
) -> Result:
    """Train a clean model on an untrusted set, name the samples that look poisoned, and give a verdict.

    data: a path or catalog name, a torch `Dataset`, a `Data`, or `Splits` whose test set (if any) is only used to
    measure accuracy.
    defense: "auto", "name" or "name:profile"; options: its hyper-parameters, dotted for nested ones ("main.epochs").
    model: a registered name or any `nn.Module` that takes the samples.
    epochs: of the main training; small sets get more of them, as many as the `min_steps` of its recipe ask for.
    out: the run folder; with it a killed run goes on with `resume=True` to the same weights.
    weights: a local `.safetensors` file to start from (fine-tuning); the head is new where the number of classes
    differs. track: experiment trackers to tell, "tensorboard", "mlflow", "wandb"; needs `out`.
    compiled: train the network by `torch.compile`, in stages that only call it on whole batches.
    devices, nodes: on how many devices of each of how many machines; the result is that of one device, but for the last
    bits. On one machine the other processes are started here, on several by torchrun.
    experiment: known truth, for measuring only. clean: a few samples known to be clean, for the defenses that need
    them and for no other; of `Splits` the training part. Raises InputError for bad input.
    """
    arguments = dict(locals())
    check_arguments(arguments)
    method = make_defense(defense, options)
    check_trackers(track, out)
    extras = {} if clean is None else {"clean": _splits(clean).train}
    check_given(defense, method, extras)
    name = AUTO if defense == "auto" else defense
    config = {"defense": {"name": name, "options": values(method)}, "model": model_name(model)}
    if weights is not None:
        config["weights"] = fingerprint(Path(weights))
    with open_run(
        data,
        config,
        model=model,
        epochs=epochs,
        seed=seed,
        device=device,
        precision=precision,
        compiled=compiled,
        out=out,
        resume=resume,
        progress=progress,
        experiment=experiment,
        extras=extras,
        weights=weights,
        devices=devices,
        nodes=nodes,
        program=(train, arguments),
    ) as (splits, job, beginning):
        tracking = Tracking(track if first(devices * nodes) else (), job.folder)
        tracking.begin({**config, "seed": job.seed})
        job.progress = tracking.watch(job.progress)
        outcome = method.run(job)
        result = Result(
            model=outcome.model.eval(),
            spec=splits.train.spec,
            suspects=suspects_table(splits.train, outcome),
            verdict=with_collapse(decide(splits.train, outcome), outcome, job),
            metrics=_metrics(splits, outcome, job, experiment),
            history=job.history,
            architecture=resolve(model, splits.train.spec) if isinstance(model, str) else None,
            data=splits.train,
            beginning=beginning,
            environment=environment(job.fabric),
            attention=attention_of(job.data, outcome, job.fabric),
        )
        if job.folder is not None:
            result.write(job.folder)
        tracking.end(result.metrics)
        return result


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
    splits = _splits(data)
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


def _splits(data: Splits | Data | str | Path | Dataset[Any]) -> Splits:
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


def suspects_table(data: Data, outcome: Outcome) -> pd.DataFrame:
    """Every sample, most suspicious first: id, label, score, probability, flagged, suggested_label, reason."""
    names = np.array(data.spec.classes, dtype=object)
    suggested = outcome.suggested.numpy()
    table = pd.DataFrame(
        {
            "id": list(data.ids),
            "label": names[data.y.cpu().numpy()],
            "score": outcome.scores.numpy(),
            "probability": outcome.probability.numpy(),
            "flagged": outcome.flagged.numpy(),
            "suggested_label": np.where(suggested >= 0, names[suggested.clip(0)], ""),
            "reason": [outcome.reasons.get(row, "") for row in range(len(data))],
        }
    )
    return table.sort_values(["flagged", "score"], ascending=False, kind="stable", ignore_index=True)


ASKED = 2048
"""Training samples, at most, that a finished model is asked about to see whether it tells classes apart at all."""


def with_collapse(verdict: Verdict, outcome: Outcome, job: Job) -> Verdict:
    """The verdict, which says so first where the model gives one answer whatever it is shown, and then clears nothing.

    What such a model found may stand, since its witnesses found it, too; that it found nothing means nothing.
    """
    rows = torch.linspace(0, len(job.data) - 1, min(len(job.data), ASKED)).long()
    witness, call = outcome.witness or (None, forward)
    call = call if witness is outcome.model else forward
    answers = logits_of(outcome.model, job.data, job.fabric, rows, call=call).argmax(1).unique()
    if len(answers) > 1:
        return verdict
    told = (
        f"The model collapsed: it takes all {len(rows):,} training samples that it was asked about for "
        f"{job.data.spec.classes[int(answers)]!r}. Do not use it, nor take its word that data are clean; train for "
        "more epochs, or at a lower learning rate."
    )
    confidence = verdict.confidence if verdict.poisoned else 0.0
    return replace(verdict, confidence=confidence, evidence=[told, *verdict.evidence])


def _metrics(splits: Splits, outcome: Outcome, job: Job, experiment: Experiment | None) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    if experiment is not None and splits.test is not None:
        triggered, targets = experiment.triggered, experiment.targets
        measured = attack_measures(outcome.model, splits.test, triggered, targets, job.fabric)
        if outcome.flagged.any() or outcome.scores.any():
            measured["detection"] = detection_measures(outcome, experiment.truth)
    elif splits.test is not None:
        measured = accuracy(logits_of(outcome.model, splits.test, job.fabric).argmax(1), splits.test)
    measured["cost"] = {**cost(job), "parameters": sum(p.numel() for p in outcome.model.parameters())}
    return measured


def cost(job: Job) -> dict[str, Any]:
    """Wall time and optimizer steps of all stages, also when the run was resumed."""
    steps = {row["stage"]: row["steps"] for row in job.history}
    return {"seconds": round(sum(row["seconds"] for row in job.history), 1), "steps": sum(steps.values())}
