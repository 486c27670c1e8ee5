"""`Job`: what a method may use - the untrusted data, a seeded model, durable stages, a run folder."""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from antibackdoor.data.batches import gather, to_device
from antibackdoor.data.core import Data
from antibackdoor.errors import InputError
from antibackdoor.files import Tree, load_state, save_state, write_lines
from antibackdoor.models import create, set_normalization
from antibackdoor.models.pretrained import take_weights
from antibackdoor.seeds import derive
from antibackdoor.training.loop import Fit, ParameterGroups, Progress, Recipe
from antibackdoor.training.objectives import Objective
from antibackdoor.training.team import agree

Watch: TypeAlias = Callable[[str, nn.Module], dict[str, Any]]
R = TypeVar("R", bound=Recipe)


def make_fabric(
    device: str | torch.device = "auto", precision: str = "auto", devices: int = 1, nodes: int = 1
) -> Fabric:
    """A Fabric. device: "auto", "cpu", "cuda", "cuda:1", "mps", or torch's. devices, nodes: see `training.launch`.

    precision "auto" is bf16 where the hardware has it (a GPU of compute capability 8 or more, a CPU with AVX512-BF16 or
    AMX) and float32 elsewhere: emulated bf16 on a CPU is ten times slower than float32.
    """
    name = str(device)
    if not re.fullmatch(r"auto|cpu|(cuda|mps)(:\d{1,3})?", name):
        raise InputError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N, mps.")
    accelerator, _, index = name.partition(":")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(index or 0) >= there.get(accelerator, 1):
        raise InputError(f"there is no device {name!r} here; use --device cpu or auto.")
    if precision == "auto":
        if accelerator != "cpu" and torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # mkldnn's own check is true for any AVX512, also where bf16 is emulated.
            checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
            fast = any(check() for check in checks if check is not None)
        precision = "bf16-mixed" if fast else "32-true"
    several: dict[str, Any] = {"devices": [int(index)] if index else devices}
    if devices * nodes > 1:
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
        several = {"devices": devices, "num_nodes": nodes, "strategy": strategy}
    # It greets every run, among others with its precision, which a run's settings tell anyway.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(accelerator=accelerator, precision=precision, **several)  # type: ignore[arg-type]
    if devices * nodes > 1:
        fabric.launch()
    return fabric


