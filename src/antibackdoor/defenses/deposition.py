"""What the shallow witnesses of `jury` said, before any model was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from antibackdoor.defenses.company import CERTAIN
from antibackdoor.models.tap import Tap
from antibackdoor.training.groups import FIRM

if TYPE_CHECKING:
    from antibackdoor.defenses.jury import Jury


DIVISIONS = ("ease", "bond", "division")
"""What each of the three opinions calls a division of a class, in options and findings; home is the third."""

PLAIN = 1.5
"""Times its limit from which on a division convicts though the model agrees with the labels of those set apart, as it
does with those of clean-label poison, and of a clean kind of its own; such a kind divides its class less clearly."""


@dataclass(frozen=True)
class Deposition:
    """What the shallow witnesses of `jury` said.

    tap: the one that learned everything. suspicion: `(n,)` in [0, 1], percentile within the samples of the same given
    label, 1 for those apart. ease: `(n,)`, how early each label was learned. near: `(n, m)`, each sample's `nearest` in
    the features of the tap. groups: `(3, n)` bool, samples that ease, mixtures and outsiders set apart from their
    class beyond doubt. elsewhere: `(n,)`, what an outsider is confident to see in place of the label, -1 for nothing.
    clear: for each class how clearly ease, bond and home divide it.
    """

    tap: Tap
    suspicion: Tensor
    ease: Tensor
    near: Tensor
    groups: Tensor
    elsewhere: Tensor
    clear: Sequence[Sequence[float]]

    @property
    def apart(self) -> Tensor:
        """`(n,)` bool, samples that any of them sets apart."""
        return self.groups.any(0)

    def scores(self, given: Tensor) -> Tensor:
        """`(n,)`, suspicion for a ranking of the whole set: classes that are firmly divided come before all others."""
        clearest = [max(clear) for clear in self.clear]
        firm = torch.tensor([clear if clear >= FIRM else 0.0 for clear in clearest], dtype=torch.float64)
        return self.suspicion + firm[given]

    def finding(self, label: int, given: Tensor) -> dict[str, Any]:
        """About one class, before any hearing: what `verdict` reads."""
        apart = int(self.apart[given == label].sum())
        told = {**dict(zip(DIVISIONS, self.clear[label], strict=True)), "apart": apart, "agreed": {}}
        heard = {"count": 0, "n": 0, "denial": 0.0, "together": 0, "early": 0.0, "stayed": False}
        heard |= {"alike": 1.0, "kin": 0.0, "below": 0.0, "certain": False}
        return {**heard, **told, "attacked": apart > 0}

    def evidence(self, findings: Sequence[dict[str, Any]], options: Jury) -> dict[str, Any]:
        """For the verdict: what was found about each class, and the limits beyond which it counts."""
        return {"by_class": list(findings), "limits": limits_of(options)}


def limits_of(options: Jury) -> dict[str, float]:
    """The limits beyond which what is found about a class counts."""
    names = ("acquittal", "denial", "alike", *DIVISIONS)
    return {**{name: getattr(options, name) for name in names}, "certain": CERTAIN, "plain": PLAIN}
