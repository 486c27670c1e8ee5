"""MCR: a point on a curve of low clean loss between the backdoored model and a second one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, shuffled
from antibackdoor.data.core import Data
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, snapshot
from antibackdoor.defenses.none import trained, without_suspects
from antibackdoor.errors import InputError
from antibackdoor.models.blocks import call
from antibackdoor.options import options
from antibackdoor.seeds import generator
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe, Repair
from antibackdoor.training.objectives import CrossEntropy, Objective, Step, forward

Weights = dict[str, Tensor]


def bezier(first: Tensor, bend: Tensor, last: Tensor, t: float) -> Tensor:
    """`(1-t)^2 first + 2 t (1-t) bend + t^2 last`: the quadratic curve that starts and ends at its outer points."""
    return (1 - t) ** 2 * first + 2 * t * (1 - t) * bend + t**2 * last


class Curve(nn.Module):
    """A network whose weights lie on a Bezier curve; the end points are fixed, the bend is trained.

    The bend starts half way between the ends, so the curve starts as the straight line.
    """

    def __init__(self, first: nn.Module, last: nn.Module):
        super().__init__()
        self.ends = tuple({name: p.detach().clone() for name, p in end.named_parameters()} for end in (first, last))
        self.bend = copy.deepcopy(first)
        with torch.no_grad():
            for name, parameter in self.bend.named_parameters():
                parameter.copy_((self.ends[0][name] + self.ends[1][name]) / 2)
        self.t = 0.5

    def weights(self, t: float) -> Weights:
        """The parameters at t in [0, 1]."""
        first, last = self.ends
        return {name: bezier(first[name], p, last[name], t) for name, p in self.bend.named_parameters()}

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `(n, K)` of the network at the current t."""
        return call(self.bend, x, lengths, self.weights(self.t))


class Connect(Objective):
    """Cross entropy at a random t in [0, 1] for every batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """The draw follows from the seed of the epoch."""
        assert isinstance(model, Curve)
        model.t = float(torch.rand(()))
        values = F.cross_entropy(forward(model, batch).float(), batch.y, reduction="none")
        return Step(values.mean(), {"main": values.detach()})

    def after_epoch(self, model: nn.Module, epoch: int, records: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean training loss along the curve."""
        return {"main_loss": float(torch.nanmean(records["main"]))}


@torch.no_grad()
def renew_statistics(model: nn.Module, data: Data, job: Job, size: int = 256) -> None:
    """Have batch norms take the statistics of these samples: those of other weights do not fit a point on a curve.

    Each batch counts the same, so they are of equal size, and in random order, since one of a single class varies less.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with job.fabric.autocast():
        order = generator(job.seed, "statistics", "order")
        for batch in shuffled(data, torch.arange(len(data)), size, order, job.fabric.device):
            forward(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@DEFENSES.register("mcr", paper="Zhao et al. 2020, Bridging Mode Connectivity in Loss Landscapes (ICLR)")
@options
class MCR(Defense):
    """Mode Connectivity Repair: train a curve between two models on clean samples and take a model from its middle.

    An undefended model is one end; the other is a copy fine-tuned on the clean samples, or a second undefended model of
    another initialization (`second`). On the quadratic Bezier curve between them only the bend is trained, on the clean
    samples. Clean accuracy is low in loss all along; the backdoor, which no clean sample asks for, fades in the middle.

    Batch statistics are taken anew at the point. Deviations: the paper picks t by looking at the attack; here it is the
    middle, since accuracy on the clean samples, which the curve was trained on, tells nothing; small sets get a floor
    of steps.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"clean"})
    profiles: ClassVar[dict[str, dict[str, Any]]] = {"two_models": {"second": "trained"}}

    training: Annotated[Recipe, Field(description="training of the undefended model")] = Recipe()
    second: Annotated[Literal["fine_tuned", "trained"], Field(description="what the other end is")] = "fine_tuned"
    fine_tuning: Annotated[Repair, Field(description="of the other end, on the clean samples")] = Repair(
        epochs=100, learning_rate=0.01
    )
    curve: Annotated[Repair, Field(description="training of the bend, on the clean samples")] = Repair(
        epochs=100, learning_rate=0.01, weight_decay=1e-4
    )
    t: Annotated[float, Field(ge=0, le=1, description="the point to take, from the undefended model on")] = 0.5

    def run(self, job: Job) -> Outcome:
        """Train both ends, train the curve, take a point."""
        if self.second == "trained" and job.architecture is None:
            raise InputError(
                "a second model of another initialization is built by name; name one in place of a module."
            )
        clean, first = job.clean, trained(job, self.training)
        before = snapshot(first)
        if self.second == "trained":
            last = job.model("second model")
            job.fit("second training", last, CrossEntropy(), job.recipe(self.training))
        else:
            last = copy.deepcopy(first)
            job.fit("other end", last, CrossEntropy(), self.fine_tuning, data=clean)
        curve = Curve(first, last)
        job.fit("curve", curve, Connect(), self.curve, data=clean)
        model = curve.bend
        point = {name: weight.detach().clone() for name, weight in curve.weights(self.t).items()}
        model.load_state_dict(point, strict=False)
        renew_statistics(model, clean, job)
        return without_suspects(model, len(job.data), {"t": self.t}, before)
