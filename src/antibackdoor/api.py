"""`train`: a clean model from data nobody vouches for, the suspects and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from antibackdoor.attention import attention_of
from antibackdoor.bench.judge import Experiment, accuracy, attack_measures, detection_measures
from antibackdoor.data.core import Data, Splits
from antibackdoor.defenses import AUTO, Outcome, check_given, make_defense
from antibackdoor.environment import environment
from antibackdoor.findings import Result, cost, suspects_table, with_collapse
from antibackdoor.models import resolve
from antibackdoor.models.pretrained import fingerprint
from antibackdoor.opening import check_arguments, model_name, open_run, splits_of
from antibackdoor.options import values
from antibackdoor.tracking import Tracking, check_trackers
from antibackdoor.training.job import Job
from antibackdoor.training.launch import first
from antibackdoor.training.loop import Progress
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import decide


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
    extras = {} if clean is None else {"clean": splits_of(clean).train}
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
