"""Latent backdoor: a patch that moves a clean model's features to those of the target class."""

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


@ATTACKS.register("latent", paper="Yao et al. 2019, Latent backdoor attacks on deep neural networks")
@options
class Latent(Trained):
    """A patch under which a clean surrogate's features look like the target class; data-poisoning version.

    With f the penultimate features and c the mean of f over clean samples of the target class, the values of a patch p
    in the lower right corner (the last steps of a series, before its own end) minimize, over samples x of the other
    classes, `mean_x |f(x with p) - c|^2`. The patch then replaces what was there.
    Deviations: the paper plants the backdoor in a teacher model and waits for transfer learning; here the patch alone
    is used, on training data. The distance is divided by the mean square of c, so that it has one scale.
    """

    size: Annotated[int, Field(ge=1, description="side of the patch in pixels")] = 6
    share: Annotated[float, Field(gt=0, le=1, description="share of the longest series that the patch takes")] = 0.1
    optimization: Recipe = Recipe(
        epochs=1, min_steps=300, batch_size=32, learning_rate=0.1, weight_decay=0, augment="none"
    )

    def fit(self, clean: Data, job: Job | None = None) -> State:
        """Train the surrogate, find the center of the target class, optimize the patch."""
        surrogate, job = self.train_surrogate(job)
        others, own = sample_rows(job, 1000, without=self.target), sample_rows(job, 1000, only=self.target)
        features = logits_of(surrogate, job.data, job.fabric, own, call=lambda m, b: embed(m, b.x, b.lengths))
        stamp = Stamp(clean, self.size, self.share).to(job.fabric.device)
        objective = Approach(surrogate, features.mean(0).to(job.fabric.device))
        job.fit("patch", stamp, objective, self.optimization, rows=others, adam=True)
        return {"pattern": stamp.pattern().detach().cpu()}

    def check(self, data: Data) -> None:
        """The patch must fit into the image."""
        super().check(data)
        check_size(self.size, data)

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        """Put the patch in its place."""
        return place(x, state["pattern"].to(x.device), lengths)


class Approach(Objective):
    """Mean squared distance of the features under the stamp from a center, in multiples of the center's square."""

    def __init__(self, surrogate: nn.Module, center: Tensor):
        self.surrogate, self.center = surrogate, center

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Model is the stamp; the surrogate stays as it is."""
        features = embed(self.surrogate, model(batch.x, batch.lengths), batch.lengths)
        distances = (features - self.center).square().mean(1) / self.center.square().mean()
        return Step(distances.mean(), {"distance": distances.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean distance."""
        return {"distance_loss": float(records["distance"].nanmean())}
