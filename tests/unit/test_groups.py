"""Opinions shared by neighbors, and what is odd in a class, on groups that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from antibackdoor.training.groups import FIRM, clarity, company, doubted, halves, nearest, odd, oddness, shared, sure


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_directions(n: int) -> Tensor:
    """Features of n samples along one axis and of n along another, a little shaken."""
    shaken = 0.05 * normal(4 * n, 0).view(2 * n, 2)
    return shaken + torch.eye(2, dtype=torch.float64).repeat_interleave(n, 0)


def test_shared_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert shared(torch.tensor([1.0, 0.0, 4.0, 2.0]), nearest(features, labels, 1)).tolist() == [0.5, 0.5, 3.0, 3.0]


def test_a_small_class_gives_the_company_of_few() -> None:
    """Of eleven samples each shares with one, of two with the other one: a tenth of the class, and one at least."""
    features = torch.cat([two_directions(11)[:11], two_directions(2)[:2]])
    near = nearest(features, torch.tensor([0] * 11 + [1] * 2), 3)
    assert (near[:, :2] >= 0).all() and (near[:, 2:] == -1).all()
    assert near[11:, :2].sort(1).values.tolist() == [[11, 12]] * 2 and set(near[:11, :2].flatten().tolist()) <= set(
        range(11)
    )


def test_nobody_asks_a_sample_of_another_label() -> None:
    opinions, labels = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 1, 0, 1])
    assert torch.equal(shared(opinions, nearest(torch.ones(4, 2), labels, 3)), opinions.double())


def test_without_neighbors_each_keeps_its_own() -> None:
    opinions = normal(20, 1)
    assert torch.equal(shared(opinions, nearest(two_directions(10), torch.zeros(20, dtype=torch.int64), 0)), opinions)
    near = nearest(two_directions(10), torch.zeros(20, dtype=torch.int64), 2)
    assert torch.equal(shared(opinions, near, 0), opinions) and not torch.equal(shared(opinions, near), opinions)


def test_sharing_makes_a_noisy_opinion_about_a_group_sharp() -> None:
    group = torch.arange(200) >= 100
    noisy = group + normal(200, 2)
    clear = shared(noisy, nearest(two_directions(100), torch.zeros(200, dtype=torch.int64), 30))
    wrong = [((opinions > 0.5) != group).double().mean() for opinions in (noisy, clear)]
    assert wrong[0] > 0.2 and wrong[1] < 0.05


def test_the_more_rounds_the_further_an_opinion_travels() -> None:
    """Along a line of five, each with its two neighbors, the ends hear of each other in the fourth round."""
    near = torch.tensor([[0, 1, -1], [1, 0, 2], [2, 1, 3], [3, 2, 4], [4, 3, -1]])
    opinions = torch.tensor([1.0, 0, 0, 0, 0])
    reached = [int((shared(opinions, near, rounds=rounds) > 0).sum()) for rounds in (1, 2, 3, 4)]
    assert reached == [2, 3, 4, 5]
    assert torch.equal(shared(opinions, near, rounds=2), shared(shared(opinions, near), near))
    apart = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    assert shared(torch.tensor([1.0, 0, 0, 0]), apart, rounds=50).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_of_a_large_class_some_are_asked() -> None:
    group = torch.arange(400) >= 200
    opinions, labels = group.double(), torch.zeros(400, dtype=torch.int64)
    near = nearest(two_directions(200), labels, 10, most=50, seed=3)
    assert torch.equal(near, nearest(two_directions(200), labels, 10, most=50, seed=3)) and len(near.unique()) <= 50
    some = shared(opinions, near)
    assert torch.equal(some > 0.5, group)


ONE = torch.zeros(5, dtype=torch.int64)
"""Labels of five samples of one class; the percentiles of five are 0.1, 0.3, ..., 0.9."""


def test_the_upper_end_is_odd() -> None:
    assert oddness(torch.tensor([0.2, 0.9, 0.1, 0.8, 0.15]), ONE, [0.65]).tolist() == pytest.approx(
        [0.5, 0.9, 0.1, 0.7, 0.3]
    )


@pytest.mark.parametrize(("most", "turned"), [(0.79, True), (0.8, False)])
def test_an_upper_group_that_is_most_of_the_class_is_what_is_ordinary(most: float, turned: bool) -> None:
    got = oddness(torch.tensor([0.8, 0.81, 0.1, 0.82, 0.83]), ONE, [most])
    assert got.tolist() == pytest.approx([0.7, 0.5, 0.9, 0.3, 0.1] if turned else [0.3, 0.5, 0.1, 0.7, 0.9])


@pytest.mark.parametrize(
    ("other", "most", "turned"), [(0.5, 0.65, True), (0.4, 0.65, False), (0.5, 0.59, False), (None, 0.65, False)]
)
def test_another_opinion_may_say_that_the_lower_group_is_odd(other: float | None, most: float, turned: bool) -> None:
    """It gives the upper two 0.31 in the mean; the lower three are three fifths of all."""
    known = None if other is None else torch.tensor([other, 0.3, other, 0.32, other])
    values = torch.tensor([0.2, 0.9, 0.1, 0.8, 0.15])
    assert torch.equal(odd(values, most, known), (values < 0.5) == turned)
    got = oddness(values, ONE, [most], known)
    assert got.tolist() == pytest.approx([0.5, 0.1, 0.9, 0.3, 0.7] if turned else [0.5, 0.9, 0.1, 0.7, 0.3])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.9] * 16 + [0.49] * 4, True),
        ([0.9] * 15 + [0.49] * 4, False),  # too few
        ([0.89] * 16 + [0.49] * 4, False),
        ([0.9] * 16 + [0.5] * 4, False),
        ([0.9] * 20, False),
        ([0.9] * 13 + [0.49] * 7, False),  # not more than most
        ([], False),
    ],
)
def test_who_is_sure_of_a_group_and_not_of_the_others(values: list[float], expected: bool) -> None:
    assert sure(torch.tensor(values, dtype=torch.float64), 0.65) == expected


def test_what_is_odd_is_so_within_its_class() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 2])
    opinions = torch.tensor([0.1, 0.1, 0.2, 0.8, 0.9, 0.85, 0.5])
    assert oddness(opinions, labels, [0.65] * 3).tolist() == pytest.approx([1 / 6, 5 / 6, 0.5, 0.5, 5 / 6, 1 / 6, 0.5])


def test_where_nobody_is_firm_the_worst_that_is_said_counts() -> None:
    faint = 0.01 * torch.arange(5)
    said = [torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7]), torch.tensor([0.1, 0.3, 0.9, 0.5, 0.7])]
    assert doubted([faint, faint], said, ONE).tolist() == pytest.approx([0.7, 0.1, 0.9, 0.3, 0.5])


def test_where_somebody_is_firm_the_others_are_not_asked() -> None:
    firm, faint = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]), 0.01 * torch.arange(5)
    assert clarity(firm) >= FIRM > clarity(faint)
    own, other = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])
    assert doubted([faint, firm], [other, own], ONE).tolist() == pytest.approx(own.tolist())
    assert doubted([firm, firm], [other, own], ONE).tolist() == pytest.approx([0.7, 0.3, 0.1, 0.5, 0.9])


def test_each_class_asks_its_own() -> None:
    labels = torch.arange(10) // 5
    firm, faint = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]), 0.01 * torch.arange(5)
    own, other = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])
    heard = doubted([torch.cat([firm, faint]), torch.cat([faint, firm])], [torch.cat([own, other])] * 2, labels)
    assert heard.tolist() == pytest.approx([*own.tolist(), *other.tolist()])


@pytest.mark.parametrize("n", [1, 2])
def test_of_a_class_of_few_something_is_said(n: int) -> None:
    labels = torch.zeros(n, dtype=torch.int64)
    odd = oddness(torch.ones(n), labels, [0.65] * 3)
    assert odd.tolist() == doubted([torch.ones(n)], [odd], labels).tolist() == [(k + 0.5) / n for k in range(n)]


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
