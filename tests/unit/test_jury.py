"""The hearing of `jury`: who learns as what, which class counts as attacked, and what the verdict says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import FABRIC
from tests.toy import toy_images
from torch import Tensor, nn

from antibackdoor.data.batches import gather
from antibackdoor.defenses import hearing, judgement, jury
from antibackdoor.defenses.company import CERTAIN, Company
from antibackdoor.defenses.deposition import PLAIN, Deposition
from antibackdoor.defenses.disarming import plainly_more
from antibackdoor.defenses.hearing import Hearing
from antibackdoor.defenses.judgement import OUT
from antibackdoor.defenses.jury import Jury
from antibackdoor.evidence import told_of, told_of_hold
from antibackdoor.files import load_state, save_state
from antibackdoor.intervals import lower, upper
from antibackdoor.models.tap import Tap
from antibackdoor.training.groups import FIRM
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Recipe
from antibackdoor.training.ranking import geometric, top, within
from antibackdoor.verdict import decide


def test_within_is_the_percentile_among_the_same_label() -> None:
    scores, labels = torch.tensor([5.0, 1.0, 3.0, 9.0, 8.0]), torch.tensor([0, 0, 0, 0, 1])
    assert within(scores, labels).tolist() == pytest.approx([0.625, 0.125, 0.375, 0.875, 0.5])
    equal = within(torch.zeros(1000), torch.zeros(1000)).tolist()
    assert equal == pytest.approx([(row + 0.5) / 1000 for row in range(1000)]), "ties follow the row number"


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        (1, 5, {1}),
        (12, 3, {12}),
        (48, 3, {12, 24, 48}),
        (48, 2, {12, 48}),
        (1200, 3, {12, 120, 1200}),
        (100, 1, {12, 100}),
    ],
)
def test_looks_are_a_factor_apart_and_the_last_step_is_one(steps: int, count: int, expected: set[int]) -> None:
    assert geometric(steps, count) == expected


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (10, 10), (50, 100)])
def test_the_interval_holds_the_share(count: int, n: int) -> None:
    assert 0 <= lower(count, n) <= count / n <= upper(count, n) <= 1 + 1e-12
    assert lower(10 * count, 10 * n) >= lower(count, n) - 1e-12  # more samples, more certainty


def test_nothing_to_count_tells_nothing() -> None:
    assert (lower(0, 0), upper(0, 0)) == (0.0, 1.0)


def test_wilson_against_values_worked_by_hand() -> None:
    """5 of 10 at z = 1.64: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)."""
    assert (lower(5, 10), upper(5, 10)) == (pytest.approx(0.26981, abs=1e-5), pytest.approx(0.73019, abs=1e-5))
    assert (lower(0, 10), upper(0, 10)) == (pytest.approx(0, abs=1e-12), pytest.approx(0.21195, abs=1e-5))


NEAR = torch.stack([torch.arange(40)[torch.arange(40) % 4 == row % 4] for row in range(40)])
"""Every sample is asked about all ten of its class."""


GIVEN = toy_images(40).y


def deposed(suspicion: Tensor, ease: Tensor, apart: Tensor, clear: float = 9.0) -> Deposition:
    """A deposition; nobody asks the witness itself. Bond divides a class with samples apart, this clearly."""
    divided = [[0.0, clear * bool(apart[label == GIVEN].any()), 0.0] for label in range(4)]
    nobody = torch.zeros_like(apart)
    groups = torch.stack([nobody, apart, nobody])
    return Deposition(cast(Tap, None), suspicion, ease, NEAR, groups, torch.full((40,), -1), divided)


class Court:
    """A hearing on 40 toy images, ten of each class; the last five of each class are the most suspicious."""

    def __init__(self, apart: Sequence[int] = (), clear: float = 9.0, **given: Any):
        self.data = toy_images(40)
        self.given = self.data.y
        self.place = torch.stack([(self.given[:i] == self.given[i]).sum() for i in range(40)])
        self.options = Jury(**{"trusted": 0.5, "excluded": 0.2, **given})
        self.job = Job(self.data, model="resnet18-w4", fabric=FABRIC)
        self.ease, self.apart = self.place.double(), torch.isin(torch.arange(40), torch.tensor(apart))
        suspicion = torch.where(self.apart, 1.0, (self.place + 0.5) / 10)
        deposition = deposed(suspicion, self.ease, self.apart, clear)
        self.hearing = Hearing(self.options, self.job, self.job.model(), deposition)
        self.judgement = self.hearing.judgement

    def elsewhere(self, mask: Tensor) -> Tensor:
        """The given labels, but for those in the mask other classes in turn."""
        return torch.where(mask, (self.given + 1 + torch.arange(40) % 3) % 4, self.given)

    def hear(self, answers: Tensor, confidence: float = 0.99, epoch: int = 1, second: int | None = 2) -> None:
        """What the model is made to say of every sample; what is left goes to the class `second`, or to all others."""
        said = torch.full((40, 4), (1 - confidence) / 3, dtype=torch.float64)
        if second is not None:
            said[:] = (1 - confidence) * (torch.arange(4) == second)
        said[torch.arange(40), answers] = confidence
        self.hearing._assign(epoch, self.judgement.hear(said, epoch))


def test_only_the_least_suspicious_of_each_class_learn_at_first() -> None:
    court = Court()
    assert torch.equal(court.hearing.labels != OUT, court.place < 5)
    assert torch.equal(court.hearing.labels[court.place < 5], court.given[court.place < 5])


def test_samples_without_a_label_give_their_places_to_others() -> None:
    court = Court()
    plain = gather(court.data, (court.place >= 4).nonzero().flatten(), torch.device("cpu"))
    batch = court.hearing.prepare(plain, lambda batch, rng: batch, torch.Generator().manual_seed(0))
    assert len(batch.rows) == len(plain.rows) and (court.place[batch.rows] < 5).all()
    assert torch.equal(batch.y, court.given[batch.rows])


def strong_views(court: Court) -> bool:
    """Whether the training changes the samples more than its recipe says, which here is not at all."""
    plain = gather(court.data, (court.place < 5).nonzero().flatten(), torch.device("cpu"))
    batch = court.hearing.prepare(plain, lambda batch, rng: batch, torch.Generator().manual_seed(0))
    return not torch.equal(batch.x, plain.x)


def test_views_are_strong_until_all_classes_are_acquitted() -> None:
    court = Court()
    assert strong_views(court)
    court.hear(court.given)
    assert not strong_views(court)


def test_views_stay_strong_where_poison_may_have_leaked() -> None:
    court = Court()
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 6)))
    assert court.judgement.findings[1]["attacked"] and strong_views(court)


def test_views_are_strong_no_longer_than_to_the_hearing_where_all_poison_is_apart() -> None:
    court = Court(apart=[25, 29, 33, 37])
    assert strong_views(court)
    court.hear(court.given)
    assert court.judgement.findings[1]["attacked"] and not strong_views(court)
    other = Court(apart=[25, 29, 33, 37])
    other.hear(other.elsewhere((other.given == 2) & (other.place >= 6)))
    assert [f["attacked"] for f in other.judgement.findings] == [False, True, True, False] and strong_views(other)


def taught(court: Court, rows: Tensor) -> Tensor:
    """How black is what is learned in place of these rows, if the found samples are and all others white."""
    disarming = court.hearing.disarming
    data = replace(court.data, x=torch.full_like(court.data.x, 255))
    data.x[disarming.found.rows] = 0
    court.job.data = data
    plain = gather(data, rows, torch.device("cpu"))
    batch = court.hearing.prepare(plain, lambda batch, rng: batch, torch.Generator().manual_seed(0))
    assert torch.equal(batch.y, court.hearing.labels[batch.rows]), "they keep their label"
    return 1 - batch.x


def test_what_was_found_goes_with_every_label_in_a_share_of_what_is_learned() -> None:
    court = Court(apart=[25, 29, 33, 37], disarmed=0.5)
    rows = torch.arange(24).repeat(40)
    assert not len(court.hearing.disarming.found.rows), "before the hearing whoever was set apart may still be freed"
    court.hear(court.given)
    assert court.hearing.disarming.found.rows.tolist() == [25, 29, 33, 37]
    assert not taught(court, rows).any(), "it has not led the model anywhere"
    court.hearing.disarming.hold["holds"] = True
    black = taught(court, rows).flatten(1)
    assert torch.equal(black.amin(1), black.amax(1)), "the same part of the whole sample"
    part = black[:, 0]
    carrying = part > 0
    assert 0.4 < float(carrying.double().mean()) < 0.6
    assert set(court.given[rows[carrying]].tolist()) == {0, 1, 2, 3}
    assert 0.3 <= float(part[carrying].min()) < 0.32 and 0.68 < float(part[carrying].max()) <= 0.7


def test_those_who_learn_another_label_were_found_too() -> None:
    court = Court()
    others = (court.given == 1) & (court.place >= 6)
    court.hear(court.elsewhere(others))
    assert torch.equal(court.hearing.labels[others], court.elsewhere(others)[others])
    not_given_back = (court.given == 1) & (court.hearing.labels != 1)
    assert torch.equal(court.hearing.disarming.found.rows, not_given_back.nonzero().flatten())
    assert not_given_back[others].all()


class Blackness(nn.Module):
    """Answers class 1 where half of a sample is black, and otherwise `other`."""

    def __init__(self, other: int):
        super().__init__()
        self.other = other

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        said = torch.where(x.mean((1, 2, 3)) < 0.75, 1, self.other)
        return F.one_hot(said, 4).float()


@pytest.mark.parametrize(
    ("share", "black", "other", "holds"),
    [(0.5, True, 0, True), (0.5, False, 0, False), (0.5, False, 1, False), (0.0, True, 0, False)],
)
def test_what_was_found_has_a_hold_if_it_leads_more_to_its_class_than_others_do(
    share: float, black: bool, other: int, holds: bool
) -> None:
    court = Court(apart=[25, 29, 33, 37], disarmed=share)
    court.hear(court.given)
    court.job.data = replace(court.data, x=torch.full_like(court.data.x, 255))
    if black:
        court.job.data.x[court.hearing.disarming.found.rows] = 0
    learned = (court.hearing.labels == court.given).nonzero().flatten()
    court.hearing.disarming.ask(Blackness(other), learned, 1)
    assert court.hearing.disarming.holds is holds
    if holds:
        assert court.hearing.disarming.hold.items() >= {"led": 30, "asked": 30, "holds": True}.items()


@pytest.mark.parametrize(
    ("found", "others", "more"),
    [
        ((209, 1836), (174, 1982), False),  # surely more, and no more than classes differ anyway
        ((106, 700), (61, 736), True),
        ((30, 100), (20, 100), False),  # half again as many, but of few
        ((5, 5), (0, 0), False),
        ((0, 0), (0, 5), False),
    ],
)
def test_a_hold_is_plainly_more_than_what_others_do(
    found: tuple[int, int], others: tuple[int, int], more: bool
) -> None:
    assert plainly_more(found, others) is more


def test_what_goes_together_was_found_in_one_class() -> None:
    disarming = Court(disarmed=0.5).hearing.disarming
    found = torch.zeros(40, dtype=torch.bool)
    found[[0, 4, 8, 13, 2, 6, 10, 14, 18, 22, 26]] = True  # three of class 0, one of class 1, seven of class 2
    disarming.find(found)
    drawn = disarming.found.draw(4000, torch.Generator().manual_seed(0))
    of_class = GIVEN[drawn]
    assert drawn.shape == (4000, 3) and found[drawn].all()
    assert torch.equal(of_class.amin(1), of_class.amax(1))
    share = torch.bincount(of_class[:, 0], minlength=4) / 4000
    assert share.tolist() == pytest.approx([3 / 11, 1 / 11, 7 / 11, 0], abs=0.03), "as often as they were found"
    assert set(drawn.flatten().tolist()) == set(found.nonzero().flatten().tolist())


def test_a_hold_once_seen_is_remembered() -> None:
    court = Court(apart=[25, 29, 33, 37], disarmed=0.5)
    court.hear(court.given)
    court.hearing.disarming.hold["holds"] = True
    court.hearing.disarming.ask(Blackness(0), court.given.nonzero().flatten(), 1)
    assert court.hearing.disarming.holds and court.hearing.state()["hold"]["holds"]
    other = Court(apart=[25, 29, 33, 37], disarmed=0.5)
    other.hearing.load(court.hearing.state())
    assert other.hearing.disarming.holds
    assert torch.equal(other.hearing.disarming.found.rows, court.hearing.disarming.found.rows)


def test_an_attacked_class_learns_what_the_model_sees_and_the_others_get_their_labels_back() -> None:
    court = Court()
    planted = (court.given == 1) & (court.place >= 6)
    answers = court.elsewhere(planted)
    court.hear(answers)
    found = court.judgement.findings
    assert [f["attacked"] for f in found] == [False, True, False, False]
    assert (found[1]["count"], found[1]["n"]) == (4, 5) and found[1]["early"] > 0.5
    assert torch.equal(court.hearing.labels[planted], answers[planted]) and not (answers[planted] == 1).any()
    assert torch.equal(court.hearing.labels[~planted], court.given[~planted])


def test_agreement_does_not_bring_back_the_most_suspicious_of_an_attacked_class() -> None:
    court = Court()
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5) & (court.place < 8)))
    kept_out = (court.given == 1) & (court.place >= 8)
    assert (court.hearing.labels[kept_out] == OUT).all()
    assert not (court.hearing.labels[~kept_out] == OUT).any()


def test_samples_set_apart_convict_their_class_and_never_learn_as_labeled() -> None:
    rows = (Court().given == 1).nonzero().flatten().tolist()
    court = Court(apart=rows[:2])
    assert (court.hearing.labels[court.apart] == OUT).all(), "though they are the least suspicious"
    court.hear(court.given)
    assert [f["attacked"] for f in court.judgement.findings] == [False, True, False, False]
    assert (court.hearing.labels[court.apart] == OUT).all()
    outcome = court.hearing.outcome(court.job.model())
    assert outcome.flagged[court.apart].all() and decide(court.data, outcome).target_classes == ["class 1"]
    assert all("set apart" in outcome.reasons[row] for row in rows[:2] if outcome.suggested[row] < 0)


@pytest.mark.parametrize(
    ("clear", "own", "attacked"), [(PLAIN, 1.0, True), (1.4, 0.49, True), (1.4, 0.51, False), (1.0, 0.9, False)]
)
def test_those_set_apart_none_too_clearly_are_freed_if_the_model_agrees_with_their_label(
    clear: float, own: float, attacked: bool
) -> None:
    """Clear: times the limit of `bond`. The others of the class would learn with them, were it not attacked."""
    rows = (GIVEN == 1).nonzero().flatten().tolist()
    court = Court(apart=rows[:2], clear=clear * Jury().bond)
    answers = torch.where(court.apart & (own < 0.5), 2, court.given)
    court.hear(answers, confidence=own if own > 0.5 else 1 - own, second=1)
    found = court.judgement.findings[1]
    assert (found["attacked"], found["apart"]) == (attacked, 2 * attacked)
    assert found["agreed"] == {"bond": pytest.approx(own)} and found["bond"] == pytest.approx(clear * Jury().bond)
    assert torch.equal(court.hearing.labels == OUT, court.apart & attacked)
    outcome = court.hearing.outcome(court.job.model())
    assert bool(outcome.flagged[court.apart].all()) == bool(outcome.flagged.any()) == attacked
    verdict = decide(court.data, outcome)
    assert verdict.poisoned == attacked and (not verdict.judged or verdict.confidence >= 0.5)
    court.hear(torch.where(court.apart, 3, court.given), epoch=2)
    assert found["attacked"] == court.judgement.findings[1]["attacked"], "they are asked once"


def test_each_witness_answers_for_the_group_it_set_apart() -> None:
    """Ease sets two apart that the model knows, bond two others that it denies; the third, plainly, one of both."""
    for plain in (False, True):
        court = Court(apart=[1, 5], clear=1.4 * Jury().bond)
        court.judgement.findings[1]["ease"] = 1.4 * Jury().ease
        court.judgement.groups[0, [9, 13]] = True
        if plain:
            court.judgement.findings[1]["division"] = PLAIN * Jury().division
            court.judgement.groups[2, [1, 9]] = True
        court.hear(torch.where(court.apart, 2, court.given))
        found = court.judgement.findings[1]
        assert court.judgement.apart.nonzero().flatten().tolist() == ([1, 5, 9] if plain else [1, 5])
        assert found["attacked"] and found["apart"] == 2 + plain
        assert found["agreed"]["ease"] > 0.9 and found["agreed"]["bond"] < 0.1


def test_a_resumed_hearing_knows_who_was_freed(tmp_path: Path) -> None:
    court, other = (Court(apart=[1, 5], clear=1.4 * Jury().bond) for _ in range(2))
    court.hear(court.given)
    save_state(tmp_path / "state", court.hearing.state())
    other.hearing.load(load_state(tmp_path / "state"))
    assert not other.judgement.apart.any() and other.judgement.findings == court.judgement.findings
    for each in (court, other):
        each.hear(each.elsewhere(each.apart), epoch=2)
    assert torch.equal(court.hearing.labels, other.hearing.labels)


def test_of_a_class_divided_beyond_doubt_just_those_apart_never_learn() -> None:
    court = Court(apart=[25])  # labeled 1, as are 29, 33 and 37, which are more suspicious by themselves
    court.hear(court.given)
    assert (court.hearing.labels == OUT).nonzero().flatten().tolist() == [25]


def test_samples_learned_late_accuse_nobody() -> None:
    court = Court()
    court.judgement.early = 1 - court.judgement.early
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5)))
    assert not any(f["attacked"] for f in court.judgement.findings)
    assert torch.equal(court.hearing.labels, court.given)
    neither = Court()
    neither.judgement.early[:] = 0.5  # neither in the easier half of the whole set nor in the other
    neither.hear(neither.elsewhere((neither.given == 1) & (neither.place >= 5)))
    assert neither.judgement.findings[1]["early"] == 0.5 and not neither.judgement.findings[1]["attacked"]


@pytest.mark.parametrize(("few", "attacked"), [(10, True), (11, False)])
def test_what_was_learned_late_and_stays_to_the_end_is_poison(
    few: int, attacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judgement, "FEW", few)  # the class has ten
    court = Court()
    court.judgement.early = 1 - court.judgement.early
    answers = court.elsewhere((court.given == 1) & (court.place >= 5))
    court.hear(answers, epoch=court.judgement.last - 1)
    assert not court.judgement.findings[1]["attacked"] and not court.judgement.findings[1]["stayed"]
    court.hear(answers, epoch=court.judgement.last)
    found = court.judgement.findings[1]
    assert found["attacked"] == found["stayed"] == attacked and found["early"] < 0.5
    verdict = decide(court.data, court.hearing.outcome(court.job.model()))
    assert verdict.target_classes == (["class 1"] if attacked else [])


@pytest.mark.parametrize(("second", "attacked"), [(0, True), (None, False)])
def test_what_stays_but_is_taken_for_what_its_class_is_taken_for_is_of_its_class(
    second: int | None, attacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for 2 and 3 they are a third off the mix, so that `kin` may be 0.75; the rest is for 0, or for all."""
    monkeypatch.setattr(judgement, "FEW", 10)
    court = Court()
    court.judgement.early[:] = 0.1
    answers = torch.where((court.given == 1) & (court.place >= 5), 2 + court.place % 2, court.given)
    court.hear(answers, epoch=court.judgement.last, second=second)
    found = court.judgement.findings[1]
    assert found["stayed"] and found["below"] == pytest.approx(0.75) and found["attacked"] == attacked
    assert found["kin"] == pytest.approx(1 / 3 if attacked else 1, abs=0.02)
    outcome = court.hearing.outcome(court.job.model())
    assert decide(court.data, outcome).poisoned == attacked
    assert "much nearer to that mix" in told_of("x", found, outcome.evidence["limits"])[-1] or attacked


