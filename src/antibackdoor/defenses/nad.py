"""NAD: a fine-tuned copy teaches the backdoored model where to look."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from antibackdoor.data.batches import Batch, gather
from antibackdoor.defenses.base import DEFENSES, Defense, Outcome, snapshot
from antibackdoor.defenses.none import trained, without_suspects
from antibackdoor.models.blocks import feature_map, stages
from antibackdoor.options import options
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe, Repair
from antibackdoor.training.objectives import CrossEntropy, Step, forward


def attention(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a block looks: `mean_c |F_c|^power` at every position, as a vector of length 1; (n, C, ...) -> (n, P)."""
    return F.normalize(features.float().abs().pow(power).mean(1).flatten(1), dim=1)


def with_attention(model: nn.Module, batch: Batch, blocks: Sequence[str], power: float) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the attention of each block, from one forward pass."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> None:
        def keep(module: nn.Module, args: object, output: object) -> None:
            found = feature_map(output)
            assert found is not None  # `stages` saw a feature map
            seen[name] = attention(found, power)

        handles.append(model.get_submodule(name).register_forward_hook(keep))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name in blocks:
            hook(name)
        logits = forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [seen[name] for name in blocks]


class Distill(CrossEntropy):
    """`CE + sum_l beta_l * mean((A_l(student) - A_l(teacher))^2)`; records each sample's cross entropy as "main"."""

    compiles: ClassVar[bool] = False  # attention maps are looked at in the middle

    def __init__(self, teacher: nn.Module, blocks: Sequence[str], betas: Sequence[float], power: float):
        self.teacher, self.blocks, self.betas, self.power = teacher, blocks, betas, power

    def __call__(self, model: nn.Module, batch: Batch) -> Step:
        """The teacher is in evaluation mode and learns nothing."""
        with torch.no_grad():
            _, wanted = with_attention(self.teacher.eval(), batch, self.blocks, self.power)
        logits, own = with_attention(model, batch, self.blocks, self.power)
        values = F.cross_entropy(logits.float(), batch.y, reduction="none")
        distance = [F.mse_loss(a, b) for a, b in zip(own, wanted, strict=True)]
        return Step(
            values.mean() + sum(beta * d for beta, d in zip(self.betas, distance, strict=True)),
            {"main": values.detach()},
        )


@DEFENSES.register("nad", paper="Li et al. 2021, Neural Attention Distillation: Erasing Backdoor Triggers from DNNs")
@options
class NAD(Defense):
    """Neural Attention Distillation: a copy fine-tuned on clean samples teaches the backdoored model where to look.

    An undefended model is trained first. The teacher is a copy of it fine-tuned on the clean samples; the student is
    the model itself, trained on the clean samples to classify them and to have the teacher's attention maps at the
    last three stages (`layer2` to `layer4` of a ResNet; for series, maps over time).

    Deviations: the code's learning rates (0.1 for two epochs of twenty, then 0.01) are a cosine of the same mean here;
    its random hole of 3 pixels is left out of the augmentation; small sets get a floor of steps. The E2ABL paper's
    comparison ran 10 epochs. Fine-tuning alone (betas of 0) is known to do much of the work where the victim was
    trained without augmentation, so it is a fair question to a row of this method.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"clean"})

    training: Annotated[Recipe, Field(description="training of the undefended model")] = Recipe()
    teacher: Annotated[Repair, Field(description="fine-tuning of the teacher on the clean samples")] = Repair(
        epochs=10, min_steps=200, batch_size=64, learning_rate=0.04, weight_decay=1e-4
    )
    distillation: Annotated[Repair, Field(description="training of the student on the clean samples")] = Repair(
        epochs=20, min_steps=400, batch_size=64, learning_rate=0.04, weight_decay=1e-4
    )
    betas: Annotated[
        tuple[float, ...], Field(min_length=1, description="weights of the attention losses, from shallow to deep")
    ] = (500.0, 1000.0, 1000.0)
    power: Annotated[float, Field(gt=0, description="exponent of the activations in an attention map")] = 2.0

    def run(self, job: Job) -> Outcome:
        """Train, fine-tune a teacher, distill."""
        clean, student = job.clean, trained(job, self.training)
        before = snapshot(student)
        teacher = copy.deepcopy(student)
        job.fit("teacher", teacher, CrossEntropy(), self.teacher, data=clean)
        example = gather(job.data, torch.arange(2), job.fabric.device)
        blocks = stages(student, example.x, example.lengths)[-len(self.betas) :]
        lesson = Distill(teacher, blocks, self.betas[-len(blocks) :], self.power)
        job.fit("distillation", student, lesson, self.distillation, data=clean)
        return without_suspects(student, len(job.data), {"blocks": blocks}, before)
