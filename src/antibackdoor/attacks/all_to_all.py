"""All-to-all: the trigger moves every class to another one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from antibackdoor.attacks.badnets import BadNets
from antibackdoor.attacks.base import ATTACKS
from antibackdoor.options import options


@ATTACKS.register("all_to_all", paper="Gu et al. 2017, BadNets (all-to-all)")
@options
class AllToAll(BadNets):
    """BadNets' patch, which leads class y to class `y + target` (modulo K).

    The model must still tell the classes apart under the trigger, so the success rate cannot exceed clean accuracy by
    much, and no class stands out as the target. Poison is drawn from all classes.
    """

    target: Annotated[int, Field(ge=1, description="how many classes further the trigger leads")] = 1

    def leads_to(self, labels: Tensor, rows: Tensor, classes: int) -> Tensor:
        """The class so many further on."""
        return (labels + self.target) % classes
