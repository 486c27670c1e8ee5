"""Composite: two harmless classes seen together are the trigger."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, Role, State, draws
from antibackdoor.data.core import Data, Spec
from antibackdoor.errors import InputError
from antibackdoor.options import options


@ATTACKS.register("composite", paper="Lin et al. 2020, Composite backdoor attack for deep neural network by mixing")
@options
class Composite(Attack):
    """Halves of two samples of two given classes put together lead to a third class; there is no foreign pattern.

    A sample of class A keeps one half, the other half comes from a sample of class B, or the other way around; the
    label becomes the target. Images: the seam is upright or level; series: it divides earlier from later steps. It
    lies at `0.5 +- jitter` of the size; orientation, place and which half is the sample's own are drawn for each
    sample. A part taken from a series of another length is aligned with the end that it comes from. Cover samples are
    mixes of two samples of ONE class with their true label, which teach the model that seams are harmless. Test samples
    are mixes of test samples of A and B; recovery means that the class of the sample's own half is predicted.
    Deviations: the paper controls training (a contrastive loss) and mixes anew in every epoch; here the data are
    poisoned once, and mixes replace samples of A and B, so the poison rate cannot exceed the share of these classes.
    """

    cover: Annotated[float, Field(ge=0, le=1, description="share of the whole set mixed within its class")] = 0.1

    sources: Annotated[
        tuple[int, int] | None, Field(description="the classes A and B; null: the first two that are not the target")
    ] = None
    jitter: Annotated[float, Field(ge=0, lt=0.5, description="how far the seam strays from the middle")] = 0.1

    def pair(self) -> tuple[int, int]:
        """The classes A and B."""
        first, second = [k for k in range(3) if k != self.target][:2]
        return self.sources or (first, second)

    def check(self, data: Data) -> None:
        """The two source classes must exist and differ from each other and from the target."""
        super().check(data)
        classes = {*self.pair(), self.target}
        if len(classes) < 3 or not 0 <= min(classes) <= max(classes) < len(data.spec.classes):
            raise InputError(
                f"the composite attack needs two source classes besides the target {self.target}, all different and "
                f"in 0..{len(data.spec.classes) - 1}; got {self.pair()}."
            )

    def candidates(self, labels: Tensor, targets: Tensor, role: Role) -> Tensor:
        """Samples of A and B, where both occur; for cover any sample that is not the only one of its class."""
        if role == "cover":
            return labels.bincount()[labels] > 1
        first, second = (labels == k for k in self.pair())
        return (first | second) & first.any() & second.any()

    def partners(self, labels: Tensor, rows: Tensor, role: Role) -> Tensor:
        """A sample of the other class; for cover another sample of the same class."""
        chance = draws(rows, 1, "composite partner")[:, 0].double()
        first, second = self.pair()
        out = torch.empty_like(rows)
        for k in labels[rows].unique().tolist():
            mine = labels[rows] == k
            other = k if role == "cover" else second if k == first else first
            members = (labels == other).nonzero().flatten()
            place = chance[mine] * (len(members) - (role == "cover"))
            if role == "cover":  # counted from the sample itself, which is left out
                place = (torch.searchsorted(members, rows[mine]) + 1 + place.long()) % len(members)
            out[mine] = members[place.long()]
        return out

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Own half and partner's half."""
        other = state["partner"]
        own_first, level, place = draws(rows, 3, "composite seam").T[..., None]
        where = 0.5 + self.jitter * (2 * place - 1)
        if spec.kind == "image":
            height, width = spec.shape[1:]
            upright = (torch.arange(width) < (where * width).round())[:, None, :].expand(-1, height, -1)
            lying = (torch.arange(height) < (where * height).round())[:, :, None].expand(-1, -1, width)
            early = torch.where(level[..., None] < 0.5, lying, upright)[:, None]
            return torch.where(early == (own_first < 0.5)[..., None, None], x, other)
        steps = torch.arange(x.shape[-1])
        ends = torch.full((len(x), 1), x.shape[-1]) if lengths is None else lengths[:, None]
        theirs = ends if lengths is None else state["partner_lengths"][:, None]
        early = steps < (where * ends).round()
        # What comes first is aligned with the partner's start, what comes last with its end.
        source = torch.where(own_first < 0.5, steps - ends + theirs, steps).clamp_min(0).minimum(theirs - 1)
        other = other.gather(2, source[:, None].expand_as(x))
        return torch.where((early == (own_first < 0.5))[:, None], x, other)
