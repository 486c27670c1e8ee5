"""The judge: the only place where the truth meets the outcome. Measures as defined once, with their counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data, Truth
from antibackdoor.defenses.base import Outcome, Partition
from antibackdoor.defenses.company import second_logits
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Watch
from antibackdoor.training.objectives import forward
from antibackdoor.training.ranking import top
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import Verdict

Measure = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What only an experiment knows; read by the judge alone.

    truth: which training samples are poisoned. triggered: test samples with the trigger, under their true labels and
    the ids of the test set. targets: `(m,)` int64, the class that each of these is led to.
    """

    truth: Truth
    triggered: Data
    targets: Tensor


def share(hits: Tensor) -> Measure:
    """A share with its counts; its value is None where there is nothing to count, never 0/0."""
    n, count = len(hits), int(hits.sum())
    return {"value": count / n, "count": count, "n": n} if n else {"value": None, "count": 0, "n": 0}


def accuracy(predicted: Tensor, test: Data) -> dict[str, Any]:
    """Clean accuracy on a whole test set and for each class that occurs in it."""
    y = test.y.cpu()
    hits = predicted == y
    classes = {test.spec.classes[k]: share(hits[y == k]) for k in y.unique().tolist()}
    return {"clean_accuracy": share(hits), "clean_accuracy_by_class": classes}


def attack_measures(model: nn.Module, test: Data, triggered: Data, targets: Tensor, fabric: Fabric) -> dict[str, Any]:
    """Clean accuracy, attack success rate, excess ASR and recovery accuracy from one pass over each of the two sets.

    triggered: test samples whose true class is not their target, with the trigger, under the ids they have in `test`.
    targets: `(m,)`, the class that each of them is led to. Excess ASR subtracts the share of the same samples WITHOUT
    the trigger that the model takes for their target: what a weak but clean model confuses is not the backdoor's.
    """
    clean_predictions = logits_of(model, test, fabric).argmax(1)
    predictions = logits_of(model, triggered, fabric).argmax(1)
    place = {name: row for row, name in enumerate(test.ids)}
    without = clean_predictions[torch.tensor([place[name] for name in triggered.ids], dtype=torch.int64)]
    hits = predictions == targets
    success, confusion = share(hits), share(without == targets)
    led_to = targets.unique()
    nontarget = ~torch.isin(test.y.cpu(), led_to)
    by_target = {test.spec.classes[k]: share(hits[targets == k]) for k in led_to.tolist()}
    return {
        **accuracy(clean_predictions, test),
        "clean_accuracy_nontarget": share((clean_predictions == test.y.cpu())[nontarget]),
        "attack_success_rate": success,
        **({"attack_success_rate_by_target": by_target} if len(led_to) > 1 else {}),
        "target_confusion_without_trigger": confusion,
        "excess_attack_success_rate": {"value": success["value"] - confusion["value"], "n": success["n"]},
        "recovery_accuracy": share(predictions == triggered.y.cpu()),
    }


def partition_measures(partition: Partition, scores: Tensor, truth: Truth) -> dict[str, Any]:
    """One row of the paper's Table II: how clean D_c is, how much of the poison D_p holds, what recovery recovered.

    scores: of the outcome; they count where the partition has none of its own.
    """
    scores = scores if partition.scores is None else partition.scores
    clean_side = ~partition.isolated
    recovered = partition.recovered & truth.poisoned
    return {
        "epoch": partition.epoch,
        "precision_clean_set": share(~truth.poisoned[clean_side]),
        "precision_top_1_percent": share(truth.poisoned[top(scores, max(1, round(0.01 * len(scores))))]),
        "recall_isolated_set": share(partition.isolated[truth.poisoned]),
        "poison_among_recovered": share(truth.poisoned[partition.recovered]),
        "true_labels_recovered": share((partition.labels == truth.labels)[recovered]),
        "labels_moved_off_target": share((partition.labels != truth.targets)[recovered]),
    }


