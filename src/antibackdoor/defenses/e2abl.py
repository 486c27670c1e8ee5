"""E2ABL: a second head on the shallow layers traps the backdoor while the main head learns the rest."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from antibackdoor.data.batches import gather
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome
from antibackdoor.defenses.dual_head import Dual, Trap
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

    Deviations: the literal reading of the paper is the profile "paper". The defaults change what did not hold up when
    measured: samples are ranked by `Persistence`, of themselves and mixed with another class (`mixing`), instead of by
    Eq. 5; the ranking is frozen after the warm-up, since h2 is trained on its own choices and drifts; isolated samples
    of other labels go back, and of those labeled y_b h1 recovers what it takes for another class (`remainder`). Small
    sets get floors of steps and counts.
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
            "recover_only_backdoor_label": False,
        }
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
    ranking: Annotated[Literal["persistence", "loss_drop"], Field(description="how the losses rank samples")] = (
        "persistence"
    )
    loss_history: Annotated[
        Literal["init", "after", "running"],
        Field(description="entries: evaluated from before training on, after each epoch only, or seen while training"),
    ] = "after"
    mixing: Annotated[bool, Field(description="also look at each sample mixed with one of another label")] = True
    drop_weights: Annotated[Literal["square", "linear", "uniform"], Field(description="weights of Eq. 5")] = "square"
    window: Annotated[Share, Field(description="share of the warm-up's last epochs that `persistence` looks at")] = 1.0

    isolation_rate: Annotated[float, Field(gt=0, le=1, description="share of all samples in D_p, one at least")] = 0.2
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
        job.fit("dual training", tap, dual, recipe, parameters=groups)
        return dual.outcome(tap)
<<<<<<< HEAD


def _second_logits(tap: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(tap, Tap)
    return tap.shallow(batch.x, batch.lengths)


class _Trap(Objective):
    """The warm-up: cross entropy of h2 alone, and the ranking fed with its losses."""

    def __init__(self, options: E2ABL, job: Job):
        self.options, self.job = options, job
        n = len(job.data)
        if options.ranking == "loss_drop" or options.warm_up is None:
            self.ranking: LossDrop | Persistence = LossDrop(n, options.drop_weights)
        else:
            entries = options.warm_up.epochs_for(n) + (options.loss_history == "init")
            entries *= 1 + (options.mixing and options.loss_history != "running")
            self.ranking = Persistence(n, skip=entries - max(1, round(options.window * entries)))

    def look(self, tap: nn.Module, epoch: int) -> None:
        """One entry of the history: the loss of every sample as it is and, with `mixing`, mixed with another class."""
        data, fabric = self.job.data, self.job.fabric
        self.ranking.add(losses(logits_of(tap, data, fabric, call=_second_logits), data.y))
        if self.options.mixing:
            rng = generator(self.job.seed, "mixing", epoch)
            self.ranking.add(losses(mixed_logits_of(tap, data, fabric, rng, call=_second_logits), data.y))

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Only the shallow layers and h2 are computed."""
        values = F.cross_entropy(_second_logits(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"second": values.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Feed the ranking: losses seen while training, or one evaluation pass of the shallow part."""
        if self.options.loss_history == "running":
            self.ranking.add(records["second"])
        else:
            self.look(model, epoch)
        return {"second_loss": float(torch.nanmean(records["second"]))}

    def state(self) -> Tree:
        """The ranking."""
        return self.ranking.state()

    def load(self, state: Tree) -> None:
        """The ranking."""
        self.ranking.load(state)


class _Dual(Objective):
    """Dual training on the current partition; keeps one `Partition` an epoch for the judge."""

    def __init__(self, options: E2ABL, job: Job, trap: _Trap):
        self.options, self.job, self.trap = options, job, trap
        n = len(job.data)
        self.isolated_count = max(1, round(options.isolation_rate * n))
        self.recovered_count = min(self.isolated_count, max(options.recovery_floor, round(options.recovery_rate * n)))
        self.partitions: list[Partition] = []
        self.backdoor_class = -1
        self.asked: Tensor | None = None  # what h1 first said of isolated samples labeled y_b, -1 elsewhere

    def partition(self, tap: nn.Module, epoch: int) -> None:
        """Split by the ranking as it stands and, once h1 has learned something, recover labels from it."""
        o, given = self.options, self.job.data.y.cpu()
        isolated = torch.zeros(len(given), dtype=torch.bool)
        suspects = torch.zeros(len(given), dtype=torch.bool)
        if not (o.warm_up is None and epoch == 0):  # without a warm-up nothing is known before the first epoch
            order = top(self.trap.ranking.scores(), self.isolated_count)
            first = order[: self.recovered_count]
            answers = logits_of(tap, self.job.data, self.job.fabric, first, call=_second_logits).argmax(1)
            self.backdoor_class = int(answers.mode().values)
            isolated[order] = True
            predominance = float((given[first] == self.backdoor_class).double().mean())
            if predominance >= o.predominance:
                suspects[order if o.remainder == "recover" else first] = True
            if o.recover_only_backdoor_label:
                suspects &= given == self.backdoor_class
            if o.remainder in {"return", "agree"}:
                isolated &= (given == self.backdoor_class) | suspects
        of_class = (given == self.backdoor_class).nonzero().flatten()
        probation = torch.zeros(len(given), dtype=torch.bool)
        if o.remainder == "agree" and len(of_class):
            scores = self.trap.ranking.scores()[of_class]
            probation[of_class[top(scores, round(o.probation * len(of_class)))]] = True
            probation &= ~isolated
            isolated |= probation
        ready = self._ready(epoch)
        labels, recovered = given.clone(), suspects.clone()
        if ready and isolated.any():
            rows = isolated.nonzero().flatten()
            logits = logits_of(tap.backbone, self.job.data, self.job.fabric, rows)  # type: ignore[arg-type]
            answer = torch.full_like(given, -1).index_copy(0, rows, logits.argmax(1))
            if self.asked is None:
                self.asked = answer.masked_fill(given != self.backdoor_class, -1)
            if o.remainder == "agree":
                # Asked once: later h1 would only repeat what it was taught since.
                recovered |= (self.asked >= 0) & (self.asked != self.backdoor_class)
                isolated &= ~(probation & (self.asked == self.backdoor_class))
            logits[:, self.backdoor_class] = -torch.inf
            other = torch.full_like(given, -1).index_copy(0, rows, logits.argmax(1))
            labels = torch.where(recovered, other, labels)
        self._set(Partition(epoch, isolated, recovered, labels))

    def _ready(self, epoch: int) -> bool:
        """Whether h1 has seen enough to be asked for the true classes of D*."""
        delay = self.options.recovery_delay * self.job.recipe(self.options.main).epochs_for(len(self.job.data))
        return self.options.control == "recover" and epoch >= delay

    def _set(self, partition: Partition) -> None:
        device = self.job.fabric.device
        use_recovered = self._ready(partition.epoch) or self.options.control == "unlearn"
        in_main = ~partition.isolated | partition.recovered if use_recovered else ~partition.isolated
        self.in_main, self.labels = in_main.to(device), partition.labels.to(device)
        self.isolated = partition.isolated.to(device)
        sign = torch.ones(len(in_main))
        if self.options.control == "unlearn":
            sign[partition.recovered] = -1
        self.sign = sign.to(device)
        self.partitions.append(partition)

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """Eq. 4 in one pass; every sample weighs the same, whichever head it goes to."""
        rows, use = batch.rows, self.in_main[batch.rows]
        assert isinstance(model, Tap)
        main, second = model(batch.x, batch.lengths, main=use, detach=self.options.stem_gradient == "detached")
        main_losses = F.cross_entropy(main.float(), self.labels[rows][use], reduction="none")
        second_losses = F.cross_entropy(second.float(), batch.y, reduction="none")
        total = (main_losses * self.sign[rows][use]).sum() + (second_losses * self.isolated[rows]).sum()
        seen = torch.full_like(second_losses, torch.nan).masked_scatter(use, main_losses.detach())
        return Step(total / len(rows), {"main": seen, "second": second_losses.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """Rank again from the losses that the pass has given anyway (`refresh`), and make the next partition."""
        before = self.partitions[-1].isolated
        if self.options.refresh == "epoch":
            self.trap.ranking.add(records["second"])
        self.partition(model, epoch)
        return {
            "main_loss": float(torch.nanmean(records["main"])),
            "second_loss": float(torch.nanmean(records["second"])),
            "churn": float((before != self.partitions[-1].isolated).double().mean()),
        }

    def state(self) -> Tree:
        """The ranking, the partitions so far and the backdoor class."""
        kept = [[p.epoch, p.isolated, p.recovered, p.labels] for p in self.partitions]
        return {
            "ranking": self.trap.ranking.state(),
            "partitions": kept,
            "backdoor_class": self.backdoor_class,
            "asked": self.asked,
        }

    def load(self, state: Tree) -> None:
        """Back to the last partition, used as it was."""
        self.trap.ranking.load(state["ranking"])
        self.backdoor_class, self.asked = state["backdoor_class"], state["asked"]
        kept = [Partition(*values) for values in state["partitions"]]
        self.partitions = kept[:-1]
        self._set(kept[-1])

    def outcome(self, tap: Tap) -> Outcome:
        """Judge the samples by the ranking and by what the main head said before it was taught their labels."""
        logits = logits_of(tap.backbone, self.job.data, self.job.fabric)
        scores, last = self.trap.ranking.scores(), self.partitions[-1]
        asked = torch.full_like(last.labels, -1) if self.asked is None else self.asked
        return suspects_of(tap.backbone, self.job.data, scores, logits, asked, self.backdoor_class, self.partitions)
=======
>>>>>>> main