def test_few_that_stay_are_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgement, "FEW", 10)
    court = Court(acquittal=0.5)
    court.judgement.early = 1 - court.judgement.early
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 6)), epoch=court.judgement.last)
    assert not court.judgement.findings[1]["stayed"] and not court.judgement.findings[1]["attacked"]


@pytest.mark.parametrize(("confidence", "few", "left"), [(0.7, 10, True), (0.55, 10, False), (0.99, 11, False)])
def test_of_a_class_not_attacked_the_most_suspicious_learn_no_label_that_the_model_denies(
    confidence: float, few: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of 0.7 leaves 0.1 for each other class, and half of chance is 0.125; one of 0.55 leaves 0.15."""
    monkeypatch.setattr(judgement, "FEW", few)
    court = Court(acquittal=1.0)
    denied = (court.given == 1) & (court.place >= 6)  # the most suspicious fifth are 8 and 9
    court.hear(court.elsewhere(denied), confidence, second=None)
    assert not any(f["attacked"] for f in court.judgement.findings)
    out = (court.hearing.labels == OUT).nonzero().flatten().tolist()
    assert out == ((denied & (court.place >= 8)).nonzero().flatten().tolist() if left else [])
    court.hear(court.given, confidence)
    assert torch.equal(court.hearing.labels, court.given), "the model has learned better"


class Neighborhood(Court):
    """40 samples of which the last four of class 1, place 6 to 9, lie together, apart from the others of the class."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: int = 6, certain: float = math.inf, **given: float):
        monkeypatch.setattr(judgement, "FEW", 4)
        monkeypatch.setattr(judgement, "CERTAIN", certain)
        super().__init__(trusted=0.35, acquittal=1.0, **given)
        self.group = (self.given == 1) & (self.place >= together)
        near = torch.full((40, 10), -1)
        for row in range(40):
            mates = (self.given == self.given[row]) & (self.group == self.group[row])
            near[row, : int(mates.sum())] = mates.nonzero().flatten()
        self.judgement.deposition = replace(self.judgement.deposition, near=near)


def test_a_group_that_is_denied_together_convicts_with_those_the_model_agrees_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It denies three of the group of four and agrees with the fourth; the company gives that one away."""
    court = Neighborhood(monkeypatch)
    answers = court.elsewhere(court.group & (court.place < 9))
    court.hear(answers)
    found = court.judgement.findings[1]
    assert [f["attacked"] for f in court.judgement.findings] == [False, True, False, False]
    assert (found["together"], found["early"]) == (4, float(court.judgement.early[court.group].median()))
    assert torch.equal(court.judgement.denied, court.group)
    labels = court.hearing.labels
    assert torch.equal(labels[court.group & (court.place < 9)], answers[court.group & (court.place < 9)])
    assert (labels[court.group & (court.place == 9)] == OUT).all(), "it never gets its label back"
    court.hear(court.given)
    assert (court.hearing.labels[court.group] == OUT).all() and court.judgement.findings[1]["together"] == 4
    assert torch.equal(court.hearing.labels[~court.group], court.given[~court.group])


def test_a_trusted_sample_in_denied_company_is_trusted_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    court = Neighborhood(monkeypatch)
    leaked = court.group & (court.place == 6)
    suspicion = torch.where(leaked, 0.01, court.judgement.deposition.suspicion)
    court.judgement.deposition = replace(court.judgement.deposition, suspicion=suspicion)
    court.judgement.choose()
    assert court.judgement.trusted[leaked].all()
    court.hear(court.elsewhere(court.group & ~leaked))
    assert not court.judgement.trusted[leaked].any() and (court.hearing.labels[leaked] == OUT).all()


def test_a_group_of_more_than_may_be_poison_is_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    for together, attacked in ((4, True), (3, False)):  # six of ten, and seven
        court = Neighborhood(monkeypatch, together)
        court.hear(court.elsewhere(court.group))
        assert court.judgement.findings[1]["attacked"] == attacked and bool(court.judgement.denied.any()) == attacked


def test_a_group_that_is_alike_or_hardly_denied_is_odd_but_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = Neighborhood(monkeypatch)
    alike.hear(torch.where(alike.group, 2, alike.given))
    unsure = Neighborhood(monkeypatch)
    unsure.hear(unsure.given, confidence=0.9)
    for court in (alike, unsure):
        assert not any(f["attacked"] or f["together"] for f in court.judgement.findings)
        assert not court.judgement.denied.any()


@pytest.mark.parametrize(("confidence", "few", "attacked"), [(1.0, 4, True), (1.0, 5, False), (0.6, 4, False)])
def test_a_group_that_is_alike_and_denied_for_certain_is_poison_of_one_class(
    confidence: float, few: int, attacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    court = Neighborhood(monkeypatch, certain=CERTAIN)
    monkeypatch.setattr(judgement, "FEW", few)
    court.hear(torch.where(court.group, 2, court.given), confidence=confidence)
    found = court.judgement.findings[1]
    assert (found["attacked"], found["certain"], bool(found["together"])) == (attacked,) * 3
    if attacked:
        assert not court.judgement.foreign[1], "their labels may be true"
        assert (court.hearing.labels[court.group] == OUT).all()
        outcome = court.hearing.outcome(court.job.model())
        agreed = outcome.suggested[court.group] == -1
        assert torch.equal(outcome.flagged[court.group], ~agreed), "the suspects are those it still takes for others"


@pytest.mark.parametrize(
    ("early", "rare", "few", "attacked"),
    [
        (0.2, 0.2, 4, True),
        (0.2, 0.05, 4, False),
        (0.2, 0.5, 5, False),
        (0.21, 0.2, 4, True),
        (0.21, 0.2, 5, False),
        (0.5, 0.5, 5, False),
        (0.51, 0.5, 5, True),
        (0.51, 0.2, 5, False),
        (0.51, 0.2, 4, True),
    ],
)
def test_a_group_is_early_or_nearer_to_all_others_and_a_small_one_both(
    early: float, rare: float, few: int, attacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `kin` of the four is more than 0.2 and less than 0.5, and they are a sixth off the mix, a third of 0.5.

    So the last to be learned are odd up to a `kin` of three times `RARE`, others up to 0.67.
    """
    court = Neighborhood(monkeypatch)
    monkeypatch.setattr(judgement, "RARE", rare)
    monkeypatch.setattr(judgement, "FEW", few)
    court.judgement.early[court.group] = early
    court.hear(court.elsewhere(court.group), second=2)
    assert bool(court.judgement.findings[1]["together"]) == attacked


@pytest.mark.parametrize("little", [True, False])
def test_a_little_of_a_class_is_left_out_without_a_verdict(little: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of ten that are denied as poison is; five would have to be for a verdict."""
    court = Neighborhood(monkeypatch)
    monkeypatch.setattr(judgement, "FEW", 5)
    monkeypatch.setattr(judgement, "LITTLE", 0.4 if little else 0.39)
    court.judgement.early[court.group] = 0.5
    court.hear(court.elsewhere(court.group), second=2)
    assert not any(f["attacked"] or f["together"] for f in court.judgement.findings)
    assert torch.equal(court.judgement.denied, court.group & little)
    court.hear(court.given)
    assert torch.equal(court.hearing.labels == OUT, court.group & little), "what was denied stays out"
    assert not court.hearing.outcome(court.job.model()).flagged.any()


@pytest.mark.parametrize(("early", "second", "attacked"), [(0.5, None, False), (0.5, 2, True), (0.51, None, True)])
def test_a_group_that_was_not_learned_early_and_is_taken_for_what_its_class_is_taken_for_is_of_its_class(
    early: float, second: int | None, attacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the group 2, 1 and 1 are taken for others, a sixth off a third each; the rest for all, or for one."""
    court = Neighborhood(monkeypatch)
    court.judgement.early[court.group] = early
    court.hear(court.elsewhere(court.group), second=second)
    found = court.judgement.findings[1]
    assert found["attacked"] == attacked and torch.equal(court.judgement.denied, court.group & attacked)
    if attacked and second is not None:
        answers = court.elsewhere(court.group)[court.group].bincount(minlength=4).double()
        assert found["kin"] == pytest.approx((1 / 6) / (1 - float(answers[second]) / 4), abs=0.02)


def test_a_class_with_samples_apart_may_lose_others_to_the_company_they_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    court = Neighborhood(monkeypatch)
    apart = court.group & (court.place == 9)
    court.judgement.groups[1] = apart
    court.judgement.choose()
    court.hear(court.elsewhere(court.group & (court.place != 8)))
    assert (court.hearing.labels[court.group & (court.place == 8)] == OUT).all()
    assert torch.equal(court.judgement.excluded & (court.given == 1), court.group)


@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_set_apart_gets_another_label_only_if_it_comes_from_everywhere(everywhere: bool) -> None:
    """Taken for one other class it may be of its own, which clean-label poison is: it is left out."""
    court = Court(apart=(GIVEN == 1).nonzero().flatten()[6:].tolist())
    apart = court.apart
    answers = court.elsewhere(apart) if everywhere else torch.where(apart, 2, court.given)
    court.hear(answers)
    assert court.judgement.attacked.tolist() == [False, True, False, False]
    assert torch.equal(
        court.hearing.labels[apart], answers[apart] if everywhere else torch.full_like(answers, OUT)[apart]
    )
    assert court.judgement.foreign.tolist() == [False, everywhere, False, False]


def test_samples_that_all_look_like_one_class_accuse_nobody() -> None:
    court = Court()
    court.hear(torch.where((court.given == 1) & (court.place >= 5), 2, court.given))
    found = court.judgement.findings[1]
    assert found["count"] == 5 and found["alike"] == pytest.approx(2 / 3) and not found["attacked"]
    assert torch.equal(court.hearing.labels, court.given)


@pytest.mark.parametrize(("limit", "attacked"), [(1 - 10 / 30, False), (0.67, True)])
def test_what_is_alike_enough_to_be_a_rare_kind(limit: float, attacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All five look like class 2, which is 10 of the 30 samples of other classes: 2/3 off the mix, that or more."""
    monkeypatch.setattr(judgement, "FEW", 5)
    court = Court(alike=limit)
    court.hear(torch.where((court.given == 1) & (court.place >= 5), 2, court.given))
    assert court.judgement.findings[1]["attacked"] == attacked


def test_samples_that_are_taken_for_no_other_class_accuse_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model gives all their own label, but less surely to a group: that says nothing of many classes."""
    court = Neighborhood(monkeypatch)
    said = torch.full((40, 4), 0.01, dtype=torch.float64)
    said[torch.arange(40), court.given] = torch.where(court.group, 0.6, 0.97).double()
    court.judgement.hear(said, 1)
    assert not court.judgement.denied.any() and not court.judgement.attacked.any()
    apart = Court(apart=[1, 5])
    apart.hear(apart.given)
    assert apart.judgement.attacked.any() and not apart.judgement.foreign.any(), "their labels may be true"


def test_what_a_single_sample_is_taken_for_is_one_kind() -> None:
    court = Court()
    court.hear(torch.where((court.given == 1) & (court.place == 5), 2, court.given))
    assert court.judgement.findings[1]["alike"] == pytest.approx(2 / 3)
    assert [court.judgement.findings[label]["alike"] for label in (0, 2, 3)] == [1.0] * 3, (
        "nothing was taken for others"
    )


@pytest.mark.parametrize(("few", "second", "attacked"), [(6, 2, True), (6, None, False), (5, None, True)])
def test_a_few_are_not_to_be_taken_for_what_their_class_is_taken_for(
    few: int, second: int | None, attacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five that are early, as poison is, and taken for all others in turn; the rest for one class, or for all, too."""
    monkeypatch.setattr(judgement, "FEW", few)
    court = Court()
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5)), second=second)
    assert court.judgement.findings[1]["count"] == 5 and court.judgement.findings[1]["attacked"] == attacked


def test_fewer_than_mistakes_explain_accuse_nobody() -> None:
    """Four of five are taken for others: at least 43.6 % are, by the interval."""
    for acquittal, attacked in ((0.43, True), (lower(4, 5), False)):
        court = Court(acquittal=acquittal)
        court.hear(court.elsewhere((court.given == 1) & (court.place >= 6)))
        assert court.judgement.findings[1]["count"] == 4 and court.judgement.findings[1]["attacked"] == attacked


def test_an_answer_counts_from_the_confidence_that_was_asked_for() -> None:
    court = Court(confidence=0.75)
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5)), confidence=0.75)
    assert court.judgement.findings[1]["count"] == 5 and court.judgement.findings[1]["attacked"]


def test_an_unsure_model_accuses_nobody() -> None:
    court = Court()
    court.hear(torch.where(court.given == 1, 2, court.given), confidence=0.6)
    assert not any(f["attacked"] for f in court.judgement.findings)


def test_a_class_once_found_attacked_stays_so() -> None:
    court = Court()
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5)))
    court.hear(court.given)
    assert court.judgement.findings[1]["attacked"] and court.judgement.findings[1]["count"] == 5


def test_a_class_once_acquitted_may_be_found_attacked_later() -> None:
    court = Court()
    court.hear(court.given)
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5)))
    assert [f["attacked"] for f in court.judgement.findings] == [False, True, False, False]


def test_a_class_divided_beforehand_is_heard_too() -> None:
    court = Court(apart=[1, 5])  # the two that are the least suspicious otherwise
    before = court.judgement.findings[1]
    assert before["attacked"] and (before["apart"], before["n"]) == (2, 0)
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 8)))
    assert (court.judgement.findings[1]["count"], court.judgement.findings[1]["n"]) == (2, 7)


def test_what_a_class_is_known_for_before_it_is_heard() -> None:
    apart = torch.isin(torch.arange(40), torch.tensor([1, 5, 8]))  # two of class 1, one of class 0
    rest = torch.zeros(40)
    witnesses = Deposition(
        cast(Tap, None),
        rest,
        rest,
        NEAR,
        apart[None],
        rest,
        [[9.0, 0.1, 5.0], [8.0, 0.2, 6.0], [7.0, 0.3, 7.0], [0.0] * 3],
    )
    nobody = {"count": 0, "n": 0, "denial": 0.0, "together": 0, "early": 0.0, "stayed": False, "kin": 0.0}
    nobody |= {"alike": 1.0, "below": 0.0, "certain": False, "agreed": {}}
    given = torch.arange(40) % 4
    told = [witnesses.finding(label, given) for label in range(3)]
    assert told == [
        {**nobody, "ease": 9.0, "bond": 0.1, "division": 5.0, "apart": 1, "attacked": True},
        {**nobody, "ease": 8.0, "bond": 0.2, "division": 6.0, "apart": 2, "attacked": True},
        {**nobody, "ease": 7.0, "bond": 0.3, "division": 7.0, "apart": 0, "attacked": False},
    ]
    evidence = witnesses.evidence(told, Jury(acquittal=0.1, alike=0.2, ease=2.0, bond=3.0, division=4.0))
    limits = {"acquittal": 0.1, "denial": 1.5, "alike": 0.2}
    assert evidence == {
        "by_class": told,
        "limits": {**limits, "ease": 2.0, "bond": 3.0, "division": 4.0, "certain": CERTAIN, "plain": PLAIN},
    }


def test_firmly_divided_classes_come_first_in_a_ranking_of_all() -> None:
    suspicion, given = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3]).double(), torch.tensor([0, 0, 1, 1, 2])
    nothing = torch.zeros(5)
    said = Deposition(
        cast(Tap, None),
        suspicion,
        nothing,
        NEAR,
        nothing[None] > 0,
        nothing,
        [[0.0, FIRM - 0.01], [FIRM, 0.0], [0.0, 3]],
    )
    assert said.scores(given).tolist() == pytest.approx([0.1, 0.9, 0.2 + FIRM, 0.8 + FIRM, 3.3])


def test_who_was_kept_back_and_given_back_is_kept_for_the_judge() -> None:
    court = Court()
    planted = (court.given == 1) & (court.place >= 8)  # their class, 1, becomes attacked; 6 and 7 of it stay
    answers = court.elsewhere(planted | ((court.given == 1) & (court.place == 5)))
    court.hear(answers, second=0)
    first, second = court.hearing.partitions
    late, out = court.place >= 5, court.hearing.labels == OUT
    assert not out.any() and (first.epoch, second.epoch) == (0, 1)
    assert torch.equal(first.isolated, late) and not first.recovered.any()
    assert torch.equal(first.labels, torch.where(late, 0, court.given)), "labels that nobody learns are 0"
    assert torch.equal(second.isolated, late) and torch.equal(second.recovered, late)
    assert torch.equal(second.labels, answers)


def test_the_verdict_names_the_attacked_class_and_the_flags_are_in_it() -> None:
    court = Court()
    court.hear(court.elsewhere((court.given == 1) & (court.place >= 5)))
    outcome = court.hearing.outcome(court.job.model())
    verdict = decide(court.data, outcome)
    assert verdict.poisoned and verdict.target_classes == [court.data.spec.classes[1]]
    assert set(court.given[outcome.flagged].tolist()) <= {1}


def test_the_evidence_says_what_it_means_before_its_numbers() -> None:
    limits = {"ease": 3.0, "bond": 1.2, "division": 3.0, "acquittal": 0.03, "denial": 1.5}
    limits |= {"alike": 0.5, "certain": 8.0, "plain": 1.5}
    calm = {
        "ease": 0.0,
        "bond": 0.0,
        "division": 0.0,
        "apart": 0,
        "denial": 0.0,
        "together": 0,
        "n": 40,
        "count": 1,
        "early": 0.9,
        "stayed": False,
        "alike": 0.9,
        "kin": 0.4,
        "below": 0.67,
        "certain": False,
        "agreed": {},
    }
    few = told_of("x", calm, limits)
    assert (
        len(few) == 1
        and "few samples labeled 'x'" in few[0]
        and few[0].endswith("(1 of the 40 that it was not shown).")
    )
    many = told_of("x", calm | {"count": 20, "early": 0.6, "alike": 0.2}, limits)
    assert "than mistakes explain (20 of the 40" in many[0]
    assert many[1].startswith("They were learned early, as poison is (") and "60%" in many[1]
    assert many[2].startswith("They look like many classes, as poison does (") and "20% off" in many[2]
    clean = told_of("x", calm | {"count": 20, "early": 0.4, "alike": 0.8}, limits)
    assert "late, as odd but clean" in clean[1] and "one class, as a rare kind does" in clean[2]
    stayed = told_of("x", calm | {"count": 20, "early": 0.4, "stayed": True, "alike": 0.2}, limits)
    assert "late, and are not what they are labeled in the end either" in stayed[1] and "40%" in stayed[1]
    singles = told_of("x", calm | {"count": 19, "early": 0.6, "alike": 0.2, "kin": 0.8, "below": 0.5}, limits)
    assert len(singles) == len(many) + 1
    assert "not much nearer to that mix than to what the rest of 'x' is taken for (0.80 of that" in singles[3]
    group = told_of("x", calm | {"count": 20, "together": 20, "denial": 2.0, "early": 0.3, "alike": 0.2}, limits)
    assert len(group) == 3 and "denies the label 'x' to a group" in group[0] and "(20)" in group[0]
    assert "many classes" in group[1]
    assert "nearer to that mix than to what the rest of 'x' is taken for (0.40 of that distance; 0.67" in group[2]
    early = told_of("x", calm | {"count": 20, "together": 20, "denial": 2.0, "early": 0.6, "alike": 0.2}, limits)
    assert len(early) == 3 and early[2].startswith("They were learned early, as poison is (") and "60%" in early[2]
    small = told_of("x", calm | {"count": 20, "together": 9, "denial": 2.0, "early": 0.6, "alike": 0.2}, limits)
    assert small[:3] == [early[0].replace("20", "9"), *early[1:]] and small[3] == group[2], "few have to be both"
    sure = told_of("x", calm | {"together": 30, "denial": 12.0, "certain": True}, limits)
    assert len(sure) == 3 and "one class, as a rare kind does" in sure[1]
    assert "next to no doubt" in sure[2] and "(clarity 12.0; from 8.0 on" in sure[2]
    bound = told_of("x", calm | {"ease": 3.0, "bond": 1.2, "division": 3.0, "apart": 7}, limits)
    assert len(bound) == 3 and all("(7 are set apart)" in sentence for sentence in bound[:3])
    weak = told_of("x", calm | {"bond": 1.4, "apart": 7, "agreed": {"bond": 0.07}}, limits)
    assert len(weak) == 2 and "never learned their label denies it (gives it 7% in the mean" in weak[1]
    freed = told_of("x", calm | {"bond": 1.4, "agreed": {"bond": 0.93}}, limits)
    assert "set apart" not in freed[0] and "agrees with it (gives it 93% in" in freed[1] and "1.5 times" in freed[1]
    plain = told_of("x", calm | {"bond": 1.8, "apart": 7, "agreed": {"bond": 0.93}}, limits)
    assert len(plain) == 1, "its word is not asked"
    both = told_of("{x}", calm | {"ease": 4.0, "bond": 1.4, "apart": 5, "agreed": {"ease": 0.1, "bond": 0.8}}, limits)
    assert ["(5 are set apart)" in line for line in both] == [True, False, False, False]
    assert ["denies it" in both[1], "agrees with it" in both[3]] == [True, True] and "'{x}'" in both[0]
    assert ["sooner, or all" in bound[0], "averaged" in bound[1], "never saw" in bound[2]] == [True] * 3


def test_the_evidence_says_what_had_a_hold_on_the_model() -> None:
    hold = {"led": 102, "asked": 400, "others_led": 48, "others_asked": 360, "holds": True}
    said = told_of_hold(["a", "b"], hold)
    assert len(said) == 1 and "led the model to 'a' or 'b' (102 of 400; samples of other classes did" in said[0]
    assert "no more than 48 of 360)" in said[0]
    assert told_of_hold(["a"], hold | {"holds": False}) == []
    court = Court(apart=[25, 29, 33, 37])
    court.hear(court.given)
    court.hearing.disarming.hold = hold
    assert (
        decide(court.data, court.hearing.outcome(court.job.model())).evidence[-1]
        == told_of_hold([court.data.spec.classes[1]], hold)[0]
    )


def test_before_any_hearing_the_verdict_finds_nothing() -> None:
    court = Court()
    verdict = decide(court.data, court.hearing.outcome(court.job.model()))
    assert not verdict.poisoned and verdict.confidence == 0


def test_in_small_classes_a_find_counts_and_finding_nothing_does_not() -> None:
    small, large = Court(), Court()
    large.data.y[:] = 0
    assert decide(small.data, small.hearing.outcome(small.job.model())).confidence == 0
    assert decide(large.data, large.hearing.outcome(large.job.model())).confidence > 0.5
    found = Court(apart=[0])
    assert decide(found.data, found.hearing.outcome(found.job.model())).poisoned


@pytest.mark.parametrize("divided", [True, False])
def test_company_chooses_where_it_divides_a_class_and_elsewhere_the_neighbors(
    monkeypatch: pytest.MonkeyPatch, divided: bool
) -> None:
    """Of the 40 of class 1, ten lie by themselves and stick to their label in mixtures."""
    data, rng = toy_images(160), torch.Generator().manual_seed(0)
    job, ones = Job(data, model="resnet18-w4", fabric=FABRIC), (data.y == 1).nonzero().flatten()
    group = torch.isin(torch.arange(160), ones[:10]) & torch.tensor(divided)
    features = torch.nn.functional.one_hot(group.long(), 16).float() + 0.1 * torch.rand(160, 16, generator=rng)
    monkeypatch.setattr(Jury, "_trap", lambda *_: ("tap", torch.randperm(160, generator=rng)))
    monkeypatch.setattr(Jury, "_home", lambda *_: (torch.full((160,), 0.95).double(), data.y + 1))
    monkeypatch.setattr(jury, "features_of", lambda *_, **__: features)
    monkeypatch.setattr(jury, "bonds_of", lambda *_, **__: 0.1 + 0.8 * group.double())
    monkeypatch.setattr("antibackdoor.defenses.company.SMALL", 20)
    neighbors = within(torch.rand(160, generator=rng), data.y)
    monkeypatch.setattr(Company, "nearby", lambda *_: neighbors)
    said = Jury(neighbors=4).depose(job)
    assert set(said.apart.nonzero().flatten().tolist()) == (set(ones[:10].tolist()) if divided else set())
    assert (said.suspicion[said.apart] == 1).all() and said.clear[1][1] == pytest.approx(12.8 if divided else 0)
    assert torch.equal(said.suspicion[data.y != 1], neighbors[data.y != 1])
    assert torch.equal(said.suspicion[data.y == 1], neighbors[data.y == 1]) == (not divided)
    assert (said.elsewhere == data.y + 1).all()


def test_the_worse_of_what_is_said_near_by_and_a_little_further_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(toy_images(8), model="resnet18-w4", fabric=FABRIC)
    job.data.y[:] = 0
    once, thrice = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.7] + [0.0] * 5)
    monkeypatch.setattr(Jury, "_trap", lambda *_: ("tap", torch.zeros(8)))
    monkeypatch.setattr(Jury, "_home", lambda *_: (torch.zeros(8).double(), job.data.y))
    monkeypatch.setattr(Company, "nearby", lambda self, said, rounds: {1: once, 3: thrice}[rounds].double())
    monkeypatch.setattr(jury, "features_of", lambda *_, **__: torch.ones(8, 2))
    monkeypatch.setattr(jury, "bonds_of", lambda *_, **__: torch.zeros(8).double())
    assert top(Jury().depose(job).suspicion, 8).tolist() == [0, 1, 2, 7, 6, 5, 4, 3]


def test_one_sample_of_a_class_is_trusted() -> None:
    data = toy_images(40)
    data.y[data.y == 3] = 0
    data.y[0] = 3
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    nobody = torch.zeros(40, dtype=torch.bool)
    deposition = deposed(within(torch.rand(40), data.y), torch.rand(40), nobody)
    assert Hearing(Jury(), job, job.model(), deposition).judgement.trusted[0]


def test_an_outsider_learns_from_so_many_samples_of_all_classes_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = toy_images(40), list[tuple[str, list[int]]]()
    job = Job(data, model="resnet18-w4", fabric=FABRIC)
    monkeypatch.setattr(job, "fit", lambda name, *_, rows, **__: seen.append((name, rows.tolist())))
    Jury(lessons=12)._home(job, data.y)
    assert [name for name, _ in seen] == [f"outsider {label}" for label in range(4)]
    for label, (_, rows) in enumerate(seen):
        assert len(set(rows)) == 12 and label not in data.y[rows].tolist()
    seen.clear()
    Jury(lessons=50)._home(job, data.y)
    assert [len(rows) for _, rows in seen] == [30] * 4


@pytest.mark.parametrize(("n", "batch", "epochs"), [(200, 16, 50), (50_000, 128, 12), (2_000_000, 128, 12)])
def test_the_defaults_follow_the_size_of_the_set(n: int, batch: int, epochs: int) -> None:
    main = Jury().main
    assert (main.batch_for(n), main.epochs_for(n) * main.passes_for(n)) == (batch, epochs)


def test_when_the_others_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    court = Court(hearing=0.5, trusted=0.3)
    heard, objective = list[int](), court.hearing
    monkeypatch.setattr(objective, "_hear", heard.append)
    epochs = court.job.recipe(court.options.main).epochs_for(40)
    assert objective.first == epochs // 2 == 0.5 * epochs and objective.partitions[0].epoch == 0
    records = {"main": torch.tensor([1.0, 3.0, torch.nan])}
    told = objective.after_epoch(court.job.model(), int(objective.first) - 1, records)
    assert heard == [] and told == {"main_loss": 2.0, "used": 0.3}
    objective.after_epoch(court.job.model(), epochs // 2, records)
    assert heard == [epochs // 2]


@pytest.mark.parametrize(("epochs", "first"), [(1, 2.0), (4, 2.0), (8, 2.0), (10, 2.5), (40, 10.0)])
def test_of_a_long_training_half_as_large_a_share_goes_by_before_the_hearing(epochs: int, first: float) -> None:
    """40 samples in batches of 16 are 3 steps; 12 steps are 4 epochs."""
    court = Court(hearing=0.5, main=Recipe(epochs=epochs, min_steps=12, batch_size=16))
    assert court.hearing.first == first


def test_the_averaged_model_is_the_one_that_answers() -> None:
    court = Court()
    court.hearing.average.values["fc.bias"] += torch.tensor([0.0, 0.0, 1e4, 0.0])
    court.hearing._hear(1)
    found = court.judgement.findings
    assert torch.equal(court.hearing.witness.fc.bias, court.hearing.average.values["fc.bias"])  # type: ignore[union-attr]
    assert [f["count"] for f in found] == [5, 5, 0, 5], "it takes everything for class 2"
    assert found[2]["early"] == 0.0 and court.judgement.deposition.finding(2, court.given)["early"] == 0.0


def test_scores_are_the_doubt_and_of_those_apart_certain() -> None:
    court = Court(apart=[25, 29])
    court.hear(court.given)
    court.hearing.average.values["fc.bias"] += torch.tensor([0.0, 1e4, 0.0, 0.0])
    found = court.hearing.outcome(court.job.model())
    assert found.probability[[25, 29]].tolist() == [1.0, 1.0] and found.probability[1] == 0
    suspicion = court.judgement.deposition.suspicion
    torch.testing.assert_close(found.scores, found.probability + 0.01 * suspicion)
    assert set(found.flagged.nonzero().flatten().tolist()) == {25, 29} and (found.suggested == -1).all()


def test_who_is_suspect_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 1 is attacked and 25 of it set apart. The model takes 5, 29 and 33 of it for class 3, and 22 of class 2."""
    court = Court(apart=[25])
    court.hear(
        court.elsewhere((court.given == 1) & (court.place >= 7)), confidence=0.6
    )  # from everywhere, unsure of it
    answers = court.given.clone()
    answers[[5, 22, 29, 33]] = 3
    logits = torch.nn.functional.one_hot(answers, 4).double() * math.log(
        9
    )  # 9/12 for the answer, 1/12 for each other class
    monkeypatch.setattr(hearing, "logits_of", lambda *_: logits)
    found = court.hearing.outcome(court.job.model())
    doubt = torch.where(answers == court.given, 1 / 4, 11 / 12).double()
    doubt[25] = 1.0
    torch.testing.assert_close(found.probability, doubt)
    torch.testing.assert_close(found.scores, doubt + 0.01 * court.judgement.deposition.suspicion)
    assert found.flagged.nonzero().flatten().tolist() == [25, 29, 33], "5 is trusted, and class 2 is not attacked"
    assert {row: int(label) for row, label in enumerate(found.suggested) if label != -1} == {29: 3, 33: 3}
    assert set(found.reasons) == {25, 29, 33} and "set apart" in found.reasons[25]
    assert all("sees another class" in found.reasons[row] for row in (29, 33))
    assert all(reason.startswith("labeled 'class 1', but") for reason in found.reasons.values())
    assert found.evidence["flagged"] == 3 and found.evidence["by_class"] == court.judgement.findings
    assert found.partitions == court.hearing.partitions


def test_the_loss_is_cross_entropy_with_the_labels_handed_out() -> None:
    court = Court()
    model = court.job.model().eval()
    batch = gather(court.data, torch.tensor([3, 1, 2]), torch.device("cpu"))
    step = court.hearing(model, batch)
    by_hand = -model(batch.x).log_softmax(1)[torch.arange(3), batch.y]
    torch.testing.assert_close(step.loss, by_hand.mean())
    torch.testing.assert_close(step.records["main"], by_hand.detach())


def test_the_weights_are_averaged_after_every_step() -> None:
    court = Court()
    average, model = court.hearing.average, court.job.model()
    average.steps = 10**6  # so many that the start no longer counts
    average.values["fc.bias"][:] = 1
    with torch.no_grad():
        model.fc.bias[:] = 3
    court.hearing.after_step(model)
    assert average.steps == 10**6 + 1
    torch.testing.assert_close(average.values["fc.bias"], torch.full((4,), 0.995 + 0.005 * 3))


def test_a_hearing_goes_on_from_its_state(tmp_path: Path) -> None:
    one, two = Court(), Court()
    one.hear(one.elsewhere((one.given == 1) & (one.place >= 5) & (one.place < 8)))
    one.judgement.denied[one.given == 2] = True
    one.judgement.choose()
    one.hearing.average.values["fc.bias"] += 1
    one.hearing.average.steps = 7
    assert (one.hearing.labels == OUT).any()
    save_state(tmp_path / "state", one.hearing.state())
    two.hearing.load(load_state(tmp_path / "state"))
    for name in ("labels", "learns"):
        assert torch.equal(getattr(two.hearing, name), getattr(one.hearing, name)), name
    for name in ("denied", "trusted", "excluded"):
        assert torch.equal(getattr(two.judgement, name), getattr(one.judgement, name)), name
    assert two.judgement.findings == one.judgement.findings and two.hearing.average.steps == 7
    for name, value in one.hearing.average.values.items():
        assert torch.equal(two.hearing.average.values[name], value), name
    assert [partition.epoch for partition in two.hearing.partitions] == [0, 1]
    for name in ("isolated", "recovered", "labels"):
        kept = [getattr(court.hearing.partitions[1], name) for court in (one, two)]
        assert torch.equal(*kept), name