def detection_measures(outcome: Outcome, truth: Truth) -> dict[str, Any]:
    """How well scores, flags and suggestions find the poison (cover samples count as clean: their labels are true)."""
    poison, scores, flagged = truth.poisoned, outcome.scores, outcome.flagged
    measures: dict[str, Any] = {
        "flagged_precision": share(poison[flagged]),
        "flagged_recall": share(flagged[poison]),
        "precision_top_1_percent": share(poison[top(scores, max(1, round(0.01 * len(scores))))]),
        "suggested_labels_true": share((outcome.suggested == truth.labels)[flagged & poison]),
    }
    if poison.any() and not poison.all():
        from sklearn.metrics import average_precision_score, roc_auc_score  # takes a second to load

        measures["auroc"] = {"value": float(roc_auc_score(poison.numpy(), scores.numpy())), "n": len(scores)}
        measures["average_precision"] = {
            "value": float(average_precision_score(poison.numpy(), scores.numpy())),
            "n": len(scores),
        }
    measures["flagged_of_clean"] = share(flagged[~poison])
    return measures


def verdict_measures(verdict: Verdict, truth: Truth, classes: Sequence[str]) -> dict[str, Any]:
    """How a verdict stands against the truth.

    poisoned: 1 if it says so. right: 1 if it names exactly the classes that poisoned samples lead to, none on clean
    data. margin: of a calibrated confidence. rate_ratio: the estimated poison rate over the true one.
    """
    targets = {classes[k] for k in truth.targets[truth.poisoned].unique().tolist()}
    measures: dict[str, Any] = {
        "poisoned": {"value": float(verdict.poisoned), "n": 1},
        "right": {"value": float(set(verdict.target_classes) == targets), "n": 1},
        "confidence": {"value": verdict.confidence, "n": 1},
        "estimated_rate": {"value": verdict.estimated_rate, "n": len(truth.poisoned)},
    }
    if verdict.margin is not None:
        measures["margin"] = {"value": verdict.margin, "n": 1}
    if truth.poisoned.any():
        rate = float(truth.poisoned.double().mean())
        measures["rate_ratio"] = {"value": verdict.estimated_rate / rate, "n": len(truth.poisoned)}
    return measures


def trace_of(train: Data, test: Data, experiment: Experiment | None, fabric: Fabric) -> Watch:
    """What a traced cell adds to every row of its history, for each head: "main_" and, of a `Tap`, "second_".

    `clean_accuracy` and `attack_success_rate` on the test sets; `train_accuracy_clean` and `train_accuracy_poisoned`,
    the share of the training samples that is answered as labeled. Costs about as much as an epoch of plain training.
    """

    def measure(call: Callable[[nn.Module, Batch], Tensor], model: nn.Module) -> dict[str, Any]:
        def predicted(data: Data) -> Tensor:
            return logits_of(model, data, fabric, call=call).argmax(1)

        right = predicted(train) == train.y.cpu()
        measures = {"clean_accuracy": share(predicted(test) == test.y.cpu())}
        if experiment is None:
            measures["train_accuracy_clean"] = share(right)
        else:
            poisoned = experiment.truth.poisoned
            measures["attack_success_rate"] = share(predicted(experiment.triggered) == experiment.targets)
            measures["train_accuracy_clean"] = share(right[~poisoned])
            measures["train_accuracy_poisoned"] = share(right[poisoned])
        return {name: measure["value"] for name, measure in measures.items()}

    def watch(stage: str, model: nn.Module) -> dict[str, Any]:
        heads: dict[str, Callable[[nn.Module, Batch], Tensor]] = {"main": forward}
        if isinstance(model, Tap):
            heads = {"main": lambda tap, batch: forward(_backbone(tap), batch), "second": second_logits}
        return {f"{head}_{name}": value for head, call in heads.items() for name, value in measure(call, model).items()}

    return watch


def _backbone(tap: nn.Module) -> nn.Module:
    assert isinstance(tap, Tap)
    return tap.backbone


def selection_measures(selected: Tensor, labels: Tensor, truth: Truth) -> dict[str, Any]:
    """How poisoned a set of samples is that a defense relied on, and how many of its labels, as given, are true."""
    return {
        "poisoned": share(truth.poisoned[selected]),
        "labels_true": share((labels == truth.labels)[selected]),
    }


def stage_measures(outcome: Outcome, test: Data, experiment: Experiment | None, fabric: Fabric) -> dict[str, Any]:
    """Clean accuracy and, under attack, its success after each stage of the defense."""
    model = copy.deepcopy(outcome.model)
    measures: dict[str, Any] = {}
    for name, weights in outcome.stages.items():
        model.load_state_dict(weights)
        if experiment is None:
            all_of_them = accuracy(logits_of(model, test, fabric).argmax(1), test)
        else:
            all_of_them = attack_measures(model, test, experiment.triggered, experiment.targets, fabric)
        measures[name] = {key: value for key, value in all_of_them.items() if "_by_" not in key}
    return measures
