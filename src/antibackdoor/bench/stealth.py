"""How much of an attack shows: poisoned training samples against what they were made from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from antibackdoor.data.core import Data

Measure = dict[str, Any]
SAMPLES = 2048
"""At most so many samples are compared, spread evenly over the poison."""


def stealth_measures(clean: Data, poisoned: Data, rows: Tensor) -> dict[str, Measure]:
    """Means over the poisoned `rows` that differ from the clean set at all, with their number.

    relative_l2: `|x' - x| / |x|`. max_deviation: the largest `|x' - x|`, as a share of the range of values. For images
    also psnr, in dB, and ssim (see there); for both, higher is harder to see. Padding of series counts as zero change.
    """
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), SAMPLES), dtype=torch.float64).long()]
    found: dict[str, list[Tensor]] = {}
    for part in rows.split(256):
        old, new = (data.spec.decode(data.x[part].cpu()) for data in (clean, poisoned))
        differ = (new != old).flatten(1).any(1)
        old, new = old[differ], new[differ]
        change = (new - old).flatten(1)
        values = {
            "relative_l2": change.norm(dim=1) / old.flatten(1).norm(dim=1).clamp_min(1e-12),
            "max_deviation": change.abs().amax(1) / (clean.spec.high - clean.spec.low or 1),
        }
        if clean.spec.kind == "image":
            values |= {"psnr": -10 * change.square().mean(1).log10(), "ssim": ssim(old, new)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: {"value": float(v.mean()) if len(v) else None, "n": len(v)} for name, v in joined.items()}


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity `(n,)` of images `(n, C, H, W)` in [0, 1]: 1 for equal images.

    The mean over channels and places of `(2 m1 m2 + c1) (2 s12 + c2) / ((m1^2 + m2^2 + c1) (s1^2 + s2^2 + c2))`, with
    means, variances and covariance under a Gaussian window of spread 1.5 that is 11 pixels wide (in smaller images:
    the largest odd width that fits), c1 = 0.01^2, c2 = 0.03^2. Images are mirrored at their edges, so that a patch in a
    corner counts as much as one in the middle.
    Reference: Wang et al. 2004, Image quality assessment: from error visibility to structural similarity.
    """
    width = min(11, *(side - (side % 2 == 0) for side in first.shape[2:]))
    line = torch.exp(-((torch.arange(width) - width // 2) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def blurred(x: Tensor) -> Tensor:
        mirrored = F.pad(x.flatten(0, 1)[:, None], [width // 2] * 4, mode="reflect")
        rows = F.conv2d(mirrored, line.view(1, 1, -1, 1))
        out: Tensor = F.conv2d(rows, line.view(1, 1, 1, -1)).flatten(1).unflatten(0, x.shape[:2])
        return out

    mean1, mean2 = blurred(first), blurred(second)
    var1, var2 = blurred(first**2) - mean1**2, blurred(second**2) - mean2**2
    both = blurred(first * second) - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean1 * mean2 + c1) * (2 * both + c2)
    return (top / ((mean1**2 + mean2**2 + c1) * (var1 + var2 + c2))).mean((1, 2))
