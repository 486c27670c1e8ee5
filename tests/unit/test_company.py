"""What opinions about samples say of groups, on features and opinions made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from antibackdoor.defenses.company import DIVIDED, Company, Outsiders, alike, clear_in
from antibackdoor.training.groups import clarity, nearest, shared
from antibackdoor.training.ranking import top
from toy import toy_images

N = 960
GIVEN = toy_images(N).y  # 240 of each of four classes
CLASS_1 = (GIVEN == 1).nonzero().flatten()
MIXED = (GIVEN + 1 + torch.arange(N) // 4 % 3) % 4  # each class is taken for all others


def company_of(
    apart: Tensor, *opinions: Tensor, home: int | None = None, seen: Tensor | None = None, early: Tensor | None = None
) -> Company:
    """Company of samples whose features lie in two directions, `apart` or not.

    home: which of the opinions outsiders have. seen: which class they see in each; by default, as many of each. early:
    how early each was learned among all.
    """
    features = torch.where(apart[:, None], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    features = features + 0.1 * torch.rand(N, 2, generator=torch.Generator().manual_seed(0))
    outsiders = None if home is None else Outsiders(home, MIXED if seen is None else seen, 0.5)
    near = nearest(features, GIVEN, 20)
    return Company.of(opinions, GIVEN, near, 4, rounds=10, most=5 / 6, outsiders=outsiders, early=early)


def noisy(mean: Tensor) -> Tensor:
    """Opinions about single samples that overlap a lot."""
    return (mean + 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


def rows_of(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def first(count: int) -> Tensor:
    return torch.isin(torch.arange(N), CLASS_1[:count])


def test_a_group_that_noisy_opinions_hide_stands_out_among_its_like() -> None:
    poison, others = first(50), torch.rand(N, generator=torch.Generator().manual_seed(1))
    bonds = noisy(0.4 + 0.4 * poison)
    assert len(rows_of(poison) & set(CLASS_1[top(bonds[CLASS_1], 50)].tolist())) < 42, "by themselves they do not"
    found = company_of(poison, others, bonds)
    assert rows_of(found.apart((DIVIDED, DIVIDED))) == rows_of(poison)
    assert set(CLASS_1[top(found.suspicion[CLASS_1], 50)].tolist()) == rows_of(poison)
    assert int(found.clearest.argmax()) == 1 and float(found.clearest[1]) == found.clear[1][1] > DIVIDED
    assert rows_of(found.apart((DIVIDED, found.clear[1][1]))) == rows_of(poison)
    assert not found.apart((DIVIDED, found.clear[1][1] + 0.01)).any()


def test_clarity_is_told_as_if_twenty_had_shared_what_forty_were_asked_for() -> None:
    """A class of 240 has company of 24, a tenth; the noise that 40 would leave is smaller."""
    near = nearest(torch.rand(N, 2, generator=torch.Generator().manual_seed(3)), GIVEN, 40)
    opinion = torch.rand(N, generator=torch.Generator().manual_seed(4)).double()
    told = Company.of((opinion,), GIVEN, near, 4, rounds=1, most=5 / 6).clear[1][0]
    assert told == pytest.approx(clarity(shared(opinion, near)[CLASS_1]) * (24 / 40) ** 0.5)


@pytest.mark.parametrize(("count", "which"), [(30, True), (50, False)])
def test_a_group_of_faint_bonds_is_odd_where_nearly_all_others_are_bound(count: int, which: bool) -> None:
    """More than five sixths of a class are not poison: what is said of them is ordinary there. 190 of 240 are less."""
    poison = first(count)
    found = company_of(poison, torch.where(poison, 0.1, 0.8) * (GIVEN == 1))
    group = poison if which else (GIVEN == 1) & ~poison
    assert rows_of(found.apart((DIVIDED,))) == rows_of(group)
    assert set(CLASS_1[top(found.suspicion[CLASS_1], int(group.sum()))].tolist()) == rows_of(group)


@pytest.mark.parametrize(
    ("bond", "odd"),
    [
        (lambda poison: torch.full((N,), 0.5), "poison"),  # mixtures tell nothing, outsiders do
        (lambda poison: torch.where(poison, 0.7, 0.1), "poison"),
        (lambda poison: torch.where(poison, 0.1, 0.7), "clean"),
    ],
)
def test_who_divides_a_class_says_which_of_its_early_and_late_samples_are_odd(
    bond: Callable[[Tensor], Tensor], odd: str
) -> None:
    """A class may be learned before its poison: mixtures tell, where they divide it, and outsiders otherwise."""
    poison = first(120)
    group = {"poison": poison, "clean": (GIVEN == 1) & ~poison}
    early, home = torch.where(poison, 0.1, 0.9) * (GIVEN == 1), noisy(torch.where(poison, 0.8, 0.4)).double()
    assert rows_of(company_of(poison, early).apart((DIVIDED,))) == rows_of(group["clean"])
    found = company_of(poison, early, bond(poison) * (GIVEN == 1), home, home=2)
    enough = (DIVIDED, 99.0, 99.0)
    assert rows_of(found.apart(enough)) == rows_of(group[odd])
    assert rows_of(found.believed(enough).apart(enough)) == rows_of(group[odd])
    assert set(CLASS_1[top(found.strangeness[CLASS_1], 120)].tolist()) == rows_of(group[odd])


@pytest.mark.parametrize(("at_home", "odd"), [(0.8, "poison"), (0.4, "clean")])
def test_near_by_too_ease_does_not_say_itself_which_of_its_ends_is_odd(at_home: float, odd: str) -> None:
    """Poison was learned later than its class; where outsiders do not know it either, the early ones are suspicious."""
    poison, class_1 = first(120), GIVEN == 1
    early, flat = torch.where(poison, 0.3, 0.7) * class_1, torch.full((N,), 0.5)
    home = noisy(torch.where(poison, at_home, 0.4)).double()
    suspicion = company_of(poison, early, flat, home, home=2).nearby([early, flat, flat], 1)
    group = {"poison": poison, "clean": class_1 & ~poison}[odd]
    assert float(suspicion[group].min()) > float(suspicion[class_1 & ~group].max())


def test_where_an_opinion_is_sure_of_most_of_a_class_no_upper_group_is_ordinary() -> None:
    """210 of 240 were learned early and are bound to the label whatever they are averaged with: the 30 are clean."""
    clean = first(30)
    poison = (GIVEN == 1) & ~clean
    ease, bond = torch.where(clean, 0.2, 0.7), torch.where(clean, 0.1, 0.95)
    found = company_of(clean, ease * (GIVEN == 1), bond * (GIVEN == 1))
    assert rows_of(found.apart((DIVIDED, DIVIDED))) == rows_of(poison)
    assert set(CLASS_1[top(found.suspicion[CLASS_1], 210)].tolist()) == rows_of(poison)
    assert list(found.most) == [5 / 6, 1.0, 5 / 6, 5 / 6]
    unsure = company_of(clean, ease * (GIVEN == 1), bond.clamp(max=0.8) * (GIVEN == 1))
    assert rows_of(unsure.apart((DIVIDED, DIVIDED))) == rows_of(clean) and set(unsure.most) == {5 / 6}


@pytest.mark.parametrize(("at_home", "which"), [(0.7, False), (0.45, True), (0.1, True)])
def test_most_of_a_class_is_poison_where_it_is_rather_at_home_elsewhere(at_home: float, which: bool) -> None:
    """210 of 240 were learned early; the 30 others are recognized by nobody who does not know the class, at 0.4."""
    few = first(30)
    ease, home = torch.where(few, 0.2, 0.7), torch.where(few, 0.4, at_home)
    found = company_of(few, ease * (GIVEN == 1), home * (GIVEN == 1), home=1)
    assert rows_of(found.apart((DIVIDED, 100))) == rows_of(few if which else (GIVEN == 1) & ~few)
    assert set(company_of(few, ease * (GIVEN == 1), home * (GIVEN == 1)).most) == {5 / 6}, "nobody was asked"
    kind = company_of(few, ease * (GIVEN == 1), home * (GIVEN == 1), home=1, seen=torch.full((N,), 2))
    assert set(kind.most) == {5 / 6}, "a class may look like another one"


@pytest.mark.parametrize(
    ("count", "behind", "ease", "poison"),
    [(30, 0.995, 0.7, True), (30, 0.985, 0.7, False), (30, 0.995, 0.25, False), (60, 0.995, 0.7, False)],
)
def test_most_of_a_class_is_poison_where_it_was_learned_before_all_others(
    count: int, behind: float, ease: float, poison: bool
) -> None:
    """Before the share `behind` of all others; not where ease does not divide the class, or less than 5/6 are first."""
    few, class_1 = first(count), GIVEN == 1
    place = torch.linspace(0, 1, N - len(CLASS_1), dtype=torch.float64)
    early = torch.zeros(N, dtype=torch.float64).masked_scatter(~class_1, place)
    early[class_1 & ~few] = behind
    opinions = torch.where(few, 0.2, ease) * class_1, torch.where(few, 0.1, 0.6) * class_1
    found, unasked = company_of(few, *opinions, early=early), company_of(few, *opinions)
    assert list(found.most) == [5 / 6, 1.0 if poison else 5 / 6, 5 / 6, 5 / 6] and set(unasked.most) == {5 / 6}
    if poison:
        assert rows_of(unasked.apart((DIVIDED, DIVIDED))) == rows_of(few)
        assert rows_of(found.apart((DIVIDED, DIVIDED))) == rows_of(class_1 & ~few)
        assert set(CLASS_1[top(found.suspicion[CLASS_1], 210)].tolist()) == rows_of(class_1 & ~few)


def test_in_a_class_that_is_most_of_the_set_to_be_learned_first_is_ordinary() -> None:
    given = (torch.arange(N) % 8 == 7).long()
    late = (torch.arange(N) % 16 == 0) & (given == 0)
    features = torch.where(late[:, None], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])) + 0.1 * torch.rand(N, 2)
    ease = torch.where(late, 0.1, 0.95) * (given == 0)
    found = Company.of((ease,), given, nearest(features, given, 20), 2, rounds=10, most=5 / 6, early=ease.double())
    assert set(found.most) == {5 / 6} and rows_of(found.apart((DIVIDED,))) == rows_of(late)


def test_home_alone_does_not_say_which_of_two_groups_is_at_home() -> None:
    """Clean classes hold samples that look like others, and some that look like none."""
    few = first(30)
    found = company_of(few, torch.zeros(N), torch.where(few, 0.1, 0.9) * (GIVEN == 1), home=1)
    assert set(found.most) == {5 / 6}


def test_whoever_is_sure_of_a_small_group_says_nothing_of_most_of_the_class() -> None:
    """Some look at home elsewhere, and their faint trigger is lost in mixtures: all others are ordinary in both."""
    poison = first(30)
    home, bond = torch.where(poison, 0.95, 0.3), torch.where(poison, 0.05, 0.6)
    found = company_of(poison, home * (GIVEN == 1), bond * (GIVEN == 1))
    assert set(found.most) == {5 / 6} and rows_of(found.apart((DIVIDED, DIVIDED))) == rows_of(poison)


def test_in_a_class_that_is_most_of_the_set_mixtures_are_sure_by_that_alone() -> None:
    given = (torch.arange(N) % 8 == 7).long()
    faint = torch.arange(N) % 16 == 0
    features = torch.where(faint[:, None], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])) + 0.1 * torch.rand(N, 2)
    bond = torch.where(faint, 0.1, 0.95) * (given == 0)
    found = Company.of((bond,), given, nearest(features, given, 20), 2, rounds=10, most=5 / 6)
    assert set(found.most) == {5 / 6} and rows_of(found.apart((DIVIDED,))) == rows_of(faint)


def test_poison_on_both_sides_of_what_is_ordinary_is_strange() -> None:
    """Two groups of a class are poison: one is clearly apart, the other looks a little more innocent than the rest."""
    odd, faint = first(60), first(100) & ~first(60)
    features = torch.stack([(~(odd | faint)).float(), odd.float(), faint.float()], 1)
    features = features + 0.1 * torch.rand(N, 3, generator=torch.Generator().manual_seed(0))
    near = nearest(features, GIVEN, 20)
    opinion = noisy(0.3 + 0.5 * odd - 0.1 * faint)
    found = Company.of((opinion, torch.zeros(N)), GIVEN, near, 4, rounds=10, most=5 / 6)
    assert found.clear[1][0] > DIVIDED
    assert not rows_of(faint) <= set(CLASS_1[top(found.suspicion[CLASS_1], 120)].tolist()), "they are not odd"
    first_of_all = CLASS_1[top(found.strangeness[CLASS_1], 100)]
    assert rows_of(odd) == set(first_of_all[:60].tolist()) and rows_of(odd | faint) == set(first_of_all.tolist())


def test_strangeness_by_hand() -> None:
    clearest, other = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.2, 0.35]), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9, 0.4])
    suspicion = torch.tensor([0.3, 0.1, 0.9, 0.2, 0.5, 0.4]).double()

    def told(clear: float) -> list[int]:
        """Rows, the strangest first: distances from (0.2, 0.5), the median of all but the odd rows 0 and 1."""
        opinions, given = torch.stack([clearest, other]), torch.zeros(6, dtype=torch.long)
        company = Company(given, torch.empty(6, 0), 1, [5 / 6], opinions, suspicion, [[clear, 0.1]])
        return top(company.strangeness, 6).tolist()

    assert told(DIVIDED) == [0, 1, 4, 5, 2, 3]
    assert told(DIVIDED - 0.01) == [2, 4, 5, 0, 3, 1], "no more than suspicion where the class is not divided"


def test_opinions_that_nothing_connects_agree_in_the_end() -> None:
    found = company_of(torch.zeros(N, dtype=torch.bool), noisy(torch.full((N,), 0.5)))
    assert not found.apart((DIVIDED,)).any() and float(found.clearest.max()) < 0.5


def test_what_divides_a_class() -> None:
    group = torch.cat([torch.full((60,), 0.1), torch.full((140,), 0.9)]).double()
    assert clear_in(group, 20) == clear_in(1 - group, 20) == pytest.approx(0.8 * 16)  # 0.8 apart, at most sharp
    small = group[::5]  # 40 samples, of which each shares with 4 and not with 20
    assert clear_in(small, 20) == pytest.approx(0.8 * 16 * (4 / 20) ** 0.5)
    assert clear_in(group[:1], 20) == 0


def test_denied_is_the_clear_group_or_whoever_half_the_company_doubts() -> None:
    """Rows 10 to 19 of a class of 20 keep company with each other, as do 0 to 9."""
    near = torch.tensor([[*range(10)]] * 10 + [[*range(10, 20)]] * 10 + [[20] * 10])
    told = Company(torch.zeros(21), near, 2, [0.8], torch.zeros(0, 21), torch.zeros(21), ())
    rows = torch.arange(20)
    nobody = torch.zeros(20, dtype=torch.bool)

    def denied(first: float, second: float, taught: torch.Tensor = nobody) -> list[int]:
        doubts = torch.where(rows < 10, first, second)
        return told.denied(rows, doubts, taught).nonzero().flatten().tolist()

    assert denied(0.0, 0.6) == [*range(10, 20)]
    assert denied(0.0, 0.4) == [*range(10, 20)], "clearly apart, though they are not doubted by half"
    assert denied(0.0, 0.22) == [] and denied(0.0, 0.23) == [*range(10, 20)], "0.23 / SHARP * 0.23 is more than DIVIDED"
    assert denied(0.1, 0.2) == [] and denied(0.7, 0.8) == [*rows.tolist()]
    assert denied(0.45, 0.55) == [*range(10, 20)]
    assert denied(0.7, 0.8, rows < 4) == [], "it has not learned even those it was taught"
    assert denied(0.55, 0.95, rows < 4) == [*range(10, 20)], "but doubts the others far more"
    assert denied(0.45, 0.55, rows < 4) == [*range(10, 20)]
    firm = replace(told, opinions=torch.where(torch.arange(21) < 10, 0.0, 0.9)[None].double(), clear=[[9.0]])
    doubts = torch.where(rows < 10, 0.7, 0.8)
    assert firm.denied(rows, doubts, rows < 4).nonzero().flatten().tolist() == [*range(10, 20)], "apart before"
    single = torch.zeros(20)
    single[[3, 12]] = 1.0
    assert told.denied(rows, single, nobody).sum() == 0, "each is doubted alone"


def test_denied_once_is_enough_where_all_agree_in_the_end() -> None:
    """Nine of each ten asked are of the own group; shared 50 times, both groups are doubted alike."""
    near = torch.tensor([[*range(9), 10]] * 10 + [[*range(10, 19), 0]] * 10)
    told = Company(torch.zeros(20), near, 50, [0.8], torch.zeros(0, 20), torch.zeros(20), ())
    rows = torch.arange(20)
    for doubt, found in ((0.43, []), (0.45, [*range(10, 20)])):  # 0.8 of it, squared, over SHARP: 2.37 and 2.59
        doubts = torch.where(rows < 10, 0.0, doubt)
        assert told.denied(rows, doubts, rows < 0).nonzero().flatten().tolist() == found


def test_what_is_taken_for_one_class_only_is_a_rare_kind_and_divides_nothing() -> None:
    """A quarter of class 1 that outsiders are sure is of another: of every other class, or all of class 2."""
    group = torch.isin(torch.arange(N), CLASS_1[:60])
    company = company_of(group, torch.where(group, 0.95, 0.05), home=0)
    firm = company.clear[1][0]
    assert firm >= 3
    mixed = torch.where(group, torch.tensor([0, 2, 3])[torch.arange(N) % 3], 0)
    asked = [replace(company, outsiders=Outsiders(0, seen, 0.5)) for seen in (mixed, torch.full((N,), 2))]
    kept, left = (each.believed([3.0]) for each in asked)
    assert kept.clear == company.clear and kept.apart([3.0])[group].all()
    assert left.clear[1] == [0.0] and not left.apart([3.0]).any()
    assert asked[1].believed([firm + 1]).clear == company.clear


def test_in_a_small_class_no_division_is_beyond_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    group = torch.isin(torch.arange(N), CLASS_1[:60])
    company = company_of(group, torch.where(group, 0.95, 0.05))
    assert company.believed([3.0]).apart([3.0])[group].all()
    monkeypatch.setattr("antibackdoor.defenses.company.SMALL", len(CLASS_1) + 1)
    assert not company.believed([3.0]).apart([3.0]).any()


def test_how_far_answers_are_off_the_mix_of_the_other_classes() -> None:
    given = torch.tensor([0, 1, 1, 2, 2, 3, 3])
    assert alike(0, torch.tensor([1, 2, 3]), given) == pytest.approx(0)
    assert alike(0, torch.tensor([1, 1]), given) == pytest.approx(2 / 3)
