"""TrojanNN: a patch that drives chosen neurons of a clean model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor, nn

from antibackdoor.attacks.base import ATTACKS, State
from antibackdoor.attacks.stamp import Stamp, check_size, place
from antibackdoor.attacks.surrogate import Trained, embed, sample_rows
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import Objective, Step
from antibackdoor.training.scores import logits_of

if TYPE_CHECKING:
    from antibackdoor.training.job import Job


@ATTACKS.register("trojannn", paper="Liu et al. 2018, Trojaning attack on neural networks")
@options
class TrojanNN(Trained):
    """A patch optimized to drive the most connected neurons of a clean surrogate; data-poisoning version.

    Of the penultimate layer, the `neurons` units j with the largest sum of |weights| into the classes are chosen. The
    values of a patch p in the lower right corner (the last steps of a series, before its own end) minimize
    `mean_x sum_j (a_j(x with p) - v_j)^2`, where v_j is `aim` times the unit's mean activation on clean samples. The
    patch then replaces what was there.
    Deviations: the paper also trains the model on, with data made from the model alone; the patch is optimized on
    clean samples, not on one empty picture, and with Adam, not by steps of fixed size.
    """

    size: Annotated[int, Field(ge=1, description="side of the patch in pixels")] = 5
    share: Annotated[float, Field(gt=0, le=1, description="share of the longest series that the patch takes")] = 0.1
    neurons: Annotated[int, Field(ge=1, description="number of units that the patch drives")] = 2
    aim: Annotated[float, Field(gt=1, description="wanted activation, in multiples of the mean")] = 20.0
    optimization: Recipe = Recipe(
        epochs=1, min_steps=300, batch_size=32, learning_rate=0.1, weight_decay=0, augment="none"
    )

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, choose the units, optimize the patch."""
        surrogate, job = self.train_surrogate(job)
        last = [module for module in surrogate.modules() if isinstance(module, nn.Linear)][-1]
        units = last.weight.abs().sum(0).topk(min(self.neurons, last.in_features)).indices
        rows = sample_rows(job, 1000)
        features = logits_of(surrogate, job.data, job.fabric, rows, call=lambda m, b: embed(m, b.x, b.lengths))
        wanted = self.aim * features.mean(0).to(units.device)[units]
        stamp = Stamp(clean, self.size, self.share).to(job.fabric.device)
        job.fit("patch", stamp, Drive(surrogate, units, wanted), self.optimization, rows=rows, adam=True)
        return {"pattern": stamp.pattern().detach().cpu()}

    def check(self, data: Data) -> None:
        """The patch must fit into the image."""
        super().check(data)
        check_size(self.size, data)

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Put the patch in its place."""
        return place(x, state["pattern"].to(x.device), lengths)


class Drive(Objective):
    """Squared distance of the chosen units' activations under the stamp from the wanted ones."""

    def __init__(self, surrogate: nn.Module, units: Tensor, wanted: Tensor):
        self.surrogate, self.units, self.wanted = surrogate, units, wanted

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Model is the stamp; the surrogate stays as it is."""
        active = embed(self.surrogate, model(batch.x, batch.lengths), batch.lengths)[:, self.units]
        loss = (active - self.wanted).square().mean()
        return Step(loss, {"distance": loss.detach().expand(len(active)), "active": active.detach().mean(1)})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean distance, the mean activation reached, and the wanted one."""
        numbers = {"distance_loss": records["distance"], "activation": records["active"], "wanted": self.wanted}
        return {name: float(values.nanmean()) for name, values in numbers.items()}
