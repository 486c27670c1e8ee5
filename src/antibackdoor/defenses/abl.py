"""ABL: hold the losses at a level that only poison stays under, isolate that, train on the rest, unlearn the poison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, Partition
from antibackdoor.files import Tree
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective, Step, forward
from antibackdoor.training.ranking import top
from antibackdoor.training.scores import logits_of, losses


def held(values: Tensor, level: float, how: str = "gradient_ascent", over: str = "sample") -> Tensor:
    """The loss of a batch, `values` (b,), held near `level`.

    gradient_ascent: `sign(l - level) * l`, which pushes a loss below the level up again; flooding: `|l - level| +
    level`, whose gradient is the same; nothing: `l`. over: whether l is each sample's loss (then averaged) or the
    batch's mean. With the mean, poison may sink to zero as long as the clean samples of its batch stay high.
    """
    values = values if over == "sample" else values.mean()
    if how == "gradient_ascent":
        values = torch.sign(values.detach() - level) * values
    elif how == "flooding":
        values = (values - level).abs() + level
    return values.mean()


class Held(Objective):
    """The isolation stage; records each sample's loss as "main"."""

    def __init__(self, level: float, how: str, over: str):
        self.level, self.how, self.over = level, how, over

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Cross entropy, held."""
        values = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step(held(values, self.level, self.how, self.over), {"main": values.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean training loss."""
        return {"main_loss": float(torch.nanmean(records["main"]))}


