"""Opinions shared by neighbors and weighed by how clearly they divide a class, on groups that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from antibackdoor.training.groups import clarity, company, halves, shared, weighed


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_directions(n: int) -> Tensor:
    """Features of n samples along one axis and of n along another, a little shaken."""
    shaken = 0.05 * normal(4 * n, 0).view(2 * n, 2)
    return shaken + torch.eye(2, dtype=torch.float64).repeat_interleave(n, 0)


def test_shared_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert shared(torch.tensor([1.0, 0.0, 4.0, 2.0]), features, labels, 1).tolist() == [0.5, 0.5, 3.0, 3.0]


def test_nobody_asks_a_sample_of_another_label() -> None:
    opinions, labels = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 1, 0, 1])
    assert torch.equal(shared(opinions, torch.ones(4, 2), labels, 3), opinions.double())


def test_without_neighbors_each_keeps_its_own() -> None:
    opinions = normal(40, 1).view(20, 2)
    assert torch.equal(shared(opinions, two_directions(10), torch.zeros(20, dtype=torch.int64), 0), opinions)


def test_sharing_makes_a_noisy_opinion_about_a_group_sharp() -> None:
    group = torch.arange(200) >= 100
    noisy = group + normal(200, 2)
    clear = shared(noisy, two_directions(100), torch.zeros(200, dtype=torch.int64), 30)
    wrong = [((opinions > 0.5) != group).double().mean() for opinions in (noisy, clear)]
    assert wrong[0] > 0.2 and wrong[1] < 0.05


def test_of_a_large_class_some_are_asked() -> None:
    group = torch.arange(400) >= 200
    opinions, labels = group.double(), torch.zeros(400, dtype=torch.int64)
    some = shared(opinions, two_directions(200), labels, 10, most=50, seed=3)
    assert torch.equal(some, shared(opinions, two_directions(200), labels, 10, most=50, seed=3))
    assert torch.equal(some > 0.5, group)


def test_the_witness_that_sees_two_groups_is_believed() -> None:
    group, labels = torch.arange(100) < 30, torch.zeros(100, dtype=torch.int64)
    knows, guesses = group + 0.02 * normal(100, 4), 0.1 * normal(100, 5)
    for heard in (weighed([knows], guesses, labels), weighed([guesses], knows, labels)):
        assert heard[group].min() > heard[~group].max()


def test_each_class_believes_its_own_witness() -> None:
    labels = torch.arange(200) // 100
    group = torch.arange(200) % 100 < 30
    knows, guesses = group + 0.02 * normal(200, 6), 0.1 * normal(200, 7)
    heard = weighed([torch.where(labels == 0, knows, guesses)], torch.where(labels == 0, guesses, knows), labels)
    for label in (0, 1):
        assert heard[group & (labels == label)].min() > heard[~group & (labels == label)].max()


def test_a_clear_compass_turns_the_other_round_and_an_unclear_one_does_not() -> None:
    group, labels = torch.arange(100) < 30, torch.zeros(100, dtype=torch.int64)
    late = ~group + 0.1 * normal(100, 8)
    firm, vague = group + 0.1 * normal(100, 9), 0.1 * (group + 0.5 * normal(100, 9))
    heard = weighed([vague, firm], late, labels)
    assert heard[group].min() > heard[~group].max()
    heard = weighed([vague], late, labels)
    assert heard[group].max() < heard[~group].min()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_opinions_that_say_nothing_weigh_nothing(n: int) -> None:
    same = torch.ones(n)
    assert weighed([same], same, torch.zeros(n, dtype=torch.int64)).tolist() == [0.0] * n


def test_halves_tell_groups_from_one_distribution() -> None:
    group, apart = halves(torch.tensor([1.0, 1.1, 5.0, 0.9]).double())
    assert group.tolist() == [False, False, True, False] and apart > 50
    assert halves(normal(20000, 8))[1] == pytest.approx(2.65, abs=0.05)
    assert halves(torch.linspace(0, 1, 1001).double())[1] == pytest.approx(math.sqrt(12), abs=0.01)


def test_clarity_of_one_distribution_and_of_two_groups() -> None:
    assert clarity(normal(20000, 10)) == pytest.approx(4.24, abs=0.1)  # of standard deviation 1, wherever it lies
    assert clarity(0.1 * normal(20000, 10) + 0.5) == pytest.approx(0.424, abs=0.01)
    assert clarity(torch.cat([normal(50, 11), normal(50, 12) + 20]) / 20) > 10


@pytest.mark.parametrize(("m", "expected"), [(1, 0), (2, 1), (5, 1), (25, 2), (199, 19), (200, 20), (5000, 20)])
def test_with_how_many_a_sample_shares(m: int, expected: int) -> None:
    assert company(m, 20) == expected


def test_opinions_are_added_as_they_divide_worked_by_hand() -> None:
    """Clarity of (0, 0, 1, 1) is 1 / 0.05, its standardized values are -1 and 1; (0, 0.5, 0, 0.5) has 0.5^2 / 0.05."""
    labels = torch.zeros(4, dtype=torch.int64)
    one, other = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 0.0, 0.5])
    heard = weighed([one], other, labels)
    assert heard.tolist() == pytest.approx([-1.0, (5 - 20) / 25, (20 - 5) / 25, 1.0])


THIRD = 1 / math.sqrt(3)
ONE_OF_FOUR = [-THIRD, -THIRD, -THIRD, 3 * THIRD]
"""(0, 0, 0, d) standardized: its mean is d / 4, its standard deviation d sqrt(3) / 4. Its clarity is d^2 / 0.05."""


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_several_opinions_worked_by_hand(turned: bool, first: bool) -> None:
    """The clear one, of clarity 20, wherever it stands, tells which end of the unsure one is meant."""
    clear, vague = torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.0, 0, 0.1, 0.1])  # 20 and 0.2
    unsure = torch.tensor([0.0, 0.2, 0, 0] if turned else [0.0, 0, 0, 0.2])  # 0.8
    scaled = [ONE_OF_FOUR[0], ONE_OF_FOUR[3], *ONE_OF_FOUR[:2]] if turned else ONE_OF_FOUR
    heard = weighed([clear, vague] if first else [vague, clear], unsure, torch.zeros(4, dtype=torch.int64))
    parts = zip(ONE_OF_FOUR, [-1, -1, 1, 1], scaled, strict=True)
    want = [(20 * one + 0.2 * other + (-0.8 if turned else 0.8) * third) / 21 for one, other, third in parts]
    assert heard.tolist() == pytest.approx(want)


def test_where_nobody_is_firm_nobody_is_turned() -> None:
    vague, unsure = torch.tensor([0.0, 0, 0, 0.2]), torch.tensor([0.0, 1, 0, 0])  # 0.8 and 20
    heard = weighed([vague], unsure, torch.zeros(4, dtype=torch.int64))
    turned = zip(ONE_OF_FOUR, [ONE_OF_FOUR[0], ONE_OF_FOUR[3], *ONE_OF_FOUR[:2]], strict=True)
    assert heard.tolist() == pytest.approx([(0.8 * one + 20 * other) / 20.8 for one, other in turned])


def test_an_opinion_is_turned_if_it_runs_against_the_others_as_a_whole() -> None:
    """The fourth sample is a little above the mean in one and below it in the other; all others are as they are."""
    clear, unsure = torch.tensor([0.0, 0, 0, 0, 1, 1]), torch.tensor([0.0, 0, 0, 0.45, 1, 1])
    heard = weighed([clear], unsure, torch.zeros(6, dtype=torch.int64))
    assert heard[:3].max() < -0.7 and heard[4:].min() > 1.2


def test_faint_opinions_are_as_loud_as_clear_ones() -> None:
    faint = torch.tensor([0.0, 0, 0.1, 0.1])  # of clarity 0.2 each
    assert weighed([faint], faint, torch.zeros(4, dtype=torch.int64)).tolist() == pytest.approx([-1, -1, 1, 1])


def test_a_turned_opinion_counts_the_other_way_however_clear_it_is() -> None:
    group, labels = torch.arange(100) < 30, torch.zeros(100, dtype=torch.int64)
    firm, late = 0.5 * group + 0.05 * normal(100, 3), ~group + 0.01 * normal(100, 4)
    assert clarity(late) > 3 * clarity(firm) > 3 * 1.5
    heard = weighed([firm], late, labels)
    assert heard[group].min() > heard[~group].max()


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_leaves_less_variance(seed: int) -> None:
    values = 10 * normal(9, seed) + 7
    ordered = values.sort().values
    left = [
        float(((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum())
        for low, high in (ordered.tensor_split([cut]) for cut in range(1, 9))
    ]
    least = min(range(8), key=left.__getitem__)
    above = values > ordered[least]
    group = halves(values)[0]
    assert torch.equal(group, above) or torch.equal(~group, above)


def test_the_upper_group_is_the_one_further_from_zero() -> None:
    assert halves(torch.tensor([-1.58, 1.5, -1.58, 1.5]).double())[0].tolist() == [True, False, True, False]
    assert halves(torch.tensor([-12.0, 1.0, -10.0, 2.0]).double())[0].tolist() == [True, False, True, False]
    assert halves(torch.tensor([-1.5, 1.58, -1.5, 1.58]).double())[0].tolist() == [False, True, False, True]


def test_how_far_groups_lie_apart_by_hand() -> None:
    group, apart = halves(torch.tensor([10.0, 0.0, 11.0, 1.0, 12.0]).double())
    assert group.tolist() == [True, False, True, False, True]
    assert apart == pytest.approx(10.5 / math.sqrt((0.25 + 2 / 3) / 2))
    assert halves(torch.tensor([0.0, 0.0, 1.0, 1.0]).double())[1] == 1e6


def test_clarity_by_hand() -> None:
    assert clarity(torch.tensor([0.3])) == 0.0
    assert clarity(torch.tensor([0.0, 1.0])) == pytest.approx(20)
    assert clarity(torch.tensor([0.0, 0.2, 0.8, 1.0])) == pytest.approx(0.8 / 0.1 * 0.8)
