"""What the trained attacks share: a clean surrogate model, networks in a flat state, batch-independent passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import Fitted, Role, State
from antibackdoor.data.core import Spec
from antibackdoor.errors import InputError
from antibackdoor.models import create
from antibackdoor.options import options
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective

BATCH = 64


@options
class Trained(Fitted):
    """Base of attacks that first train a surrogate on the clean training set, to see through it what a network sees."""

    samples: Annotated[int, Field(ge=2, description="the attacker trains on at most this many clean samples")] = 10_000
    recipe: Recipe = Recipe(epochs=10, min_steps=500)

    def train_surrogate(self, job: Job | None, objective: Objective | None = None) -> tuple[nn.Module, Job]:
        """The trained surrogate, frozen and in evaluation mode, and the job."""
        if job is None:
            raise TypeError(f"{type(self).__name__}.fit trains a network: give it a Job")
        if job.architecture is None:
            raise InputError("an attack trains a network by name; give the name of a model in place of a module.")
        model = job.model("surrogate")
        job.fit("surrogate", model, objective or CrossEntropy(), self.recipe, rows=sample_rows(job, self.samples))
        return freeze(model), job


@options
class OwnTrigger(Trained):
    """Base of attacks that give every sample a trigger of its own.

    Cover samples carry the change that the trigger makes to ANOTHER sample, and their true label: `x + (y' - y)`. From
    them the victim learns that a trigger counts on its own sample only. Without them (default) it may come to accept
    any sample's trigger on any other, which is an easier and more universal backdoor.
    """

    def partners(self, labels: Tensor, rows: Tensor, role: Role) -> Tensor | None:
        """Of a cover sample: the next sample, whose trigger it carries."""
        return (rows + 1) % len(labels) if role == "cover" else None

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Each sample with the change that its partner would get."""
        state = dict(state)
        partner, ends = state.pop("partner"), state.pop("partner_lengths", None)
        return x + self.trigger(partner, spec, state, rows, ends) - partner


def sample_rows(job: Job, count: int, *, without: int | None = None, only: int | None = None) -> Tensor:
    """At most `count` random rows of the job's set, sorted; without, only: a class left out, or alone taken.

    Raises InputError where no such sample exists.
    """
    y = job.data.y.cpu()
    wanted = torch.ones_like(y, dtype=torch.bool) if only is None else y == only
    pool = (wanted if without is None else wanted & (y != without)).nonzero().flatten()
    if len(pool) == 0:
        raise InputError("the classes of the training set leave this attack no sample to learn its trigger from.")
    rng = generator(job.seed, "rows", str(without), str(only))
    return pool[torch.randperm(len(pool), generator=rng)[:count]].sort().values


def freeze(model: nn.Module) -> nn.Module:
    """`model` in evaluation mode, its weights without gradients; gradients still reach its input."""
    return model.eval().requires_grad_(False)


def logits(model: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Logits `(n, K)`; lengths are passed on only where there are any."""
    out: Tensor = model(x) if lengths is None else model(x, lengths)
    return out.float()


def embed(model: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Penultimate features `(n, D)` of a registered model."""
    known = cast(Any, model)
    out: Tensor = known.embed(x) if lengths is None else known.embed(x, lengths)
    return out.float()


def pack(name: str, module: nn.Module) -> State:
    """A network's weights and buffers as part of a flat state, every key with the network's name in front."""
    return {f"{name}.{key}": value.detach().cpu().clone() for key, value in module.state_dict().items()}


def unpack(name: str, state: State, module: nn.Module) -> nn.Module:
    """`module` with the weights that `pack` stored, frozen, on the device where the state is."""
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    module.to(device_of(state)).load_state_dict(own)
    return freeze(module)


def pack_surrogate(model: nn.Module, job: Job) -> State:
    """A model that `job.model()` made, with its name as bytes, so that the state alone tells how to build it again."""
    name = (job.architecture or "").encode()
    return {**pack("surrogate", model), "architecture": torch.tensor(list(name), dtype=torch.uint8)}


def unpack_surrogate(state: State, spec: Spec) -> nn.Module:
    """The model that `pack_surrogate` stored."""
    state = dict(state)
    name = bytes(state.pop("architecture").tolist()).decode()
    return unpack("surrogate", state, untouched(lambda: create(name, spec)))


def untouched(make: Callable[[], nn.Module]) -> nn.Module:
    """A fresh network whose random weights are of no interest: torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return make()


def steadily(
    function: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, lengths: Tensor | None, device: torch.device
) -> Tensor:
    """`function(x, lengths)` in batches of exactly 64 rows, on `device`; the result comes back to where x is.

    Kernels are chosen by batch size and then differ in the last bit, which a sign or a threshold can blow up. So the
    last batch is filled with copies: what becomes of a row does not depend on how the rows were batched.
    """
    parts = []
    for start in range(0, len(x), BATCH):
        rows = torch.arange(start, start + BATCH).clamp_max(len(x) - 1)
        part = function(x[rows].to(device), None if lengths is None else lengths[rows].to(device))
        parts.append(part[: len(x) - start].to(x.device))
    return torch.cat(parts) if parts else x.clone()


def device_of(state: State) -> torch.device:
    """Where the tensors of a state are."""
    return next(iter(state.values())).device
