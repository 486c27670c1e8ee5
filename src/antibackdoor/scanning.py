"""`scan`: verdict and suspects only, by a detector, for less than `train` costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from antibackdoor.attention import attention_of
from antibackdoor.bench.judge import Experiment, detection_measures
from antibackdoor.data.core import Data, Splits
from antibackdoor.detectors import AUTO, make_detector
from antibackdoor.environment import environment
from antibackdoor.findings import Findings, cost, suspects_table, with_collapse
from antibackdoor.models.pretrained import digest
from antibackdoor.opening import check_arguments, model_name, open_run
from antibackdoor.options import values
from antibackdoor.training.loop import Progress

MODEL = "auto-w16"
"""What "auto" means here: the network is thrown away, so half the width of the one that `train` hands out will do."""


def scan(
    data: Splits | Data | str | Path | Dataset[Any],
    *,
    detector: str = "auto",
    options: dict[str, Any] | None = None,
    model: str | nn.Module = "auto",
    network: nn.Module | None = None,
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
) -> Findings:
    """Score every sample of an untrusted set and give a verdict, without training a model for use.

    data, seed, device, precision, compiled, devices, nodes, out, resume, progress, experiment: as for `train`.
    detector: "auto" or a name; options: its hyper-parameters. model: what is trained where the detector needs a network
    (epochs: for so long). network: a finished one to judge with instead, any module that ends in a linear layer.
    `suspects["probability"]` is NaN where the detector estimates none. Raises InputError for bad input.
    """
    arguments = dict(locals())
    check_arguments(arguments)
    method = make_detector(detector, options)
    if model == "auto":
        model = MODEL
    name = AUTO if detector == "auto" else detector
    judge = model if network is None else network
    config = {"detector": {"name": name, "options": values(method)}, "model": model_name(judge)}
    if network is not None:
        config["network"] = digest(network)
    method.refuse(network)
    with open_run(
        data,
        config,
        model=judge,
        epochs=epochs,
        seed=seed,
        device=device,
        precision=precision,
        compiled=compiled,
        out=out,
        resume=resume,
        progress=progress,
        experiment=experiment,
        devices=devices,
        nodes=nodes,
        program=(scan, arguments),
    ) as (splits, job, beginning):
        outcome = method.run(job, None if network is None else job.model())
        suspects = suspects_table(splits.train, outcome)
        if not method.estimates_probability:
            suspects["probability"] = float("nan")
        known = {} if experiment is None else {"detection": detection_measures(outcome, experiment.truth)}
        findings = Findings(
            suspects=suspects,
            verdict=with_collapse(method.verdict(splits.train, outcome), outcome, job),
            metrics={**known, "cost": cost(job)},
            history=job.history,
            data=splits.train,
            beginning=beginning,
            environment=environment(job.fabric),
            attention=attention_of(job.data, outcome, job.fabric),
        )
        if job.folder is not None:
            findings.write(job.folder)
        return findings
