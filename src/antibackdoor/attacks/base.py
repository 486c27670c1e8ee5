"""What every attack is: hyper-parameters, a trigger, and two final verbs that poison and trigger exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias, final

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.data.core import Data, Spec, Truth
from antibackdoor.data.rows import Overlay
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.registry import Registry
from antibackdoor.seeds import generator

if TYPE_CHECKING:
    from antibackdoor.training.job import Job

State: TypeAlias = dict[str, Tensor]
"""What `fit` learned, flat: safe to store and to hash."""


@options
class Attack(ABC):
    """Base of all attacks: a frozen set of hyper-parameters, `trigger`, and optionally `fit` and `craft`.

    Poison rate means the share of the WHOLE set for dirty-label attacks (drawn from non-target classes; their label
    becomes the target) and for clean-label attacks (drawn from the target class; labels stay). Cover samples are of
    other classes, carry the trigger and keep their true label. A rate above zero gives one sample at least.
    """

    target: Annotated[int, Field(ge=0, description="number of the class that the trigger leads to")] = 0
    rate: Annotated[float, Field(gt=0, le=1, description="poisoned share of the whole set")] = 0.1
    cover: Annotated[float, Field(ge=0, le=1, description="share of the whole set triggered with its true label")] = 0.0

    clean_label: ClassVar[bool] = False

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Learn from the clean training set what the trigger needs (statistics, patterns, generators), once."""
        return {}

    @abstractmethod
    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Test-time trigger on decoded samples `(m, ...)`; pure, and the same however the samples are batched.

        rows: `(m,)` row numbers in their set, for triggers that differ from sample to sample.
        lengths: `(m,)` for series of unequal length; what lies after them is set to zero by the caller.
        """

    def craft(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Training-time version, for attacks that train with another strength or perturbation than `trigger`."""
        return self.trigger(x, spec, state, rows, lengths)

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
        of_target = labels == self.target
        pool = (of_target if self.clean_label else ~of_target).nonzero().flatten()
        count = max(1, round(self.rate * len(clean)))
        kind = "in" if self.clean_label else "outside"
        where = f"{kind} the target class {clean.spec.classes[self.target]!r}"
        if len(pool) == 0:
            raise InputError(f"no sample is {where}, so there is nothing to poison.")
        if count > len(pool):
            raise InputError(
                f"a poison rate of {self.rate:g} asks for {count} of {len(clean)} samples, but only {len(pool)} are "
                f"{where}; use a rate of at most {len(pool) / len(clean):.4g}."
            )
        chosen = pool[torch.randperm(len(pool), generator=generator(seed, "poison"))[:count]].sort().values
        covers = self._covers(labels, chosen, seed)
        rows = torch.cat([chosen, covers]).sort().values
        poisoned = torch.zeros(len(clean), dtype=torch.bool).index_fill(0, chosen, True)
        cover = torch.zeros(len(clean), dtype=torch.bool).index_fill(0, covers, True)
        y = torch.where(poisoned, self.target, labels)
        values = torch.cat([self._stored(clean, part, state, craft=True) for part in rows.split(4096)])
        data = replace(clean, x=Overlay(clean.x, rows, values), y=y.to(clean.y.device))
        return data, Truth(poisoned, cover, labels.clone(), self.target)

    @final
    def triggered(self, test: Data, state: State) -> Data:
        """Test samples whose true class is not the target, with the trigger; true labels and ids are kept."""
        self.check(test)
        rows = (test.y.cpu() != self.target).nonzero().flatten()
        kept = test.take(rows)
        if len(rows) == 0:
            raise InputError("every test sample is of the target class, so there is nothing to trigger.")
        values = torch.cat([self._stored(test, part, state, craft=False) for part in rows.split(4096)])
        return replace(kept, x=values)

    def _covers(self, labels: Tensor, chosen: Tensor, seed: int) -> Tensor:
        count = max(1, round(self.cover * len(labels))) if self.cover else 0
        free = labels != self.target
        free[chosen] = False
        pool = free.nonzero().flatten()
        if count > len(pool):
            raise InputError(f"a cover rate of {self.cover:g} asks for {count} samples, but only {len(pool)} are free.")
        return pool[torch.randperm(len(pool), generator=generator(seed, "cover"))[:count]].sort().values

    def _stored(self, data: Data, rows: Tensor, state: State, *, craft: bool) -> Tensor:
        """Triggered rows as they are stored: clipped, quantized for images, zero after the end of a series."""
        x = data.spec.decode(data.x[rows].cpu())
        lengths = None if data.lengths is None else data.lengths[rows].cpu()
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(f"sample {data.ids[int(rows[~finite][0])]!r} holds NaN or infinite values.")
        out = (self.craft if craft else self.trigger)(x, data.spec, state, rows, lengths)
        if out.shape != x.shape or out.dtype != x.dtype or not out.isfinite().all():
            raise RuntimeError(
                f"{type(self).__name__} changed the shape or type of its samples or made values that are not finite"
            )
        stored = data.spec.encode(out)
        if lengths is not None:  # after the clipping, which would lift the padding where the range leaves out zero
            stored = stored.masked_fill((torch.arange(stored.shape[-1]) >= lengths[:, None])[:, None], 0)
        return stored


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
