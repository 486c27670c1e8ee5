"""One batched pass over a set: logits, and what follows from them sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, in_order
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


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each sample `(m,)`, float64 so that confident samples keep an order."""
    return F.cross_entropy(logits.double(), y.cpu(), reduction="none")


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each prediction `(m,)` in nats, float64; 0 log 0 counts as 0."""
    log_p = F.log_softmax(logits.double(), dim=1)
    return -(log_p.exp() * log_p).sum(1)