class Unlearn(Objective):
    """Gradient ascent on the cross entropy of isolated samples; it goes back from what is not finite, and stops there.

    frozen: batch norms keep the statistics of the whole set, instead of taking those of the isolated samples.
    """

    def __init__(self, *, frozen: bool):
        self.frozen = frozen
        self.stopped = 0  # the epoch in which the ascent blew up; 0: it did not
        self._good: dict[str, Tensor] = {}

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Remember the weights; freeze the statistics of batch norms."""
        self._good = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if self.frozen:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Minus the mean cross entropy."""
        values = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step((self.sign(batch) * values).mean(), {"main": values.detach()})

    def sign(self, batch: Batch) -> Tensor:
        """-1 for the samples to unlearn, which here are all."""
        return -torch.ones_like(batch.y, dtype=torch.float32)

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Take back an epoch that ends in weights that are not finite; the cross entropy of the samples."""
        if all(bool(value.isfinite().all()) for value in model.state_dict().values() if value.is_floating_point()):
            return {"cross_entropy": float(torch.nanmean(records["main"]))}
        model.load_state_dict(self._good)
        self.stopped, self.finished = epoch, True
        return {}

    def state(self) -> Tree:
        """Whether and when it blew up."""
        return {"stopped": self.stopped}

    def load(self, state: Tree) -> None:
        """Whether and when it blew up."""
        self.stopped = state["stopped"]


@DEFENSES.register("abl", paper="Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data")
@options
class ABL(Defense):
    """Anti-Backdoor Learning: isolate what is learned fastest, train on the rest, then unlearn the isolated samples.

    1. Isolation: train on everything with `held` losses. Poison is learned fast and dips under any level; the held
       losses of clean samples hover around it. The share `isolation_rate` of lowest cross entropy is isolated.
    2. Fine-tuning: the same model goes on with plain cross entropy, on the rest (as the code does) or on all.
    3. Unlearning: a few epochs of gradient ascent on the isolated samples. Ascent has no lower bound: an epoch that
       ends in weights that are not finite is taken back and the ascent stops, which `evidence` tells.

    Scores: minus the cross entropy after the isolation stage. Flagged is what was isolated: a fixed share of any set,
    clean ones too, so there is no verdict. Suggested: the class that the final model ranks first among the others.
    Deviations: the main training has the budget of this package (20, 60 and 20 epochs are the profile "paper"), small
    sets get floors of steps and of isolated samples. Profile "code": flooding of the batch's mean, 10 epochs, 4 of
    ascent at 5e-4, as in the published code, whose every variant takes the sign of the batch's mean.
    """

    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "main": Recipe(epochs=60, min_steps=0, learning_rate=0.1, weight_decay=1e-4),
        },
        "code": {
            "hold": "flooding",
            "over": "batch",
            "isolation": Recipe(epochs=10, learning_rate=0.1, weight_decay=1e-4, schedule="constant", augment="none"),
            "main": Recipe(epochs=60, min_steps=0, learning_rate=0.1, weight_decay=1e-4),
            "unlearning": Recipe(
                epochs=4, min_steps=0, learning_rate=5e-4, weight_decay=1e-4, schedule="constant", augment="none"
            ),
            "statistics": "batch",
        },
    }

    hold: Annotated[
        Literal["gradient_ascent", "flooding", "nothing"], Field(description="how losses are held in isolation")
    ] = "gradient_ascent"
    over: Annotated[Literal["sample", "batch"], Field(description="what is held: each loss, or the batch's mean")] = (
        "sample"
    )
    level: Annotated[float, Field(gt=0, description="the level at which losses are held, in nats")] = 0.5
    isolation: Annotated[Recipe, Field(description="training with held losses")] = Recipe(
        epochs=20, learning_rate=0.1, weight_decay=1e-4, schedule="constant", augment="none"
    )
    isolation_rate: Annotated[float, Field(gt=0, lt=1, description="share of all samples that is isolated")] = 0.01
    isolation_floor: Annotated[int, Field(ge=1, description="at least this many samples are isolated")] = 8
    fine_tune_on: Annotated[Literal["rest", "all"], Field(description="what the main training sees")] = "rest"
    main: Annotated[Recipe, Field(description="main training, after the isolation")] = Recipe()
    unlearning: Annotated[Recipe, Field(description="gradient ascent on the isolated samples")] = Recipe(
        epochs=20, min_steps=100, learning_rate=1e-4, weight_decay=1e-4, schedule="constant", augment="none"
    )
    statistics: Annotated[
        Literal["batch", "frozen"], Field(description="of batch norms in unlearning: of the isolated samples, or kept")
    ] = "frozen"

    def run(self, job: Job) -> Outcome:
        """Isolate, fine-tune, unlearn."""
        model, n = job.model(), len(job.data)
        job.fit("isolation", model, Held(self.level, self.hold, self.over), self.isolation)
        values = losses(logits_of(model, job.data, job.fabric), job.data.y)
        count = min(max(self.isolation_floor, round(self.isolation_rate * n)), n // 2)
        isolated = torch.zeros(n, dtype=torch.bool)
        isolated[top(-values, count)] = True
        rest = None if self.fine_tune_on == "all" else (~isolated).nonzero().flatten()
        job.fit("fine-tuning", model, CrossEntropy(), job.recipe(self.main), rows=rest)
        ascent = Unlearn(frozen=self.statistics == "frozen")
        job.fit("unlearning", model, ascent, self.unlearning, rows=isolated.nonzero().flatten())
        evidence: dict[str, Any] = {"isolated": count}
        if ascent.stopped:
            evidence["unlearning_taken_back_from_epoch"] = ascent.stopped
        reason = "its loss stays under the level at which almost all others are held"
        return outcome_of_isolation(model, job, -values, isolated, evidence, reason)


def outcome_of_isolation(
    model: nn.Module, job: Job, scores: Tensor, isolated: Tensor, evidence: dict[str, Any], reason: str
) -> Outcome:
    """Everything isolated is flagged; probability: 1 minus the final model's belief in the given label."""
    data: Data = job.data
    given = data.y.cpu()
    logits = logits_of(model, data, job.fabric).double()
    belief = logits.softmax(1).gather(1, given[:, None]).squeeze(1)
    others = logits.scatter(1, given[:, None], -torch.inf).argmax(1)
    nothing = torch.zeros_like(isolated)
    return Outcome(
        model,
        scores,
        torch.where(isolated, 1 - belief, 0.0).clamp(0, 1),
        isolated,
        torch.where(isolated, others, -1),
        dict.fromkeys(isolated.nonzero().flatten().tolist(), reason),
        evidence,
        [Partition(0, isolated, nothing, given)],
    )
