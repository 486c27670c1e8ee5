"""One batched pass over a set: logits, and what follows from them sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather, mixed
from antibackdoor.data.core import Data
from antibackdoor.errors import InputError
from antibackdoor.models.blocks import undisturbed
from antibackdoor.seeds import generator
from antibackdoor.training.objectives import forward
from antibackdoor.training.team import scored

BLOCK = 2**16
"""Rows of logits that are turned into float64 at a time; of a million samples all at once would double the memory."""


def pass_size(data: Data, fabric: Fabric) -> int:
    """Samples in a batch of a scoring pass: 512, but on a CPU about 2^18 input values (85 photos of 32 x 32).

    There the feature maps of 512 photos fall out of the cache and into pages that are fetched anew for every layer:
    the pass takes almost twice as long.
    """
    if fabric.device.type != "cpu":
        return 512
    return min(512, max(16, 2**18 // math.prod(data.spec.shape)))


@torch.no_grad()
def logits_of(
    model: nn.Module,
    data: Data,
    fabric: Fabric,
    rows: Tensor | None = None,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
    size: int | None = None,
    in_turn: bool = False,
) -> Tensor:
    """Logits `(m, K)` float32 on the CPU for all rows (or these), in evaluation mode, without augmentation.

    call: how to get logits from the model; the second head of a `Tap`, for example. size: of a batch; None: by the
    device, see `pass_size`. in_turn: the calls depend on one another (they draw from one generator, or add something
    up), so several devices must not share them out.
    """
    rows = torch.arange(len(data)) if rows is None else rows
    was_training = model.training
    model.eval()
    with fabric.autocast():
        parts = scored(
            lambda batch: call(model, batch), data, rows, size or pass_size(data, fabric), fabric, whole=in_turn
        )
        logits = _collected(parts, len(rows))
    model.train(was_training)
    return torch.zeros(0, len(data.spec.classes)) if logits is None else logits


def _collected(parts: Iterator[Tensor], n: int) -> Tensor | None:
    """All n rows as float32 on the CPU, each part copied where it belongs as soon as it is there; None for no rows.

    A list of small parts would split the memory that large batches leave behind, so that it grows with every batch.
    """
    whole: Tensor | None = None
    start = 0
    for part in parts:
        if whole is None:
            whole = torch.empty(n, *part.shape[1:], dtype=torch.float32)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


@torch.no_grad()
def features_of(
    model: nn.Module,
    data: Data,
    fabric: Fabric,
    rows: Tensor | None = None,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
    size: int | None = None,
) -> Tensor:
    """Penultimate features `(m, D)` float32 on the CPU: what the classifying linear layer of any module is given.

    That layer is the last `nn.Linear` that runs and has one output a logit; what it is given at several positions
    `(m, ..., D)` is averaged over them. One batched pass in evaluation mode, without augmentation; the hooks are gone
    afterwards. call: how to get logits from the model. Raises InputError for a module that has no such layer.
    """
    seen: dict[int, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        width = module.out_features
        seen[int(width)] = args[0] if args else kwargs["input"]  # type: ignore[arg-type]

    def features(batch: Batch) -> Tensor:
        seen.clear()
        width = call(model, batch).shape[-1]
        if width not in seen or len(seen[width]) != len(batch.rows):
            raise InputError("this model does not end in a linear layer, so it has no features to look at.")
        found = seen[width]
        return found if found.dim() == 2 else found.flatten(1, -2).mean(1)

    rows = torch.arange(len(data)) if rows is None else rows
    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with undisturbed(model), fabric.autocast():
            parts = scored(features, data, rows, size or pass_size(data, fabric), fabric)
            found = _collected(parts, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.zeros(0, 0) if found is None else found


def check_finite(values: Tensor, data: Data) -> Tensor:
    """Per-sample values `(n, ...)` as they are; InputError where one of a sample's is not finite."""
    sums = values.double().flatten(1).sum(1)
    if not sums.isfinite().all():
        bad = int((~sums.isfinite()).nonzero()[0])
        raise InputError(
            f"the network gives sample {data.ids[bad]!r} values that are not finite; give one that has not diverged."
        )
    return values


@torch.no_grad()
def mixed_logits_of(
    model: nn.Module,
    data: Data,
    fabric: Fabric,
    rng: torch.Generator,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
    size: int | None = None,
) -> Tensor:
    """Like `logits_of`, each sample averaged half and half with a random sample of another label.

    What makes a clean sample look like its class has to share the input with another class now; a trigger goes on
    leading to its own. A series keeps its own length.
    """
    y = data.y.cpu()
    by_label = torch.argsort(y, stable=True)
    counts = torch.bincount(y, minlength=len(data.spec.classes))
    first = counts.cumsum(0) - counts
    others = (len(y) - counts)[y]
    draw = (torch.rand(len(y), generator=rng, dtype=torch.float64) * others).long()
    partners = by_label[draw + (draw >= first[y]) * counts[y]]  # skips the block of the sample's own label

    def halved(model: nn.Module, batch: Batch) -> Tensor:
        return call(model, mixed(batch, gather(data, partners[batch.rows.cpu()], fabric.device).x, 0.5))

    return logits_of(model, data, fabric, call=halved, size=size)


def bonds_of(
    model: nn.Module,
    data: Data,
    fabric: Fabric,
    seed: int,
    mixtures: int,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
) -> Tensor:
    """`(n,)` float64: the mean probability of the given label over so many mixtures, see `mixed_logits_of`."""
    given = data.y.cpu()[:, None]
    bonds = torch.zeros(len(given), dtype=torch.float64)
    for number in range(mixtures):
        logits = mixed_logits_of(model, data, fabric, generator(seed, "mixture", number), call=call)
        bonds += logits.double().softmax(1).gather(1, given).squeeze(1) / mixtures
    return bonds


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each sample `(m,)`, float64 so that confident samples keep an order."""
    parts = zip(logits.split(BLOCK), y.cpu().split(BLOCK), strict=True)
    return torch.cat([F.cross_entropy(part.double(), labels, reduction="none") for part, labels in parts])


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each prediction `(m,)` in nats, float64; 0 log 0 counts as 0."""
    parts = (F.log_softmax(part.double(), dim=1) for part in logits.split(BLOCK))
    return torch.cat([-(log_p.exp() * log_p).sum(1) for log_p in parts])
