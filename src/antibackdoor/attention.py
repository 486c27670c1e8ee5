"""The trigger made visible: where the witness of a backdoor looks in suspects, against trusted samples of the class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from antibackdoor.data.batches import gather
from antibackdoor.data.core import Data
from antibackdoor.defenses.base import Outcome
from antibackdoor.training.objectives import forward
from antibackdoor.training.occlusion import average, occlusion
from antibackdoor.training.ranking import top

SAMPLES, LARGE = 10, 3 * 64 * 64
"""So many samples of each side are looked at, half of that where one has more than LARGE numbers."""


@dataclass(frozen=True)
class Attention:
    """Averages over the most suspicious samples of one class and over trusted ones of it; float32 arrays.

    suspects, trusted: `(H, W)` or `(C, T)`, how much of the answer rests on each place (see `occlusion`).
    suspects_mean, trusted_mean: `(H, W, C)` in [0, 1], or `(C, T)`: the average sample itself.
    reference: row numbers of the trusted samples. witness: whose answer it is, "second head" or "model".
    aligned: where series differ in length, how they lie over each other: "start" or "end", whichever shows the suspects
    more sharply; T is then the length that half of them reach. "" for all others.
    """

    label: str
    witness: str
    n: int
    suspects: np.ndarray
    trusted: np.ndarray
    suspects_mean: np.ndarray
    trusted_mean: np.ndarray
    reference: Tensor
    aligned: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        """What `attention.npz` holds."""
        named = ("suspects", "trusted", "suspects_mean", "trusted_mean")
        words = {name: np.array(getattr(self, name)) for name in ("label", "witness", "n", "aligned")}
        return {**{name: getattr(self, name).astype(np.float32) for name in named}, **words}


def attention_of(data: Data, outcome: Outcome, fabric: Fabric) -> Attention | None:
    """Compare the two groups; None where the method suspects nobody or the class has no other samples.

    The class is the one that most flagged samples are labeled with; where nothing is flagged, that of the most
    suspicious hundredth. Costs a few thousand evaluations of the witness, whatever the size of the set.
    """
    scores = outcome.scores
    if not outcome.flagged.any() and float(scores.max() - scores.min()) == 0:
        return None
    y = data.y.cpu()
    pool = outcome.flagged if outcome.flagged.any() else torch.zeros(len(y), dtype=torch.bool)
    if not outcome.flagged.any():
        pool[top(scores, max(1, round(0.01 * len(y))))] = True
    label = int(y[pool].mode().values)
    count = SAMPLES if math.prod(data.spec.shape) <= LARGE else SAMPLES // 2
    found = (pool & (y == label)).nonzero().flatten()
    found = found[top(scores[found], min(count, len(found)))]
    rest = (~pool & (y == label)).nonzero().flatten()
    # The less suspicious half, evenly: the very lowest scores belong to odd samples.
    rest = rest[top(-scores[rest], (len(rest) + 1) // 2)]
    rest = rest[torch.linspace(0, len(rest) - 1, min(count, len(rest))).long()]
    if not len(rest):
        return None
    model, call = outcome.witness or (outcome.model, forward)
    maps = [occlusion(model, data, rows, fabric, call=call) for rows in (found, rest)]
    batches = [gather(data, rows, fabric.device) for rows in (found, rest)]
    samples = [batch.x.cpu() for batch in batches]
    lengths = [None if batch.lengths is None else batch.lengths.cpu() for batch in batches]
    known = [of for of in lengths if of is not None]
    span = min((int(of.median()) for of in known), default=data.spec.shape[-1])
    # What lies at the end of series of unequal length is at another step in each; where they agree, peaks add up.
    ways = ("start", "end") if known and len(torch.cat(known).unique()) > 1 else ("",)
    aligned = max(ways, key=lambda way: float(_laid(maps[0], lengths[0], span, way).max()))
    laid = [_laid(values, of, span, aligned).numpy() for values, of in zip(maps + samples, lengths * 2, strict=True)]
    if data.spec.kind == "image":
        laid[2:] = [mean.transpose(1, 2, 0) for mean in laid[2:]]
    witness = "second head" if outcome.witness else "model"
    shown = dict(zip(("suspects", "trusted", "suspects_mean", "trusted_mean"), laid, strict=True))
    return Attention(data.spec.classes[label], witness, len(found), reference=rest, aligned=aligned, **shown)


def _laid(values: Tensor, lengths: Tensor | None, span: int, aligned: str) -> Tensor:
    """The average of samples or maps; series laid over each other by their start or end, the first or last `span`."""
    if lengths is None:
        return average(values, None)
    if aligned != "end":
        return average(values, lengths)[:, :span]
    back = (lengths[:, None, None] - 1 - torch.arange(values.shape[-1])).clamp_min(0).expand_as(values)
    return average(values.gather(2, back), lengths)[:, :span].flip(1)