class Job:
    """One run of one method on one untrusted set.

    folder: where stages are kept, so that a killed run goes on; None keeps nothing.
    weights: pretrained tensors that every model starts from, see `models.pretrained`.
    extras: what a method declares in `needs` and was given, for example {"clean": Data}.
    watch: what else is to be measured after every epoch, from the stage's name and its model; for experiments.
    compiled: whether stages train a compiled model, where their objective `compiles`.
    """

    checkpoint_seconds = 20.0

    def __init__(
        self,
        data: Data,
        *,
        model: str | nn.Module = "auto",
        seed: int = 0,
        fabric: Fabric | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
        extras: dict[str, Any] | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
        compiled: bool = False,
    ):
        self.fabric = fabric or make_fabric()
        self.data = to_device(data, self.fabric.device)
        self.seed, self.folder = seed, folder
        self.progress = progress or Progress()
        self.extras = {
            name: to_device(value, self.fabric.device) if isinstance(value, Data) else value
            for name, value in (extras or {}).items()
        }
        self.budget: dict[str, Any] = {
            k: v for k, v in {"epochs": epochs, "batch_size": batch_size}.items() if v is not None
        }
        self.history: list[dict[str, Any]] = []
        self.watch, self.compiled = watch, compiled
        self._model, self._weights = model, weights
        self._names: set[str] = set()

    @property
    def architecture(self) -> str | None:
        """Name of the run's network, from which `models.create` builds another one; None for a module brought along."""
        return self._model if isinstance(self._model, str) else None

    def model(self, name: str = "model") -> nn.Module:
        """A fresh model, initialized from (seed, name), that takes raw values and normalizes them by this set.

        Of a module brought along: a copy as it is, the same for every name.
        """
        torch.manual_seed(derive(self.seed, "model", name))
        if isinstance(self._model, nn.Module):
            model = copy.deepcopy(self._model)
        else:
            model = create(self._model, self.data.spec)
            set_normalization(model, *self._statistics())
        if self._weights is not None:
            take_weights(model, self._weights, "the file of weights")
        return model.to(self.fabric.device)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over (at most 4,096 of) the samples, padding left out."""
        rows = torch.linspace(0, len(self.data) - 1, min(len(self.data), 4096)).long()
        batch = gather(self.data, rows, self.fabric.device)
        x = batch.x.flatten(2)
        if batch.lengths is None:
            valid = torch.ones_like(x[:, :1])
        else:
            valid = (torch.arange(x.shape[2], device=x.device) < batch.lengths[:, None, None]).float()
        count = valid.sum()
        mean = (x * valid).sum((0, 2)) / count
        variance = ((x - mean[:, None]) ** 2 * valid).sum((0, 2)) / count
        return mean.cpu(), variance.sqrt().cpu()

    @property
    def clean(self) -> Data:
        """The few samples known to be clean, for a method that declares `needs = {"clean"}`."""
        data: Data | None = self.extras.get("clean")
        if data is None:
            raise InputError("this defense repairs its model on clean samples; give some with --clean (clean=).")
        return data

    def recipe(self, recipe: R) -> R:
        """The method's own recipe, with the user's epochs and batch size in place of its own where they were given."""
        return replace(recipe, **self.budget)

    def keep(self, name: str, make: Callable[[], Tree]) -> Tree:
        """The result of `make()`, computed once: a resumed run reads it from the run folder."""
        path = self._stage(name)
        kept = self._kept(path)
        if kept is not None:
            return kept
        value = make()
        if path is not None:
            save_state(path, value)
        return value

    def fit(
        self,
        name: str,
        model: nn.Module,
        objective: Objective,
        recipe: Recipe,
        *,
        data: Data | None = None,
        rows: Tensor | None = None,
        parameters: ParameterGroups | None = None,
        adam: bool = False,
    ) -> None:
        """Train in place; checkpoints after an epoch when the last is `checkpoint_seconds` old, and at the end.

        data: what to train on, the untrusted set by default; `rows` of it, all by default.
        adam: AdamW in place of SGD, for triggers and generators, whose gradients have no natural scale.
        """
        stage = Fit(
            name,
            model,
            objective,
            self.data if data is None else data,
            recipe,
            rows=rows,
            parameters=parameters,
            adam=adam,
            compiled=self.compiled,
            seed=self.seed,
            fabric=self.fabric,
        )
        path, first = self._stage(name), len(self.history)
        state = self._kept(path)
        if state is not None:
            try:
                stage.load(state["fit"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{path or 'a stage'} does not fit this version or these settings ({error}); delete it."
                ) from None
            self.history += state["history"]
        agree(chain(model.parameters(), model.buffers()), self.fabric)
        self.progress.start(name, stage.epochs, stage.steps)
        saved = time.monotonic()
        while not stage.finished:
            row = self._epoch(stage)
            if self.watch is not None:
                row |= self.watch(name, model)
            self.history.append(row)
            self.progress.epoch(row)
            due = time.monotonic() - saved > self.checkpoint_seconds or stage.finished
            if path is not None and due:
                save_state(path, {"fit": stage.state(), "history": self.history[first:]})
                self.write_history()
                saved = time.monotonic()

    def _epoch(self, stage: Fit) -> dict[str, Any]:
        try:
            return stage.run_epoch(self.progress)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            raise InputError(f"the network cannot be compiled here ({reason}); leave out --compile.") from None

    def _kept(self, path: Path | None) -> Tree | None:
        """What a stage left behind; None where there is nothing. Only the first device has a folder, and tells all."""
        found = load_state(path) if path is not None and path.exists() else None
        return self.fabric.broadcast(found) if self.fabric.world_size > 1 else found

    def write_history(self) -> None:
        """Write `history.jsonl` as it stands, one row an epoch and stage."""
        if self.folder is not None:
            write_lines(self.folder / "history.jsonl", self.history)

    def _stage(self, name: str) -> Path | None:
        """The file of a stage; a name used twice in a run would return another stage's value, so it is refused."""
        if name in self._names:
            raise RuntimeError(f"the stage {name!r} is used twice in one run")
        self._names.add(name)
        if self.folder is None:
            return None
        stages = self.folder / "stages"
        stages.mkdir(parents=True, exist_ok=True)
        return stages / f"{name}.safetensors"
