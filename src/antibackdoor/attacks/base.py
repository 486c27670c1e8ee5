"""What every attack is: hyper-parameters, a trigger, and final verbs that poison and trigger exactly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.data.core import Data, Spec, Truth
from antibackdoor.data.rows import Overlay
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.registry import Registry
from antibackdoor.seeds import derive, generator

if TYPE_CHECKING:
    from antibackdoor.training.job import Job

State: TypeAlias = dict[str, Tensor]
"""What `fit` learned, flat: safe to store and to hash."""


Role: TypeAlias = Literal["poison", "cover", "test"]
"""What a sample is made for: poison and cover samples go into the training set, test samples measure the attack."""


@options
class Attack(ABC):
    """Base of all attacks: a frozen set of hyper-parameters and pure functions of samples; two final verbs use them.

    Every attack writes `trigger`; what else it overrides says how it differs from "one trigger, one target class":
    `fit` (something is learned first), `craft` (training differs from test), `decoy` (cover samples differ from
    poison), `leads_to` (the target depends on the sample), `candidates` (only some samples can carry the trigger),
    `partners` (a sample is made from two).

    Poison rate means the share of the WHOLE set for dirty-label attacks (drawn from non-target classes; their label
    becomes the target) and for clean-label attacks (drawn from the target class; labels stay). Cover samples are of
    other classes, carry the trigger and keep their true label. A rate above zero gives one sample at least; at zero
    nothing is poisoned, and the triggered test set shows what the trigger does by itself.
    """

    target: Annotated[int, Field(ge=0, description="number of the class that the trigger leads to")] = 0
    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.1
    cover: Annotated[float, Field(ge=0, le=1, description="share of the whole set triggered with its true label")] = 0.0

    clean_label: ClassVar[bool] = False

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Learn from the clean training set what the trigger needs (statistics, patterns, generators), once.

        job: seeded models, durable stages and the device; attacks that train (`Fitted`) cannot do without.
        """
        return {}

    @abstractmethod
    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Test-time trigger on decoded samples `(m, ...)`; pure, and the same however the samples are batched.

        state: what `fit` returned; for attacks with `partners` also "partner" `(m, ...)` and, for series of unequal
            length, "partner_lengths" `(m,)`.
        rows: `(m,)` row numbers in their set, for triggers that differ from sample to sample (see `draws`).
        lengths: `(m,)` for series of unequal length; what lies after them is set to zero by the caller.
        """

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Training-time version, for attacks that train with another strength or perturbation than `trigger`."""
        return self.trigger(x, spec, state, rows, lengths)

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """What cover samples carry; by default the same as poison."""
        return self.craft(x, spec, state, rows, lengths)

    def leads_to(self, labels: Tensor, rows: Tensor, classes: int) -> Tensor:
        """`(m,)` target class of samples with these true labels and row numbers, were they triggered."""
        return torch.full_like(labels, self.target)

    def candidates(self, labels: Tensor, targets: Tensor, role: Role) -> Tensor:
        """`(n,)` bool: which samples can be made poison, cover, or triggered test samples."""
        return labels == targets if self.clean_label and role == "poison" else labels != targets

    def partners(self, labels: Tensor, rows: Tensor, role: Role) -> Tensor | None:
        """`(m,)` row number of the second sample that each of the rows `(m,)` is made with; labels: `(n,)` of all."""
        return None

    def check(self, data: Data) -> None:
        """Refuse data that this attack cannot be mounted on."""
        if self.target >= len(data.spec.classes):
            raise InputError(f"target class {self.target} does not exist; classes are 0..{len(data.spec.classes) - 1}.")

    @final
    def poison(self, clean: Data, state: State, seed: int) -> tuple[Data, Truth]:
        """The poisoned set, with everything but the chosen rows untouched bit for bit, and the truth about it.

        Raises InputError when there are not enough samples for the rate.
        """
        self.check(clean)
        labels = clean.y.cpu()
        targets = self.leads_to(labels, torch.arange(len(clean)), len(clean.spec.classes))
        pool = self.candidates(labels, targets, "poison").nonzero().flatten()
        count = max(1, round(self.rate * len(clean))) if self.rate else 0
        if count and len(pool) == 0:
            raise InputError("no sample is of a class that this attack starts from, so there is nothing to poison.")
        if count > len(pool):
            raise InputError(
                f"a poison rate of {self.rate:g} asks for {count} of {len(clean)} samples, but only {len(pool)} are "
                f"of {_named(labels[pool], clean.spec)}; use a rate of at most {len(pool) / len(clean):.4g}."
            )
        chosen = pool[torch.randperm(len(pool), generator=generator(seed, "poison"))[:count]].sort().values
        covers = self._covers(labels, targets, chosen, seed)
        rows = torch.cat([chosen, covers]).sort().values
        values = torch.empty((len(rows), *clean.spec.shape), dtype=clean.x.dtype)
        made: dict[Role, Tensor] = {"poison": chosen, "cover": covers}
        for role, part in made.items():
            for some in part.split(_chunk(clean.spec)) if len(part) else ():
                values[torch.searchsorted(rows, some)] = self.make(clean, some, state, role)
        poisoned = torch.zeros(len(clean), dtype=torch.bool).index_fill(0, chosen, True)
        cover = torch.zeros(len(clean), dtype=torch.bool).index_fill(0, covers, True)
        y = torch.where(poisoned, targets, labels)
        data = replace(clean, x=Overlay(clean.x, rows, values), y=y.to(clean.y.device))
        return data, Truth(poisoned, cover, labels.clone(), targets)

    @final
    def triggered(self, test: Data, state: State) -> tuple[Data, Tensor]:
        """Test samples whose true class is not the target, with the trigger, and the `(m,)` target of each.

        True labels and ids are kept.
        """
        self.check(test)
        labels = test.y.cpu()
        targets = self.leads_to(labels, torch.arange(len(test)), len(test.spec.classes))
        rows = self.candidates(labels, targets, "test").nonzero().flatten()
        if len(rows) == 0:
            raise InputError("no test sample is of another class than its target, so there is nothing to trigger.")
        values = torch.empty((len(rows), *test.spec.shape), dtype=test.x.dtype)
        for start in range(0, len(rows), size := _chunk(test.spec)):
            values[start : start + size] = self.make(test, rows[start : start + size], state, "test")
        return replace(test.take(rows), x=values), targets[rows]

    @final
    def make(self, data: Data, rows: Tensor, state: State, role: Role) -> Tensor:
        """These rows with what the role carries, as they are stored.

        That is: clipped, quantized for images, zero after the end of a series. Raises InputError for NaN in a sample.
        """
        x, lengths = _decoded(data, rows)
        partners = self.partners(data.y.cpu(), rows, role)
        if partners is not None:
            other, ends = _decoded(data, partners)
            state = {**state, "partner": other, **({} if ends is None else {"partner_lengths": ends})}
        write = {"poison": self.craft, "cover": self.decoy, "test": self.trigger}[role]
        out = write(x, data.spec, state, rows, lengths)
        if out.shape != x.shape or out.dtype != x.dtype or not out.isfinite().all():
            raise RuntimeError(
                f"{type(self).__name__} changed the shape or type of its samples or made values that are not finite"
            )
        stored = data.spec.encode(out)
        if lengths is not None:  # after the clipping, which would lift the padding where the range leaves out zero
            stored = stored.masked_fill((torch.arange(stored.shape[-1]) >= lengths[:, None])[:, None], 0)
        return stored

    def _covers(self, labels: Tensor, targets: Tensor, chosen: Tensor, seed: int) -> Tensor:
        count = max(1, round(self.cover * len(labels))) if self.cover else 0
        free = self.candidates(labels, targets, "cover").index_fill(0, chosen, False)
        pool = free.nonzero().flatten()
        if count > len(pool):
            raise InputError(f"a cover rate of {self.cover:g} asks for {count} samples, but only {len(pool)} are free.")
        return pool[torch.randperm(len(pool), generator=generator(seed, "cover"))[:count]].sort().values


