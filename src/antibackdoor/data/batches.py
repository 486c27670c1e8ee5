"""Batches: seeded shuffle, gather on the device, decode; every batch carries the row numbers of its samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from antibackdoor.data.core import Data


@dataclass(frozen=True)
class Batch:
    """x: float `(b, C, H, W)` in [0, 1] or `(b, C, T)`; y: labels as given; rows: row numbers; all on one device.

    known: the row numbers in main memory, for what must be decided without waiting for the device; None where only that
    knows them.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    lengths: Tensor | None
    known: Tensor | None = None


def to_device(data: Data, device: torch.device) -> Data:
    """The set with labels moved to the device once, and samples where they are one tensor and leave half of it free."""
    x = data.x.to(device) if isinstance(data.x, Tensor) and _fits(data.x, device) else data.x
    lengths = None if data.lengths is None else data.lengths.to(device)
    return replace(data, x=x, y=data.y.to(device), lengths=lengths)


def _fits(x: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or 2 * x.nbytes < torch.cuda.mem_get_info(device)[0]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values from main memory on the device, without the program waiting for it: by way of pinned memory."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def gather(data: Data, rows: Tensor, device: torch.device) -> Batch:
    """One decoded batch of these rows."""
    known = rows if rows.device.type == "cpu" else None
    rows = sent(rows, device)
    there = isinstance(data.x, Tensor) and data.x.device == rows.device
    x = data.spec.decode(data.x[rows] if there else sent(data.x[rows.cpu() if known is None else known], device))
    lengths = None if data.lengths is None else data.lengths[rows]
    return Batch(x, data.y[rows], rows, lengths, known)


def mixed(batch: Batch, others: Tensor, weight: Tensor | float) -> Batch:
    """Each sample averaged with one of `others`, of the same shape, whose part is `weight` in [0, 1].

    weight: of all, or `(b,)`, of each. A series keeps its own length.
    """
    if isinstance(weight, Tensor):
        weight = weight.to(batch.x).reshape(-1, *[1] * (batch.x.ndim - 1))
    x = (1 - weight) * batch.x + weight * others
    if batch.lengths is not None:
        x = x * (torch.arange(x.shape[-1], device=x.device) < batch.lengths[:, None])[:, None]
    return replace(batch, x=x)


def steps_per_epoch(n: int, size: int) -> int:
    """Number of batches an epoch of n samples is cut into, none of them of one sample."""
    return max(1, min(math.ceil(n / size), n // 2))


def shuffled(data: Data, rows: Tensor, size: int, order: torch.Generator, device: torch.device) -> Iterator[Batch]:
    """One epoch over `rows` in random order, cut into batches of nearly equal size.

    Equal cuts leave no tail of one sample, which batch normalization cannot train on.
    """
    shuffled_rows = rows[torch.randperm(len(rows), generator=order)]
    for part in shuffled_rows.tensor_split(steps_per_epoch(len(rows), size)):
        yield gather(data, part, device)


def in_order(data: Data, size: int, device: torch.device, rows: Tensor | None = None) -> Iterator[Batch]:
    """All rows (or these) in their order, for scoring."""
    rows = torch.arange(len(data)) if rows is None else rows
    for part in rows.split(size):
        yield gather(data, part, device)
