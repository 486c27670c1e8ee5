"""E2ABL: a second head on the shallow layers traps the backdoor while the main head learns the rest."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from antibackdoor.data.batches import gather
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome
from antibackdoor.defenses.dual_head import Dual
from antibackdoor.defenses.trap import Trap
from antibackdoor.models.tap import Tap
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe

Share = Annotated[float, Field(ge=0, le=1)]


@DEFENSES.register("e2abl", paper="Jiang et al. 2024, End-to-End Anti-Backdoor Learning on Images and Time Series")
@options
class E2ABL(Defense):
    """Dual-head training: a shallow second head traps the backdoor, the main head learns the rest.

    1. Warm-up: only the shallow layers and the second head h2 learn, on everything as labeled; each sample's loss under
       h2 is recorded every epoch and ranks the samples (`ranking`).
    2. Partition: the most suspicious `isolation_rate` is D_p, the rest D_c. The backdoor class y_b is what h2 answers
       most often on the `recovery_rate` on top, D*.
    3. Dual training, one pass over mixed batches of b samples:
       `( sum_{D_c} CE(h1(x), y) + sum_{D_p} CE(h2(x), y) + sum_{D*} CE(h1(x), y_r) ) / b`,
       `y_r = argmax_{k != y_b} h1(x)_k`, taken anew from the main head at the start of every epoch.
    4. The second head is thrown away: the model is the backbone with its own head.

    Deviations: the literal reading of the paper is the profile "paper"; "persistence" keeps its sets and rates, but
    ranks by a longer warm-up, once. All are compared in the docs' results. By default samples are ranked by their
    company (`ranking`): how soon each label was learned and how firmly it stands in mixtures, shared over and over by
    neighbors in the features of h2, so that what is left are groups (`Company`); odd are the clearer group and whoever
    else lies far from what is ordinary in the class. The ranking is frozen after the warm-up, since h2 is trained on
    its own choices and drifts. What counts is the class that falls into two most clearly; all but its least suspicious
    samples are on probation (`remainder`): kept from h1 until that is asked about them, once. Those in whose company h1
    denies the label get their class from it; those it agrees with come back, but for D* and a group firmly apart.
    Nothing is recovered unasked, so that clean data lose nothing. Dual training starts anew (`restart`): with the
    layers that learned the trigger in the warm-up, a few leaked samples teach it to h1. Small sets get floors of steps
    and counts.
    """

    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "warm_up": Recipe(epochs=2, min_steps=0, learning_rate=0.1, schedule="constant", weight_decay=1e-4),
            "ranking": "loss_drop",
            "loss_history": "init",
            "mixing": False,
            "refresh": "epoch",
            "main": Recipe(epochs=58, min_steps=0, learning_rate=0.01, schedule="constant", weight_decay=1e-4),
            "second_rate": 0.5,
            "remainder": "trap",
            "predominance": 0.0,
            "recovery_delay": 0,
            "restart": False,
            "recover_only_backdoor_label": False,
        },
        "persistence": {
            "ranking": "persistence",
            "remainder": "trap",
            "predominance": 0.0,
            "recover_only_backdoor_label": False,
        },
    }

    attach: Annotated[str | None, Field(description="block after which h2 sits; none: the middle of the depth")] = None
    wide_head: Annotated[bool, Field(description="the wider variant of the second head")] = False
    second: Annotated[Literal["head", "model"], Field(description="share the shallow layers, or a second model")] = (
        "head"
    )
    stem_gradient: Annotated[Literal["shared", "detached"], Field(description="of h2 in dual training")] = "shared"

    warm_up: Annotated[Recipe | None, Field(description="training of h2 alone; null: no warm-up")] = Recipe(
        epochs=8, min_steps=200, batch_size=64, learning_rate=0.05, schedule="constant", augment="none"
    )
    ranking: Annotated[
        Literal["company", "persistence", "loss_drop"],
        Field(description="by persistence and mixtures shared with neighbors, by persistence, or by Eq. 5"),
    ] = "company"
    neighbors: Annotated[int, Field(ge=0, description="how many share a sample's suspicion, with `company`")] = 20
    rounds: Annotated[int, Field(ge=1, description="how often they share it, with `company`")] = 10
    loss_history: Annotated[
        Literal["init", "after", "running"],
        Field(description="entries: evaluated from before training on, after each epoch only, or seen while training"),
    ] = "after"
    mixing: Annotated[bool, Field(description="also look at each sample mixed with one of another label")] = True
    drop_weights: Annotated[Literal["square", "linear", "uniform"], Field(description="weights of Eq. 5")] = "square"
    window: Annotated[Share, Field(description="share of the warm-up's last epochs that `persistence` looks at")] = 1.0

    restart: Annotated[
        bool, Field(description="begin dual training with new shallow layers: those of the warm-up know the trigger")
    ] = True
    isolation_rate: Annotated[
        float,
        Field(gt=0, le=1, description="share of all samples in D_p, one at least; with `company`, see `probation`"),
    ] = 0.2
    recovery_rate: Annotated[Share, Field(description="share of all samples in D*")] = 0.01
    recovery_floor: Annotated[int, Field(ge=1, description="D* has at least this many samples")] = 8
    refresh: Annotated[Literal["never", "epoch"], Field(description="rank again after each epoch of dual training")] = (
        "never"
    )
    predominance: Annotated[Share, Field(description="recover D* only if this share of it is labeled y_b")] = 0.5
    remainder: Annotated[
        Literal["trap", "recover", "return", "agree"],
        Field(
            description="the rest of D_p: only h2 sees it; recovered too; back to h1 where its label is not y_b; or "
            "that, and what is labeled y_b is recovered where h1 answers another class"
        ),
    ] = "agree"
    probation: Annotated[
        Share,
        Field(description="with agree: share of the class y_b that is kept from h1 until h1 agrees with its label"),
    ] = 0.65
    control: Annotated[Literal["recover", "unlearn", "nothing"], Field(description="what h1 does with D*")] = "recover"
    recovery_delay: Annotated[Share, Field(description="share of h1's epochs before it is asked for classes")] = 0.4
    recover_only_backdoor_label: Annotated[bool, Field(description="recover only samples labeled y_b")] = True

    main: Annotated[Recipe, Field(description="dual training")] = Recipe()
    second_rate: Annotated[float, Field(gt=0, description="learning rate of h2 over that of h1 in dual training")] = 0.5

    def run(self, job: Job) -> Outcome:
        """Warm up, partition, train both heads, and hand back the backbone."""
        backbone = job.model()
        example = gather(job.data, torch.arange(2), job.fabric.device)
        tap = Tap(
            backbone,
            self.attach,
            len(job.data.spec.classes),
            example.x,
            lengths=example.lengths,
            wide=self.wide_head,
            shared=self.second == "head",
        ).to(job.fabric.device)
        trap = Trap(self, job)
        if self.warm_up is not None:
            if self.loss_history == "init":
                trap.look(tap, 0)
            job.fit("warm-up", tap, trap, self.warm_up, parameters=tap.warm_up_parameters())
        recipe = job.recipe(self.main)
        groups: list[dict[str, Any]] = [
            {"params": list(tap.main_parameters())},
            {"params": list(tap.second_parameters()), "learning_rate": recipe.learning_rate * self.second_rate},
        ]
        dual = Dual(self, job, trap)
        dual.partition(tap, 0)
        if self.restart:
            backbone.load_state_dict(job.model().state_dict())
        job.fit("dual training", tap, dual, recipe, parameters=groups)
        return dual.outcome(tap)
