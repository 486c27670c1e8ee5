"""E2ABL's split of the samples and the classes it gives back to some of them, worked by hand on scripted heads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from antibackdoor.data.core import Data
from antibackdoor.defenses import dual_head, trap
from antibackdoor.defenses.company import Company, second_logits
from antibackdoor.defenses.dual_head import Dual
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.defenses.suspects import suspects_of
from antibackdoor.defenses.trap import Trap
from antibackdoor.models.tap import Tap
from antibackdoor.seeds import generator
from antibackdoor.training.groups import FIRM
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.ranking import LossDrop, Persistence, top
from antibackdoor.verdict import decide
from tiny import FABRIC
from toy import toy_images

GIVEN = toy_images(20).y  # 0 1 2 3 0 1 2 3 ...
BACKDOOR = 1
PAPER: dict[str, Any] = {
    "remainder": "trap",
    "predominance": 0.0,
    "recovery_delay": 0,
    "recover_only_backdoor_label": False,
}


class Heads:
    """`Dual` on 20 samples, of which the ranking finds 1, 5, 9, 13, 2, 17 most suspicious; the heads say what is asked.

    8 are isolated, 4 recovered. The second head answers the backdoor class on the top four. The main head answers the
    backdoor class where nothing else is said, with the class after the given one as its second choice.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: list[int], main: dict[int, int], **options: object):
        method = E2ABL(isolation_rate=0.4, recovery_rate=0.2, recovery_floor=1, **options)
        job = Job(toy_images(20), model="resnet18-w4", fabric=FABRIC)
        self.company: Company | None = None
        self.scores = torch.zeros(20)
        self.scores[first] = torch.arange(20, 20 - len(first), -1).float()
        ranking = SimpleNamespace(scores=self.scores.clone)
        self.dual = Dual(method, job, cast(Trap, SimpleNamespace(ranking=ranking, company=lambda tap: self.company)))
        self.main, self.asked_for = main, list[int]()
        monkeypatch.setattr(dual_head, "logits_of", self.logits)
        self.tap = cast(Tap, SimpleNamespace(backbone="main", parameter_counts=lambda: {"ratio": 1.25}))

    def logits(
        self, model: object, data: Data, fabric: object, rows: Tensor | None = None, call: object = None
    ) -> Tensor:
        rows = torch.arange(20) if rows is None else rows
        out = torch.zeros(len(rows), 4)
        for place, row in enumerate(rows.tolist()):
            if call is second_logits:
                out[place, BACKDOOR if row != 2 else 3] = 1
            else:
                out[place, self.main.get(row, BACKDOOR)] = 2
                out[place, (int(GIVEN[row]) + 1) % 4] += 1
        self.asked_for += [] if call is second_logits else rows.tolist()
        return out

    def split(self, epoch: int = 1) -> tuple[set[int], set[int], Tensor]:
        self.dual.partition(self.tap, epoch)
        part = self.dual.partitions[-1]
        return rows_of(part.isolated), rows_of(part.recovered), part.labels


