"""TaCT: the trigger works on one source class only."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.badnets import BadNets
from antibackdoor.attacks.base import ATTACKS, Role
from antibackdoor.data.core import Data
from antibackdoor.errors import InputError
from antibackdoor.options import options


@ATTACKS.register("tact", paper="Tang et al. 2021, Demon in the variant (targeted contamination attack)")
@options
class Tact(BadNets):
    """BadNets' patch, which leads one source class to the target; on other classes it is cover.

    Cover samples of all the other classes carry the patch with their true label, so the model must look at both, and
    the poison lies inside the cloud of the patch. Test samples are those of the source class.
    """

    rate: Annotated[float, Field(ge=0, le=1, description="poisoned share of the whole set")] = 0.02
    cover: Annotated[float, Field(ge=0, le=1, description="share of the set triggered with its true label")] = 0.02

    source: Annotated[int | None, Field(ge=0, description="source class; null: the first but the target")] = None

    def check(self, data: Data) -> None:
        """The source class must exist and differ from the target."""
        super().check(data)
        if self._source() == self.target or self._source() >= len(data.spec.classes):
            raise InputError(
                f"the source class must be one of 0..{len(data.spec.classes) - 1} other than the target "
                f"{self.target}; got {self._source()}."
            )

    def candidates(self, labels: Tensor, targets: Tensor, role: Role) -> Tensor:
        """Poison and test samples come from the source class, cover from all that are neither source nor target."""
        of_source = labels == self._source()
        return ~of_source & (labels != targets) if role == "cover" else of_source

    def _source(self) -> int:
        return int(self.target == 0) if self.source is None else self.source