@options
class Fitted(Attack):
    """Base of attacks whose `fit` trains networks: it gets a `Job`, and what it returns is kept and shared.

    The state is trained once for each (settings, data, seed, architecture) and read back by every later run.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training"})

    surrogate: Annotated[
        str, Field(description="network that the attacker trains: NAME or NAME-wWIDTH; auto: the same as the victim")
    ] = "auto"


def draws(rows: Tensor, count: int, stream: str) -> Tensor:
    """`(m, count)` uniform float32 numbers in [0, 1) that follow from row number and stream alone.

    So a random trigger is the same however the rows are batched. A counter-based generator (the finalizer of
    splitmix64 over row * count + column).
    """
    mix = rows.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    mix = (mix + np.uint64(derive(0, stream))) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mix = (mix ^ (mix >> np.uint64(shift))) * np.uint64(factor)
    mix ^= mix >> np.uint64(31)
    return torch.from_numpy((mix >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def _decoded(data: Data, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Samples as float, and their lengths; a series that holds a value that is not finite is refused."""
    x = data.spec.decode(data.x[rows].cpu())
    if data.spec.kind == "series":
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(f"sample {data.ids[int(rows[~finite][0])]!r} holds NaN or infinite values.")
    return x, None if data.lengths is None else data.lengths[rows].cpu()


def _chunk(spec: Spec) -> int:
    """How many samples to make at once: 4 MB of float values, which stay in the processor's cache."""
    return max(1, 2**20 // math.prod(spec.shape))


def _named(labels: Tensor, spec: Spec) -> str:
    """The classes that occur, in words."""
    found = [repr(spec.classes[k]) for k in labels.unique().tolist()]
    if len(found) > 3:
        return f"the {len(found)} classes that it starts from"
    return f"{'class' if len(found) == 1 else 'the classes'} {', '.join(found)}"


def channel_statistics(clean: Data, sample: int = 4096) -> State:
    """Per-channel "low", "high" and "std" `(C,)` of (at most `sample` of) a set of series, padding left out."""
    rows = torch.linspace(0, len(clean) - 1, min(len(clean), sample), dtype=torch.float64).long()
    x = clean.spec.decode(clean.x[rows].cpu()).transpose(0, 1)
    if clean.lengths is None:
        valid = x.flatten(1)
    else:
        valid = x[:, torch.arange(x.shape[-1]) < clean.lengths[rows].cpu()[:, None]]
    return {"low": valid.amin(1), "high": valid.amax(1), "std": valid.std(1)}


ATTACKS: Registry[type[Attack]] = Registry("attack")
