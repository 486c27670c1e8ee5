"""Several triggers at once, each with a target class of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.base import ATTACKS, Attack, State, channel_statistics, draws
from antibackdoor.attacks.blend import Blend
from antibackdoor.data.core import Data, Spec
from antibackdoor.errors import InputError
from antibackdoor.options import options
from antibackdoor.seeds import generator

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("several", paper="Gu et al. 2017 (BadNets) and Chen et al. 2017 (Blend), with several triggers")
@options
class Several(Attack):
    """`count` patches or patterns at once; number k leads to class `target + k` (modulo K).

    Which trigger a sample carries, in training and at test, is drawn for each sample that is not of that trigger's
    target. Patches: `size` x `size` random black-and-white pixels that go around corners and edges, or in series a
    random up and down over a stretch of `share` of the length that begins at `(k + 1/2) / count` of it. Patterns: as
    Blend's, a seed apart.
    """

    count: Annotated[int, Field(ge=2, le=8, description="number of triggers and of target classes")] = 3
    form: Annotated[Literal["patch", "blend"], Field(description="small patches or whole patterns")] = "patch"
    size: Annotated[int, Field(ge=1, description="side of a patch in pixels")] = 3
    share: Annotated[float, Field(gt=0, le=1, description="share of a series that a patch takes")] = 0.05
    alpha: Annotated[float, Field(gt=0, le=1, description="weight of a pattern in images")] = 0.2
    strength: Annotated[float, Field(gt=0, description="pattern in series, in standard deviations")] = 0.5

    own_targets: ClassVar[bool] = True

    def check(self, data: Data) -> None:
        """There must be a class for each trigger, and room for the patch."""
        super().check(data)
        if self.own_targets and self.count > len(data.spec.classes):
            raise InputError(
                f"{self.count} triggers need as many target classes, but there are only {len(data.spec.classes)}; "
                "lower count."
            )
        if data.spec.kind == "image" and self.form == "patch" and 2 * self.size > min(data.spec.shape[1:]):
            raise InputError(f"patches of {self.size} pixels do not fit into images of {data.spec.shape[1:]}.")

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Draw the patches or patterns `(count, ...)`."""
        statistics = channel_statistics(clean) if clean.spec.kind == "series" else {}
        if self.form == "blend":
            patterns = [Blend(pattern_seed=k).fit(clean)["pattern"] for k in range(self.count)]
            return {"pattern": torch.stack(patterns)}
        side = self.size**2 if clean.spec.kind == "image" else clean.spec.shape[-1]
        chance = torch.rand(self.count, side, generator=generator(0, "several"))
        if clean.spec.kind == "image":
            return {"pattern": (chance < 0.5).float().view(self.count, 1, self.size, self.size)}
        return {"pattern": (chance < 0.5).float()[:, None], "low": statistics["low"], "high": statistics["high"]}

    def which(self, rows: Tensor) -> Tensor:
        """`(m,)` number of the trigger that each row carries."""
        return (draws(rows, 1, "several")[:, 0] * self.count).long()

    def leads_to(self, labels: Tensor, rows: Tensor, classes: int) -> Tensor:
        """The target of the sample's trigger."""
        return (self.target + self.which(rows) * self.own_targets) % classes

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Stamp the sample's patch, or blend in its pattern."""
        return self.stamp(x, spec, state, self.which(rows), lengths)

    def stamp(self, x: Tensor, spec: Spec, state: State, which: Tensor, lengths: Tensor | None) -> Tensor:
        """The samples with trigger number `which` `(m,)`."""
        pattern = state["pattern"][which]
        if self.form == "blend":
            return torch.lerp(x, pattern, self.alpha) if spec.kind == "image" else x + self.strength * pattern
        if spec.kind == "image":
            x = x.clone()
            for k in range(self.count):
                down, right = self._corner(k, *spec.shape[1:])
                x[which == k, :, down : down + self.size, right : right + self.size] = state["pattern"][k]
            return x
        ends = torch.full((len(x), 1), x.shape[-1]) if lengths is None else lengths[:, None]
        since = torch.arange(x.shape[-1]) - ((which[:, None] + 0.5) / self.count * ends).long()
        inside = (since >= 0) & (since < (self.share * ends).round().clamp_min(3))
        up = pattern.gather(2, since.clamp_min(0)[:, None])
        jump = torch.where(up > 0.5, state["high"][:, None], state["low"][:, None])
        return torch.where(inside[:, None], jump, x)

    def _corner(self, k: int, height: int, width: int) -> tuple[int, int]:
        """Upper left pixel of patch k: the corners first, then the middles of the edges."""
        low, right = height - self.size, width - self.size
        spots = [(low, right), (0, 0), (low, 0), (0, right), (low // 2, 0), (0, right // 2), (low, right // 2)]
        return [*spots, (low // 2, right)][k]
