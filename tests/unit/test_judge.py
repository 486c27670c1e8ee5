from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from antibackdoor.bench.judge import (
    Experiment,
    accuracy,
    attack_measures,
    detection_measures,
    partition_measures,
    share,
    stage_measures,
    trace_of,
    verdict_measures,
)
from antibackdoor.data.core import Data, Spec, Truth
from antibackdoor.defenses import Outcome, Partition
from antibackdoor.defenses.company import second_logits
from antibackdoor.models.tap import Tap
from antibackdoor.training.job import Job
from antibackdoor.training.scores import logits_of
from antibackdoor.verdict import Verdict
from tiny import FABRIC
from toy import toy_images

SPEC = Spec("series", (1, 2), ("a", "b", "c"), -9, 9)


class Reader(nn.Module):
    """Answers the class that the first step of a series names, or one so many further."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("further", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x[:, 0, 0].long() + self.further) % 3, 3).float()


def saying(answers: list[int], y: list[int], ids: str) -> Data:
    """A set on which `Reader` gives these answers."""
    x = torch.zeros(len(y), 1, 2)
    x[:, 0, 0] = torch.tensor(answers).float()
    return Data(x, torch.tensor(y), SPEC, list(ids))


TEST = saying([0, 0, 1, 0, 1, 2], [0, 0, 1, 1, 1, 2], "abcdef")  # 'd' is confused with the target 0
TRIGGERED = saying([0, 0, 1, 2], [1, 1, 1, 2], "cdef")
ZEROS = torch.zeros(4, dtype=torch.int64)


def test_attack_measures_by_hand() -> None:
    got = attack_measures(Reader(), TEST, TRIGGERED, ZEROS, FABRIC)
    assert got["clean_accuracy"] == {"value": 5 / 6, "count": 5, "n": 6}
    assert got["clean_accuracy_by_class"]["b"] == {"value": 2 / 3, "count": 2, "n": 3}
    assert got["clean_accuracy_nontarget"] == {"value": 3 / 4, "count": 3, "n": 4}
    assert got["attack_success_rate"] == {"value": 2 / 4, "count": 2, "n": 4}
    assert got["target_confusion_without_trigger"] == {"value": 1 / 4, "count": 1, "n": 4}
    assert got["excess_attack_success_rate"] == {"value": 1 / 4, "n": 4}
    assert got["recovery_accuracy"] == {"value": 2 / 4, "count": 2, "n": 4}  # not ASR again: 'e' and 'f'
    assert "attack_success_rate_by_target" not in got, "with one target it would be the same again"


def test_samples_are_matched_by_id_not_by_place() -> None:
    subset = torch.tensor([3, 1])  # 'f' and 'd': only 'd' is confused without the trigger
    got = attack_measures(Reader(), TEST, TRIGGERED.take(subset), ZEROS[:2], FABRIC)
    assert got["target_confusion_without_trigger"] == {"value": 1 / 2, "count": 1, "n": 2}
    shuffled = attack_measures(Reader(), TEST, TRIGGERED.take(torch.tensor([2, 0, 3, 1])), ZEROS, FABRIC)
    assert shuffled == attack_measures(Reader(), TEST, TRIGGERED, ZEROS, FABRIC)


def test_every_sample_is_judged_by_its_own_target() -> None:
    got = attack_measures(Reader(), TEST, TRIGGERED, torch.tensor([0, 2, 2, 1]), FABRIC)
    assert got["attack_success_rate"] == {"value": 1 / 4, "count": 1, "n": 4}
    assert got["attack_success_rate_by_target"]["a"] == {"value": 1.0, "count": 1, "n": 1}
    assert got["attack_success_rate_by_target"]["c"] == {"value": 0.0, "count": 0, "n": 2}
    assert got["clean_accuracy_nontarget"] == {"value": None, "count": 0, "n": 0}  # every class is a target
    json.dumps(got, allow_nan=False)
    two = attack_measures(Reader(), TEST, TRIGGERED, torch.tensor([0, 0, 2, 2]), FABRIC)
    assert two["attack_success_rate_by_target"] == {
        "a": {"value": 1.0, "count": 2, "n": 2},
        "c": {"value": 0.5, "count": 1, "n": 2},
    }


def test_a_triggered_sample_that_is_not_in_the_test_set_is_an_error() -> None:
    with pytest.raises(KeyError):
        attack_measures(Reader(), TEST, replace(TRIGGERED, ids=list("cdex")), ZEROS, FABRIC)


def test_share() -> None:
    assert share(torch.tensor([True, False, True, True])) == {"value": 0.75, "count": 3, "n": 4}
    nothing = share(torch.zeros(0, dtype=torch.bool))
    assert nothing == {"value": None, "count": 0, "n": 0}
    json.dumps(nothing, allow_nan=False)


def test_accuracy_leaves_out_classes_without_samples() -> None:
    test = saying([0, 0], [0, 1], "ab")
    assert list(accuracy(torch.tensor([0, 0]), test)["clean_accuracy_by_class"]) == ["a", "b"]


POISONED = torch.tensor([True, True, False, False, False])
TRUTH = Truth(
    POISONED,
    torch.tensor([False, False, True, False, False]),
    torch.tensor([1, 2, 1, 0, 0]),
    torch.zeros(5, dtype=torch.int64),
)


def outcome(flagged: list[bool], scores: list[float] | None = None) -> Outcome:
    suggested = torch.tensor([1, 1, 2, 2, 2]).masked_fill(~torch.tensor(flagged), -1)
    ranked = torch.tensor(scores or [5.0, 2.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    return Outcome(nn.Identity(), ranked, torch.zeros(5), torch.tensor(flagged), suggested)


def test_detection_measures_by_hand() -> None:
    got = detection_measures(outcome([True, True, True, False, False]), TRUTH)
    assert got["flagged_precision"] == {"value": 2 / 3, "count": 2, "n": 3}  # the cover sample counts as clean
    assert got["flagged_recall"] == {"value": 1.0, "count": 2, "n": 2}
    assert got["flagged_of_clean"] == {"value": 1 / 3, "count": 1, "n": 3}
    assert got["suggested_labels_true"] == {"value": 1 / 2, "count": 1, "n": 2}
    assert got["precision_top_1_percent"] == {"value": 1.0, "count": 1, "n": 1}
    assert got["auroc"]["value"] == pytest.approx(5 / 6)  # of 6 pairs one is out of order
    assert got["average_precision"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    first = detection_measures(outcome([True, False, False, False, False]), TRUTH)
    assert first["suggested_labels_true"] == {"value": 1.0, "count": 1, "n": 1}


def test_a_verdict_is_right_if_it_names_the_classes_that_poison_leads_to_and_no_other() -> None:
    right = verdict_measures(Verdict(True, 0.8, ["a"], 0.6), TRUTH, "abc")
    assert right["poisoned"]["value"] == right["right"]["value"] == 1 and right["confidence"]["value"] == 0.8
    assert right["rate_ratio"] == {"value": pytest.approx(0.6 / 0.4), "n": 5}
    for wrong in (["b"], ["a", "b"], []):
        assert verdict_measures(Verdict(bool(wrong), 0.5, wrong), TRUTH, "abc")["right"]["value"] == 0
    nothing = Truth(POISONED & False, POISONED & False, TRUTH.labels, torch.full((5,), -1))
    calm, alarmed = (verdict_measures(Verdict(bool(named), 0.5, named), nothing, "abc") for named in ([], ["a"]))
    assert (calm["poisoned"]["value"], calm["right"]["value"]) == (0, 1) and "rate_ratio" not in calm
    assert (alarmed["poisoned"]["value"], alarmed["right"]["value"]) == (1, 0)


def test_of_the_most_suspicious_percent_the_poisoned_share() -> None:
    """Of 300 samples the three with the highest scores, of which the first and the third are poisoned."""
    scores = torch.arange(300, 0, -1).double()
    no, poisoned = torch.zeros(300, dtype=torch.bool), torch.zeros(300, dtype=torch.bool)
    poisoned[[0, 2, 3, 299]] = True
    labels = torch.zeros(300, dtype=torch.int64)
    truth = Truth(poisoned, no, labels, labels)
    found = Outcome(nn.Identity(), scores, torch.zeros(300), no, labels - 1)
    want = {"value": 2 / 3, "count": 2, "n": 3}
    assert detection_measures(found, truth)["precision_top_1_percent"] == want
    assert partition_measures(Partition(0, no, no, labels), scores, truth)["precision_top_1_percent"] == want


def test_nothing_flagged_can_be_written_as_json() -> None:
    got = detection_measures(outcome([False] * 5), TRUTH)
    assert got["flagged_precision"]["value"] is None and got["flagged_recall"]["value"] == 0
    json.dumps(got, allow_nan=False)


def test_clean_data_have_no_auroc() -> None:
    clean = replace(TRUTH, poisoned=torch.zeros(5, dtype=torch.bool))
    assert "auroc" not in detection_measures(outcome([True] * 5), clean)
    all_of_them = detection_measures(outcome([True] * 5), replace(TRUTH, poisoned=~clean.poisoned))
    assert "auroc" not in all_of_them and all_of_them["flagged_of_clean"] == {"value": None, "count": 0, "n": 0}


def test_partition_measures_by_hand() -> None:
    partition = Partition(
        3,
        isolated=torch.tensor([True, False, True, False, False]),
        recovered=torch.tensor([True, False, False, False, False]),
        labels=torch.tensor([1, 0, 0, 0, 0]),
    )
    got = partition_measures(partition, torch.arange(5.0), TRUTH)
    assert got["epoch"] == 3
    assert got["precision_clean_set"] == {"value": 2 / 3, "count": 2, "n": 3}
    assert got["recall_isolated_set"] == {"value": 1 / 2, "count": 1, "n": 2}
    assert got["true_labels_recovered"] == {"value": 1.0, "count": 1, "n": 1}
    assert got["labels_moved_off_target"] == {"value": 1.0, "count": 1, "n": 1}
    assert got["poison_among_recovered"] == {"value": 1.0, "count": 1, "n": 1}
    assert got["precision_top_1_percent"] == {"value": 0.0, "count": 0, "n": 1}  # one at least, here the last
    own = partition_measures(replace(partition, scores=-torch.arange(5.0)), torch.arange(5.0), TRUTH)
    assert own["precision_top_1_percent"] == {"value": 1.0, "count": 1, "n": 1}  # by its own ranking, here the first


def test_what_a_trace_tells_by_hand() -> None:
    train = saying([0, 0, 1, 2], [0, 1, 1, 1], "pqrs")
    clean = trace_of(train, TEST, None, FABRIC)("main", Reader())
    assert clean == {"main_clean_accuracy": pytest.approx(5 / 6), "main_train_accuracy_clean": 0.5}
    truth = Truth(torch.tensor([True, True, False, False]), ZEROS.bool(), train.y, ZEROS)
    told = trace_of(train, TEST, Experiment(truth, TRIGGERED, torch.tensor([0, 1, 0, 0])), FABRIC)("main", Reader())
    assert told == {
        "main_clean_accuracy": pytest.approx(5 / 6),
        "main_attack_success_rate": 0.25,
        "main_train_accuracy_clean": 0.5,
        "main_train_accuracy_poisoned": 0.5,
    }


def test_a_trace_tells_of_both_heads() -> None:
    """Main head: all for class 1, of which there are 2 of 8; second head: all for class 3, of which there are 2."""
    data = toy_images(8)
    data.y[:] = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    model = Job(data, model="resnet18-w4", fabric=FABRIC).model()
    tap = Tap(model, None, 4, data.spec.decode(data.x[torch.arange(2)]))
    with torch.no_grad():
        model.fc.bias[1] = 1e4
    told = trace_of(data, data.take(torch.arange(3, 8)), None, FABRIC)("main", tap)
    assert (told["main_clean_accuracy"], told["main_train_accuracy_clean"]) == (2 / 5, 2 / 8)
    second = logits_of(tap, data, FABRIC, call=second_logits).argmax(1) == data.y
    assert told["second_train_accuracy_clean"] == float(second.double().mean())
    assert told["second_clean_accuracy"] == pytest.approx(float(second[3:].double().mean()))


def test_every_stage_is_measured_with_its_own_weights() -> None:
    """After the second stage the model answers one class further: of the six test samples it has one right."""
    model = Reader()
    stages = {"first": model.state_dict(), "second": {"further": torch.tensor(1)}}
    found = Outcome(model, torch.zeros(1), torch.zeros(1), torch.zeros(1).bool(), torch.zeros(1), stages=stages)
    clean = stage_measures(found, TEST, None, FABRIC)
    assert clean == {
        "first": {"clean_accuracy": {"value": 5 / 6, "count": 5, "n": 6}},
        "second": {"clean_accuracy": {"value": 1 / 6, "count": 1, "n": 6}},  # 'd'
    }
    attacked = stage_measures(found, TEST, Experiment(TRUTH, TRIGGERED, torch.tensor([0, 0, 2, 2])), FABRIC)
    assert {name: told["attack_success_rate"]["count"] for name, told in attacked.items()} == {"first": 3, "second": 1}
    assert {name: told["clean_accuracy"]["count"] for name, told in attacked.items()} == {"first": 5, "second": 1}
    assert not any("_by_" in name for told in attacked.values() for name in told), "too long for a row of a table"
    assert model.further == 0, "the model that is handed over stays as it is"