def rows_of(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


TOP = [1, 5, 9, 13, 2, 17, 6, 10]  # the last three: labels 1, 2, 2


def test_as_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The top of the ranking is isolated, its first part gets the main head's best class but the backdoor's."""
    heads = Heads(monkeypatch, TOP, {5: 3}, **PAPER)
    isolated, recovered, labels = heads.split()
    assert heads.dual.backdoor_class == BACKDOOR
    assert isolated == set(TOP) and recovered == {1, 5, 9, 13}
    assert {row: int(labels[row]) for row in recovered} == {1: 2, 5: 3, 9: 2, 13: 2}  # 1, 9, 13: its second choice
    others = [row for row in range(20) if row not in recovered]
    assert torch.equal(labels[others], GIVEN[others])
    assert rows_of(heads.dual.in_main) == set(range(20)) - {2, 17, 6, 10}
    assert rows_of(heads.dual.isolated) == isolated and (heads.dual.sign == 1).all()


def test_labels_are_recovered_only_once_the_main_head_has_learned_something(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(monkeypatch, TOP, {5: 3}, **{**PAPER, "recovery_delay": 0.5})
    _, recovered, labels = heads.split(0)
    assert recovered == {1, 5, 9, 13} and torch.equal(labels, GIVEN) and heads.asked_for == []
    assert rows_of(heads.dual.in_main) == set(range(20)) - set(TOP)
    half = heads.dual.job.recipe(heads.dual.options.main).epochs_for(20) // 2
    assert torch.equal(heads.split(half - 1)[2], GIVEN) and heads.asked_for == []
    assert int(heads.split(half)[2][5]) == 3
    assert rows_of(heads.dual.in_main) == set(range(20)) - {2, 17, 6, 10}


@pytest.mark.parametrize(("share", "recovered"), [(0.75, {1, 5, 9, 13}), (0.76, set())])
def test_nothing_is_recovered_where_the_backdoor_class_does_not_predominate(
    monkeypatch: pytest.MonkeyPatch, share: float, recovered: set[int]
) -> None:
    first = [1, 5, 9, 2, 13, 17, 6, 10]  # three of the first four are labeled 1
    heads = Heads(monkeypatch, first, {}, **{**PAPER, "predominance": share})
    expected = {1, 5, 9, 2} if recovered else set()
    assert heads.split()[1] == expected


def test_only_samples_labeled_with_the_backdoor_class(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [1, 5, 2, 9, 13, 17, 6, 10]
    heads = Heads(monkeypatch, first, {}, **{**PAPER, "recover_only_backdoor_label": True})
    isolated, recovered, _ = heads.split()
    assert recovered == {1, 5, 9} and isolated == set(first)


@pytest.mark.parametrize(
    ("remainder", "isolated", "recovered"),
    [
        ("trap", set(TOP), {1, 5, 9, 13}),
        ("recover", set(TOP), set(TOP)),
        ("return", {1, 5, 9, 13, 17}, {1, 5, 9, 13}),
    ],
)
def test_what_becomes_of_the_rest(
    monkeypatch: pytest.MonkeyPatch, remainder: str, isolated: set[int], recovered: set[int]
) -> None:
    heads = Heads(monkeypatch, TOP, {}, **{**PAPER, "remainder": remainder})
    assert heads.split()[:2] == (isolated, recovered)


def test_the_rest_of_the_class_comes_back_if_the_main_head_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 1 is 1, 5, 9, 13, 17; isolated are 1, 5 and, on probation (3 of 5 in all), 9."""
    first = [1, 5, 2, 6, 10, 14, 18, 3, 9]
    heads = Heads(monkeypatch, first, {5: 0}, remainder="agree", probation=0.6, recovery_delay=0.5, predominance=0.0)
    assert heads.split(0)[:2] == ({1, 5, 9}, {1, 5})
    last = heads.dual.job.recipe(heads.dual.options.main).epochs_for(20)
    isolated, recovered, labels = heads.split(last)
    assert isolated == {1, 5}, "9 is back, since the main head answers its label"
    assert recovered == {5} and (int(labels[1]), int(labels[5])) == (1, 0), "1 stays with the second head alone"
    assert heads.dual.rest == [0, 2], "13 and 17 were not isolated, and it agrees with both"
    heads.main = {9: 2, 13: 2}
    assert heads.split(last)[0] == {1, 5}, "it is asked once: later it only repeats what it was taught"


def test_a_sample_on_probation_that_is_taken_for_another_class_learns_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [1, 5, 2, 6, 10, 14, 18, 3, 9]
    options = {"remainder": "agree", "probation": 0.6, "recovery_delay": 0, "predominance": 0.0}
    heads = Heads(monkeypatch, first, {9: 0, 13: 3}, **options)
    isolated, recovered, labels = heads.split()
    assert isolated == {1, 5, 9} and recovered == {9} and int(labels[9]) == 0
    assert heads.dual.rest == [1, 2], "13 was not isolated, and is taken for class 3"
    assert heads.dual.asked is not None
    assert heads.dual.asked.tolist() == [{1: BACKDOOR, 5: BACKDOOR, 9: 0}.get(row, -1) for row in range(20)]


class Told(Company):
    """Denies the second and the third sample that it is asked about, whatever the main head says of them."""

    def denied(self, rows: Tensor, doubts: Tensor, taught: Tensor) -> Tensor:
        assert rows.tolist() == [1, 5, 9, 13, 17] and doubts.shape == (5,)
        assert taught.tolist() == [False, False, False, False, True], "all others are on probation"
        return torch.tensor([False, True, True, False, False])

    @property
    def strangeness(self) -> Tensor:
        return self.suspicion


def told(group: set[int]) -> Told:
    """Company in which these rows are odd; the class of 1 and 13 falls into two, and of it 1 is the oddest."""
    odd = torch.isin(torch.arange(20), torch.tensor([*group], dtype=torch.int64)).double()
    suspicion = torch.zeros(20).double()
    suspicion[[1, 13, 2, 5, 9]] = torch.tensor([0.9, 0.8, 0.75, 0.7, 0.6]).double()
    clear = [[2 * FIRM * any(row % 4 == label for row in group), 0.0] for label in range(4)]
    clear[BACKDOOR] = [clear[BACKDOOR][0], 0.1]
    return Told(GIVEN, torch.zeros(20, 1).long(), 1, [0.8] * 4, torch.stack([odd, odd]), suspicion, clear)


def test_with_company_a_sample_is_what_its_company_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 13 are the odd group of the class; 5 and 9, beside them on probation (4 of 5), are in denied company."""
    first = [1, 13, 2, 5, 9, 6, 10, 14, 18]  # of the first four, too few are of the class to be recovered unasked
    options = {"probation": 0.8, "recovery_delay": 0.5, "predominance": 0.9}
    heads = Heads(monkeypatch, first, {17: 3, 9: 2}, **options)
    heads.company = told({1, 13, 2})  # 2 is of another class
    assert heads.split(0)[:2] == ({1, 13, 5, 9}, set()), "17 shows the main head what the class looks like"
    last = heads.dual.job.recipe(heads.dual.options.main).epochs_for(20)
    isolated, recovered, labels = heads.split(last)
    assert isolated == {1, 13, 5, 9}, "the odd group does not come back, whoever agrees"
    assert recovered == {5, 9} and int(labels[5]) == int(labels[9]) == 2
    assert heads.dual.rest == [0, 1], "17 is in good company"
    heads = Heads(monkeypatch, first, {}, **options)
    heads.company = told(set())
    heads.split(0)
    assert heads.split(last)[:2] == ({5, 9}, {5, 9}), "where no group is odd, 1 and 13 come back"


@pytest.mark.parametrize(("few", "in_order"), [(20, [1, 13, 2, 5, 9]), (5, [1, 13, 5, 9, 17])])
def test_with_company_the_class_that_falls_into_two_comes_first_if_it_is_large(
    monkeypatch: pytest.MonkeyPatch, few: int, in_order: list[int]
) -> None:
    monkeypatch.setattr(dual_head, "FEW", few)
    heads = Heads(monkeypatch, [], {})
    heads.company = told({1, 13})
    heads.split(0)
    assert top(heads.dual.scores, 5).tolist() == in_order


def test_the_outcome_tells_what_the_main_head_said_when_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolated samples of class 1 are 1, 5 and 9, in this order of suspicion; only 9 is taken for another class."""
    first = [1, 5, 2, 6, 10, 14, 18, 3, 9]
    options = {"remainder": "agree", "probation": 0.6, "recovery_delay": 0, "predominance": 0.0}
    heads = Heads(monkeypatch, first, {9: 0, 13: 3}, **options)
    heads.split()
    found = heads.dual.outcome(heads.tap)
    assert rows_of(found.flagged) == {9} and rows_of(found.suggested >= 0) == {9} and found.suggested[9] == 0
    assert rows_of(found.probability > 0) == {1, 5, 9}
    assert found.evidence == {
        "backdoor_class": BACKDOOR,
        "disagree_in_suspicious_half": {"count": 0, "n": 1},
        "disagree_in_other_half": {"count": 1, "n": 2},
        "flagged": 1,
        "disagree_in_rest_of_class": {"count": 1, "n": 2},
        "parameters": {"ratio": 1.25},
    }
    assert torch.equal(found.scores, heads.scores) and found.partitions == heads.dual.partitions
    assert found.witness == (heads.tap, second_logits)


def test_nobody_is_suspect_before_the_main_head_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(monkeypatch, TOP, {}, **{**PAPER, "recovery_delay": 0.5})
    heads.split(0)
    found = heads.dual.outcome(heads.tap)
    assert not found.flagged.any() and not found.probability.any() and (found.suggested == -1).all()
    parts = ("suspicious_half", "other_half", "rest_of_class")
    assert [found.evidence[f"disagree_in_{part}"] for part in parts] == [{"count": 0, "n": 0}] * 3


def test_without_a_warm_up_nothing_is_known_before_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(monkeypatch, TOP, {}, **PAPER, warm_up=None)
    assert heads.split(0)[:2] == (set(), set()) and heads.asked_for == []
    found = heads.dual.outcome(heads.tap)
    assert found.evidence["backdoor_class"] == -1 and not found.flagged.any()
    assert decide(heads.dual.job.data, found).evidence == ["No class was singled out, so nothing was judged."]
    assert heads.split(1)[0] == set(TOP)


def test_unlearning_turns_the_sign_of_what_would_have_been_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(monkeypatch, TOP, {}, **PAPER, control="unlearn")
    assert torch.equal(heads.split()[2], GIVEN)
    assert rows_of(heads.dual.sign < 0) == {1, 5, 9, 13} and set(heads.dual.sign.tolist()) == {1.0, -1.0}
    assert rows_of(heads.dual.in_main) == set(range(20)) - {2, 17, 6, 10}


def test_counts_of_small_sets() -> None:
    """At least one is isolated; the floor of the recovered never exceeds the isolated."""
    job = Job(toy_images(20), model="resnet18-w4", fabric=FABRIC)
    trap = cast(Trap, SimpleNamespace(ranking=LossDrop(20, "square")))
    tiny = Dual(E2ABL(isolation_rate=0.001, recovery_floor=8), job, trap)
    assert (tiny.isolated_count, tiny.recovered_count) == (1, 1)
    floor = Dual(E2ABL(isolation_rate=0.5, recovery_rate=0.01, recovery_floor=3), job, trap)
    assert (floor.isolated_count, floor.recovered_count) == (10, 3)
    rate = Dual(E2ABL(isolation_rate=0.5, recovery_rate=0.2, recovery_floor=3), job, trap)
    assert rate.recovered_count == 4


def test_who_is_suspect_and_how_often_the_main_head_disagreed() -> None:
    """Candidates are 1, 5, 9, 13 in this order of suspicion; it took 1, 5 and 9 for others, and went back on 9."""
    asked = torch.full((20,), -1)
    asked[[1, 5, 9, 13]] = torch.tensor([2, 0, 3, 1])
    scores = torch.zeros(20)
    scores[[1, 5, 9, 13]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    logits = torch.nn.functional.one_hot(GIVEN, 4).float() * 3
    logits[1], logits[5] = torch.tensor([0.0, 0, 3, 0]), torch.tensor([3.0, 0, 0, 0])
    found = suspects_of(torch.nn.Identity(), toy_images(20), scores, logits, asked, 1, [])
    assert rows_of(found.flagged) == {1, 5}
    assert {row: int(found.suggested[row]) for row in range(20) if found.suggested[row] >= 0} == {1: 2, 5: 0}
    assert found.evidence["disagree_in_suspicious_half"] == {"count": 2, "n": 2}
    assert found.evidence["disagree_in_other_half"] == {"count": 1, "n": 2}
    assert found.evidence["backdoor_class"] == 1 and found.evidence["flagged"] == 2
    sure = torch.tensor([0.0, 3, 0, 0]).softmax(0)
    assert found.probability[13] == pytest.approx(1 - float(sure[1])) and found.probability[0] == 0
    assert found.probability[1] == pytest.approx(1 - float(sure[0]))
    assert set(found.reasons) == {1, 5} and "'class 1'" in found.reasons[1]


def test_samples_of_the_first_class_may_be_suspect_too() -> None:
    asked = torch.full((20,), -1)
    asked[[0, 4]] = torch.tensor([2, 0])
    logits = torch.nn.functional.one_hot(torch.where(torch.arange(20) == 0, 2, GIVEN), 4).float()
    found = suspects_of(torch.nn.Identity(), toy_images(20), torch.arange(20.0), logits, asked, 0, [])
    assert rows_of(found.flagged) == {0} and found.suggested.tolist() == [2] + [-1] * 19
    assert "'class 0'" in found.reasons[0]
    assert found.evidence["disagree_in_suspicious_half"] == {"count": 0, "n": 1}  # row 4, which has the higher score
    assert found.evidence["disagree_in_other_half"] == {"count": 1, "n": 1}


@pytest.mark.parametrize(
    ("options", "skip"),
    [
        ({"window": 0.5, "mixing": False}, 4),
        ({"window": 0.25}, 12),
        ({"window": 0.0}, 15),
        ({"loss_history": "init"}, 0),
        ({"loss_history": "init", "window": 0.5}, 9),
        ({"loss_history": "running", "window": 0.5}, 4),
    ],
)
def test_how_much_of_the_history_counts(options: dict[str, Any], skip: int) -> None:
    """Eight epochs, one look after each and, with "init", before the first; two with mixing; the last always counts."""
    warm_up = Recipe(epochs=8, min_steps=0, batch_size=64)
    ranking = Trap(E2ABL(warm_up=warm_up, **options), Job(toy_images(20), fabric=FABRIC)).ranking
    assert isinstance(ranking, Persistence) and ranking.skip == skip


@pytest.mark.parametrize("options", [{"ranking": "loss_drop"}, {"warm_up": None}])
def test_without_a_warm_up_or_where_asked_for_the_loss_drop_ranks(options: dict[str, Any]) -> None:
    ranking = Trap(E2ABL(drop_weights="linear", **options), Job(toy_images(20), fabric=FABRIC)).ranking
    assert isinstance(ranking, LossDrop) and ranking.power == 1


AS_IT_IS, MIXED = math.log(4), math.log(2)
"""Losses of the second head where its logits are those of `Looks`."""


class Looks:
    """A warm-up of one epoch: at the first look all four classes are as likely; mixed, the given label has one half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any):
        warm_up = Recipe(epochs=1, min_steps=0, batch_size=64)
        job = Job(toy_images(20), fabric=FABRIC, seed=7)
        self.trap, self.drawn = Trap(E2ABL(warm_up=warm_up, **options), job), list[Tensor]()
        self.calls = list[object]()
        monkeypatch.setattr(trap, "logits_of", self.plain)
        monkeypatch.setattr(trap, "mixed_logits_of", self.mixed)

    def plain(self, tap: object, data: Data, fabric: object, call: object) -> Tensor:
        self.calls.append(call)
        return torch.zeros(20, 4)

    def mixed(self, tap: object, data: Data, fabric: object, rng: torch.Generator, call: object) -> Tensor:
        self.calls.append(call)
        self.drawn.append(torch.rand(3, generator=rng))
        return torch.nn.functional.one_hot(GIVEN, 4) * math.log(3)

    def look(self, epoch: int = 0) -> list[float]:
        self.trap.look(cast(Any, None), epoch)
        return cast(list[float], self.trap.ranking.scores().tolist())


def test_a_look_takes_the_losses_as_they_are_and_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    want = -(math.log(AS_IT_IS + 0.01) + math.log(MIXED + 0.01)) / 2
    assert looks.look(3) == pytest.approx([want] * 20)
    assert looks.calls == [second_logits] * 2
    assert torch.equal(looks.drawn[0], torch.rand(3, generator=generator(7, "mixing", 3))), "other partners each epoch"


def test_a_look_without_mixing_takes_them_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, mixing=False)
    assert looks.look() == pytest.approx([-math.log(AS_IT_IS + 0.01)] * 20) and looks.drawn == []


def test_equation_5_is_given_one_history_of_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, ranking="loss_drop", drop_weights="uniform", mixing=True)
    assert looks.look() == looks.look() == [0.0] * 20 and looks.drawn == []


@pytest.mark.parametrize(("history", "looked"), [("running", []), ("after", [5]), ("init", [5])])
def test_what_the_warm_up_records_after_an_epoch(
    monkeypatch: pytest.MonkeyPatch, history: str, looked: list[int]
) -> None:
    trap = Trap(
        E2ABL(loss_history=history, ranking="loss_drop", drop_weights="uniform"), Job(toy_images(3), fabric=FABRIC)
    )
    epochs = list[int]()
    monkeypatch.setattr(trap, "look", lambda tap, epoch: epochs.append(epoch))
    first = trap.after_epoch(torch.nn.Identity(), 5, {"second": torch.tensor([4.0, 2.0, torch.nan])})
    assert first == {"second_loss": 3.0} and epochs == looked
    trap.after_epoch(torch.nn.Identity(), 6, {"second": torch.tensor([1.0, 2.5, torch.nan])})
    assert trap.ranking.scores().tolist() == ([3.0, -0.5, 0.0] if history == "running" else [0.0] * 3)


def test_the_warm_up_goes_on_from_its_state() -> None:
    one, two = (Trap(E2ABL(mixing=False), Job(toy_images(3), fabric=FABRIC)) for _ in range(2))
    one.ranking.add(torch.tensor([1.0, 2.0, 3.0]))
    two.load(one.state())
    assert torch.equal(two.ranking.scores(), one.ranking.scores()) and one.ranking.scores().any()


def test_after_an_epoch_samples_are_ranked_and_split_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(monkeypatch, TOP, {}, **PAPER, refresh="epoch")
    added = list[Tensor]()
    monkeypatch.setattr(heads.dual.trap.ranking, "add", added.append, raising=False)
    monkeypatch.setattr(dual_head, "Tap", SimpleNamespace)
    heads.split()
    heads.scores[[1, 3]] = torch.tensor([0.0, 30.0])  # 3 takes the place of 1
    records = {"main": torch.tensor([1.0, 3.0, torch.nan]), "second": torch.arange(20.0)}
    told = heads.dual.after_epoch(cast(Any, heads.tap), 2, records)
    assert added == [records["second"]] and len(heads.dual.partitions) == 2
    assert rows_of(heads.dual.partitions[-1].isolated) == {3, *TOP} - {1}
    ranked = [part.scores for part in heads.dual.partitions]  # each partition keeps the ranking it was made from
    assert [int(scores.argmax()) for scores in ranked if scores is not None] == [1, 3]
    assert told == {"main_loss": 2.0, "second_loss": float(records["second"][TOP].mean()), "churn": 0.1}
    heads.scores[[1, 3]] = torch.tensor([30.0, 0.0])  # and 1 that of 3 again
    churn = [heads.dual.after_epoch(cast(Any, heads.tap), epoch, records)["churn"] for epoch in (3, 4)]
    assert churn == [0.1, 0.0], "each epoch is compared with the one before"
