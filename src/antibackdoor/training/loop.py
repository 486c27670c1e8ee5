"""The one training loop: order, augmentation, schedule, precision, records; objectives plug in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal, cast

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.augment import AUGMENTATIONS
from antibackdoor.data.batches import Batch, shuffled, steps_per_epoch
from antibackdoor.data.core import Data
from antibackdoor.errors import InputError
from antibackdoor.files import Tree
from antibackdoor.options import options
from antibackdoor.seeds import derive, generator
from antibackdoor.training.objectives import Objective
from antibackdoor.training.team import agree, average_gradients, shared_out


@options
class Recipe:
    """How long and how to train: SGD with Nesterov momentum; a schedule counted in steps."""

    epochs: Annotated[int, Field(ge=1, description="passes over the training set")] = 12
    min_steps: Annotated[int, Field(ge=0, description="small sets get more epochs until this many steps")] = 400
    batch_size: Annotated[int, Field(ge=2, description="samples a step; small sets use n/20, at least 16")] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Annotated[
        Literal["cosine", "constant", "fixmatch"],
        Field(description="of the learning rate, by steps; fixmatch: cos(7 pi done / 16), which ends at a fifth"),
    ] = "cosine"
    augment: Annotated[Literal["none", "weak", "strong"], Field(description="augmentation of the batches")] = "weak"

    def batch_for(self, n: int) -> int:
        """The batch size for n samples: a set of 500 series in batches of 128 would have 4 steps an epoch."""
        return min(self.batch_size, max(16, n // 20))

    def epochs_for(self, n: int) -> int:
        """The epochs for n samples: at least `epochs`, and enough for `min_steps` steps."""
        return max(self.epochs, math.ceil(self.min_steps / steps_per_epoch(n, self.batch_for(n))))

    def passes_for(self, n: int) -> int:
        """Passes over n samples that make one epoch of the loop: the unit of checkpoints and of the history."""
        return 1

    def factor(self, done: float) -> float:
        """Share of the learning rate after this share of all steps: cosine to zero, FixMatch's cosine, or 1."""
        if self.schedule == "fixmatch":
            return math.cos(7 / 16 * math.pi * done)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0


MOST_EPOCHS = 100
"""Few samples are passed over thousands of times; this many rows of history and checkpoints tell enough of it."""


@options
class Steps(Recipe):
    """A recipe whose budget is meant in steps: several passes may make one epoch of the loop."""

    def _passes(self, n: int) -> int:
        return max(self.epochs, math.ceil(self.min_steps / steps_per_epoch(n, self.batch_for(n))))

    def passes_for(self, n: int) -> int:
        """As many as keep the number of epochs within what was asked for, or within `MOST_EPOCHS`."""
        return math.ceil(self._passes(n) / max(self.epochs, MOST_EPOCHS))

    def epochs_for(self, n: int) -> int:
        """Epochs of `passes_for` passes, so that there are at least `epochs` passes and `min_steps` steps."""
        return math.ceil(self._passes(n) / self.passes_for(n))


@options
class Repair(Steps):
    """A budget for few samples that are known to be clean: batches as published, or all samples at once.

    The published learning rates are for such batches, and in smaller ones batch norms see too few samples to keep what
    the network knows.
    """

    batch_size: Annotated[int, Field(ge=2, description="samples a step, of so many at most")] = 128

    def batch_for(self, n: int) -> int:
        """The batch size as asked for, of n samples at most."""
        return min(self.batch_size, n)


@dataclass
class Progress:
    """Where the loop tells how far it is; the command line shows it, everything else ignores it."""

    start: Callable[[str, int, int], None] = lambda stage, epochs, steps: None
    step: Callable[[], None] = lambda: None
    epoch: Callable[[dict[str, Any]], None] = lambda row: None


ParameterGroups = Iterable[nn.Parameter] | list[dict[str, Any]]


