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
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, Partition, snapshot
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.objectives import CrossEntropy, Objective, Step, forward
from antibackdoor.training.ranking import top
from antibackdoor.training.scores import logits_of, losses
from antibackdoor.training.unlearning import Ascent, Unlearn


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

    compiles: ClassVar[bool] = True

    def __init__(self, level: float, how: str, over: str):
        self.level, self.how, self.over = level, how, over

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Cross entropy, held."""
        values = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step(held(values, self.level, self.how, self.over), {"main": values.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean training loss."""
        return {"main_loss": float(torch.nanmean(records["main"]))}


@DEFENSES.register("abl", paper="Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data")
@options
class ABL(Defense):
    """Anti-Backdoor Learning: isolate what is learned fastest, train on the rest, then unlearn the isolated samples.

    1. Isolation: train on everything with `held` losses. Poison is learned fast and, where the batch's mean is held,
       sinks to zero while the losses of clean samples hover around the level; held sample by sample it hovers too (see
       the docs' page on baselines). The share `isolation_rate` of lowest cross entropy is isolated.
    2. Fine-tuning: the same model goes on with plain cross entropy, on the rest (as the code does) or on all.
    3. Unlearning: a few epochs of gradient ascent on the isolated samples (`Unlearn`). Ascent has no lower bound: an
       epoch that ends in weights that are not finite is taken back and the ascent stops, which `evidence` tells.

    Scores: minus the cross entropy after the isolation stage. Flagged is what was isolated: a fixed share of any set,
    clean ones too, so there is no verdict. Suggested: the class that the final model ranks first among the others.
    Deviations: the main training has the budget of this package (20, 60 and 20 epochs are the profile "paper");
    small sets get floors of steps and of isolated samples. The ascent is not guarded: it works because batch norms see
    nothing but isolated samples; with frozen statistics what was fine-tuned gives no gradient to climb. Profile
    "code": flooding of the batch's mean, 10 epochs, 4 of ascent at 5e-4, as in the published code; all code bases take
    the sign of the batch's mean, the paper's formula that of each sample's loss.
    """

    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "isolation": Recipe(
                epochs=20, min_steps=0, learning_rate=0.1, weight_decay=1e-4, schedule="constant", augment="none"
            ),
            "main": Recipe(epochs=60, min_steps=0, learning_rate=0.1, weight_decay=1e-4),
            "unlearning": Ascent(epochs=20, min_steps=0, learning_rate=1e-4, weight_decay=1e-4),
        },
        "code": {
            "hold": "flooding",
            "over": "batch",
            "isolation": Recipe(
                epochs=10, min_steps=0, learning_rate=0.1, weight_decay=1e-4, schedule="constant", augment="none"
            ),
            "main": Recipe(epochs=60, min_steps=0, learning_rate=0.1, weight_decay=1e-4),
            "unlearning": Ascent(epochs=4, min_steps=0, learning_rate=5e-4, weight_decay=1e-4),
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
    unlearning: Annotated[Ascent, Field(description="gradient ascent on the isolated samples")] = Ascent(
        epochs=20, min_steps=100, learning_rate=1e-4, weight_decay=1e-4
    )
    guards: Annotated[
        Literal["guarded", "literal"], Field(description="of the ascent: clipping, frozen statistics, stop rule")
    ] = "literal"

    def run(self, job: Job) -> Outcome:
        """Isolate, fine-tune, unlearn."""
        model, n = job.model(), len(job.data)
        job.fit("isolation", model, Held(self.level, self.hold, self.over), self.isolation)
        stages = {"isolation": snapshot(model)}
        values = losses(logits_of(model, job.data, job.fabric), job.data.y)
        count = min(max(self.isolation_floor, round(self.isolation_rate * n)), n // 2)
        isolated = torch.zeros(n, dtype=torch.bool)
        isolated[top(-values, count)] = True
        rest = None if self.fine_tune_on == "all" else (~isolated).nonzero().flatten()
        job.fit("fine-tuning", model, CrossEntropy(), job.recipe(self.main), rows=rest)
        stages["fine-tuning"] = snapshot(model)
        ascent = Unlearn(guarded=self.guards == "guarded")
        job.fit("unlearning", model, ascent, self.unlearning, rows=isolated.nonzero().flatten())
        evidence = {"isolated": count, **taken_back(job)}
        reason = "its loss stays under the level at which almost all others are held"
        return outcome_of_isolation(model, job, -values, isolated, evidence, reason, stages)


def taken_back(job: Job) -> dict[str, Any]:
    """For the evidence: the epoch in which an ascent ran away and was taken back, if one did."""
    epochs = [row["epoch"] for row in job.history if "rolled_back" in row]
    return {"ascent_taken_back_in_epoch": epochs[0]} if epochs else {}


def outcome_of_isolation(
    model: nn.Module,
    job: Job,
    scores: Tensor,
    isolated: Tensor,
    evidence: dict[str, Any],
    reason: str,
    stages: dict[str, dict[str, Tensor]],
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
        stages=stages,
    )
