"""BadNets: a fixed small patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, State, channel_statistics
from antibackdoor.attacks.stamp import check_size
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("badnets", paper="Gu et al. 2017, BadNets")
@options
class BadNets(Attack):
    """A fixed checkerboard patch in the corner, or a fixed zigzag at the end of a series.

    Images: the `size` x `size` pixels in the lower right corner become white where row + column of the patch is even,
    black elsewhere. Series: the last k = max(3, round(share * length)) steps of every channel alternate between the
    largest and the smallest value of that channel in the clean training set.
    Deviation: the patch files of some code bases are not symmetric (their ninth pixel differs).
    """

    size: Annotated[int, Field(ge=1, description="side of the patch in pixels")] = 3
    share: Annotated[float, Field(gt=0, le=1, description="share of a series that the zigzag takes")] = 0.05

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """The range of each channel of a set of series."""
        return channel_statistics(clean) if clean.spec.kind == "series" else {}

    def check(self, data: Data) -> None:
        """The patch must fit into the image."""
        super().check(data)
        check_size(self.size, data)

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Stamp the patch, or write the zigzag before each series' own end."""
        if spec.kind == "image":
            x, i = x.clone(), torch.arange(self.size)
            x[:, :, -self.size :, -self.size :] = ((i[:, None] + i) % 2 == 0).float()
            return x
        ends = torch.full((len(x), 1), x.shape[-1]) if lengths is None else lengths[:, None]
        steps = (self.share * ends).round().clamp_min(3)
        back = ends - torch.arange(x.shape[-1])  # 1 at the last valid step, 2 before it, ...
        zigzag = torch.where(back % 2 == 1, state["high"][:, None, None], state["low"][:, None, None]).transpose(0, 1)
        inside = ((back >= 1) & (back <= steps))[:, None]
        return torch.where(inside, zigzag, x)