class Fit:
    """One training stage that can stop after any epoch and go on, from its `state`, to the same weights.

    parameters: what to train; as groups with their own "learning_rate" or as plain parameters.
    adam: AdamW with the recipe's momentum as its first beta, in place of SGD.
    compiled: steps call a compiled model, where the objective `compiles`; all else calls the model itself.
    Every random choice follows from (seed, stage, epoch), so no random state is saved.
    """

    def __init__(
        self,
        stage: str,
        model: nn.Module,
        objective: Objective,
        data: Data,
        recipe: Recipe,
        *,
        rows: Tensor | None = None,
        parameters: ParameterGroups | None = None,
        adam: bool = False,
        compiled: bool = False,
        seed: int = 0,
        fabric: Fabric,
    ):
        self.stage, self.model, self.objective, self.data, self.recipe = stage, model, objective, data, recipe
        self.rows = torch.arange(len(data)) if rows is None else rows.cpu()
        if len(self.rows) == 0:
            raise InputError(f"no samples are left for the stage {stage!r}.")
        self.seed, self.fabric = seed, fabric
        self.called = cast(nn.Module, torch.compile(model)) if compiled and objective.compiles else model
        self.groups = [
            group if isinstance(group, dict) else {"params": [group]}
            for group in (parameters if parameters is not None else [{"params": list(model.parameters())}])
        ]
        self.rates = [group.pop("learning_rate", recipe.learning_rate) for group in map(dict, self.groups)]
        groups = [{"params": list(group["params"])} for group in self.groups]
        rate, momentum, decay = recipe.learning_rate, recipe.momentum, recipe.weight_decay
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.999), weight_decay=decay)
            if adam
            else torch.optim.SGD(groups, lr=rate, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)
        )
        self.batch_size = recipe.batch_for(len(self.rows))
        self.passes = recipe.passes_for(len(self.rows))
        self.steps = self.passes * steps_per_epoch(len(self.rows), self.batch_size)
        self.epochs = recipe.epochs_for(len(self.rows))
        self.epoch = 0

    def run_epoch(self, progress: Progress) -> dict[str, Any]:
        """One epoch; returns its row of the history."""
        started = time.perf_counter()
        device = self.fabric.device
        torch.manual_seed(derive(self.seed, self.stage, self.epoch))  # dropout and the like
        order = generator(self.seed, self.stage, self.epoch, "order")
        noise = generator(self.seed, self.stage, self.epoch, "augment", device=device)
        records: dict[str, Tensor] = {}
        self.model.train()
        self.objective.before_epoch(self.model, self.epoch)
        share = shared_out(self.model, self.fabric)
        batches = (shuffled(self.data, self.rows, self.batch_size, order, device) for _ in range(self.passes))
        for step, plain in enumerate(chain.from_iterable(batches)):
            self._set_learning_rate((self.epoch * self.steps + step) / (self.epochs * self.steps))
            batch = self.objective.prepare(plain, self._augment, noise)
            with self.fabric.autocast(), share():
                result = self.objective(self.called, batch)
            self.optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(result.loss)
            average_gradients(self._trained(), self.fabric)
            self.objective.before_step(self.model)
            self.optimizer.step()
            self.objective.after_step(self.model)
            for name, values in result.records.items():
                if name not in records:
                    records[name] = torch.full((len(self.data),), torch.nan, dtype=torch.float32, device=device)
                records[name][batch.rows] = values.float()
            progress.step()
        agree(chain(records.values(), self.model.buffers()), self.fabric)
        self.epoch += 1
        numbers = self.objective.after_epoch(self.model, self.epoch, records)
        diverged = [name for name, value in numbers.items() if name.endswith("_loss") and not math.isfinite(value)]
        if diverged:
            raise InputError(
                f"training diverged in stage {self.stage!r}, epoch {self.epoch} ({diverged[0]} is not finite); "
                "use a lower learning rate."
            )
        return {
            "stage": self.stage,
            "epoch": self.epoch,
            "steps": self.epoch * self.steps,
            "seconds": round(time.perf_counter() - started, 3),
            **numbers,
        }

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the objective needs no more."""
        return self.epoch >= self.epochs or self.objective.finished

    def _trained(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.optimizer.param_groups)

    def _augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        augment = AUGMENTATIONS[self.recipe.augment]
        return replace(batch, x=augment(batch.x, self.data.spec, rng, batch.lengths))

    def _set_learning_rate(self, done: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.recipe.factor(done)

    def state(self) -> Tree:
        """Everything that a resumed stage must know."""
        return {
            "epoch": self.epoch,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state(),
            "finished": self.objective.finished,
        }

    def load(self, state: Tree) -> None:
        """Go back to where `state` was taken."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load(state["objective"])
        self.objective.finished = state["finished"]
