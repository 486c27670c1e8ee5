"""One batched pass over a set: logits, and what follows from them sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather, in_order
from antibackdoor.data.core import Data
from antibackdoor.training.objectives import forward


@torch.no_grad()
def logits_of(
    model: nn.Module,
    data: Data,
    fabric: Fabric,
    rows: Tensor | None = None,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
    size: int = 512,
) -> Tensor:
    """Logits `(m, K)` float32 on the CPU for all rows (or these), in evaluation mode, without augmentation.

    call: how to get logits from the model; the second head of a `Tap`, for example.
    """
    was_training = model.training
    model.eval()
    with fabric.autocast():
        parts = [call(model, batch).float().cpu() for batch in in_order(data, size, fabric.device, rows)]
    model.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0, len(data.spec.classes))


@torch.no_grad()
def mixed_logits_of(
    model: nn.Module,
    data: Data,
    fabric: Fabric,
    rng: torch.Generator,
    *,
    call: Callable[[nn.Module, Batch], Tensor] = forward,
    size: int = 512,
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

    def mixed(model: nn.Module, batch: Batch) -> Tensor:
        other = gather(data, partners[batch.rows.cpu()], fabric.device)
        x = (batch.x + other.x) / 2
        if batch.lengths is not None:
            x = x * (torch.arange(x.shape[-1], device=x.device) < batch.lengths[:, None])[:, None]
        return call(model, replace(batch, x=x))

    return logits_of(model, data, fabric, call=mixed, size=size)


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each sample `(m,)`, float64 so that confident samples keep an order."""
    return F.cross_entropy(logits.double(), y.cpu(), reduction="none")


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each prediction `(m,)` in nats, float64; 0 log 0 counts as 0."""
    log_p = F.log_softmax(logits.double(), dim=1)
    return -(log_p.exp() * log_p).sum(1)
