from __future__ import annotations

import math

import pytest
import torch

from antibackdoor.training.ranking import EPSILON, LossDrop, Persistence, top

HISTORY = torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.5, 3.0]])  # (entries, samples)


@pytest.mark.parametrize(
    ("weights", "want"),
    [
        ("square", [1 + 0.5 / 4, 0 - 2 / 4]),
        ("linear", [1 + 0.5 / 2, 0 - 2 / 2]),
        ("uniform", [1.5, -2.0]),
    ],
)
def test_loss_drop_is_equation_5(weights: str, want: list[float]) -> None:
    ranking = LossDrop(2, weights)
    for losses in HISTORY:
        ranking.add(losses)
    assert ranking.scores().tolist() == pytest.approx(want)


def test_loss_drop_needs_two_entries() -> None:
    ranking = LossDrop(2)
    ranking.add(HISTORY[0])
    assert ranking.scores().tolist() == [0, 0]


def test_the_first_entry_takes_the_first_weight_whether_before_or_after_training() -> None:
    before, after = LossDrop(2), LossDrop(2)
    for losses in HISTORY:
        before.add(losses)
    for losses in HISTORY[1:]:
        after.add(losses)
    assert after.scores().tolist() == pytest.approx([0.5, -2.0])
    assert before.scores().tolist() == pytest.approx([1.125, -0.5])


def test_loss_drop_keeps_the_last_loss_of_an_unseen_sample() -> None:
    ranking = LossDrop(2, "uniform")
    for losses in ([2.0, 1.0], [math.nan, 1.0], [0.5, math.nan]):
        ranking.add(torch.tensor(losses))
    assert ranking.scores().tolist() == pytest.approx([1.5, 0.0])


def test_persistence_is_the_mean_of_minus_log() -> None:
    ranking = Persistence(2, skip=1)
    for losses in HISTORY:
        ranking.add(losses)
    logs = [[math.log(loss + EPSILON) for loss in row] for row in HISTORY[1:].tolist()]
    assert ranking.scores().tolist() == pytest.approx([-(logs[0][i] + logs[1][i]) / 2 for i in range(2)])


def test_losses_far_below_epsilon_count_as_equal() -> None:
    ranking = Persistence(3, skip=0)
    ranking.add(torch.tensor([1e-6, 1e-12, 0.1]))
    tiny, tinier, large = ranking.scores().tolist()
    assert tiny == pytest.approx(tinier, abs=1e-3) and tiny > large + 2


@pytest.mark.parametrize("make", [lambda: LossDrop(2, "linear"), lambda: Persistence(2, skip=1)])
def test_ranking_goes_on_from_its_state(make: object) -> None:
    whole, first, second = make(), make(), make()  # type: ignore[operator]
    for losses in HISTORY:
        whole.add(losses)
    for losses in HISTORY[:2]:
        first.add(losses)
    second.load(first.state())
    second.add(HISTORY[2])
    assert torch.equal(whole.scores(), second.scores())


def test_persistence_of_a_history_no_longer_than_what_is_skipped_says_nothing() -> None:
    ranking = Persistence(2, skip=2)
    ranking.add(HISTORY[0])
    assert ranking.scores().tolist() == [0, 0]
    ranking.add(HISTORY[1])
    assert ranking.scores().tolist() == [0, 0]


def test_top_breaks_ties_by_row_number() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 1.0])
    assert top(scores, 5).tolist() == [1, 2, 4, 0, 5]
    assert top(scores, 0).tolist() == [] and len(top(scores, 9)) == 6
    assert top(torch.zeros(1000), 1000).tolist() == list(range(1000))
