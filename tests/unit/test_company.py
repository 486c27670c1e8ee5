"""What a witness says of groups, on features and opinions made by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from antibackdoor.defenses import company
from antibackdoor.defenses.company import Company
from antibackdoor.training.groups import FIRM
from antibackdoor.training.job import Job
from antibackdoor.training.ranking import top
from tiny import FABRIC
from toy import toy_images

N = 240
GIVEN = toy_images(N).y  # 60 of each of four classes
CLASS_1 = (GIVEN == 1).nonzero().flatten()


def said(monkeypatch: pytest.MonkeyPatch, apart: Tensor, bonds: Tensor, ease: Tensor | None = None) -> Company:
    """Company of samples whose features lie in two directions, `apart` or not, with these bonds to their labels."""
    features = torch.where(apart[:, None], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    features = features + 0.1 * torch.rand(N, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(company, "features_of", lambda *_, **__: features)
    monkeypatch.setattr(company, "bonds_of", lambda *_, **__: bonds.double())
    if ease is None:
        ease = torch.rand(N, generator=torch.Generator().manual_seed(1))
    job = Job(toy_images(N), fabric=FABRIC)
    return Company.of(cast(Any, None), job, ease, neighbors=6, rounds=10)


def noisy(mean: Tensor) -> Tensor:
    """Opinions about single samples that overlap a lot."""
    return (mean + 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


def rows_of(mask: Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def test_a_group_that_noisy_opinions_hide_stands_out_among_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    poison = torch.zeros(N, dtype=torch.bool)
    poison[CLASS_1[:15]] = True
    bonds = noisy(0.4 + 0.4 * poison)
    assert len(rows_of(poison) & set(top(bonds, 15).tolist())) < 12, "by themselves they do not"
    found = said(monkeypatch, poison, bonds)
    assert rows_of(found.group) == rows_of(poison)
    assert set(top(found.scores, 15).tolist()) == rows_of(poison)
    assert set(top(found.scores, 60).tolist()) == set(CLASS_1.tolist()), "the class that falls into two comes first"


def test_a_group_of_faint_bonds_is_odd_where_all_others_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than five sixths of a class are not poison: what is said of them is ordinary there."""
    poison = torch.zeros(N, dtype=torch.bool)
    poison[CLASS_1[:8]] = True
    found = said(monkeypatch, poison, torch.where(poison, 0.1, 0.9) * (GIVEN == 1))
    assert rows_of(found.group) == rows_of(poison) == set(top(found.scores, 8).tolist())
    poison[CLASS_1[:12]] = True
    found = said(monkeypatch, poison, torch.where(poison, 0.1, 0.9) * (GIVEN == 1))
    assert rows_of(found.group) == set(CLASS_1.tolist()) - rows_of(poison), "12 of 60 leave exactly four fifths"


def test_samples_learned_early_together_are_a_group_too(monkeypatch: pytest.MonkeyPatch) -> None:
    poison = torch.zeros(N, dtype=torch.bool)
    poison[CLASS_1[:15]] = True
    found = said(monkeypatch, poison, torch.full((N,), 0.5), ease=noisy(0.2 + 0.6 * poison))
    assert rows_of(found.group) == rows_of(poison)


def test_opinions_that_nothing_connects_agree_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = said(monkeypatch, torch.zeros(N, dtype=torch.bool), noisy(torch.full((N,), 0.5)))
    assert not found.group.any() and float(found.scores.max()) < 1 + FIRM


def test_denied_is_the_clear_group_or_whoever_half_the_company_doubts() -> None:
    """Rows 10 to 19 of a class of 20 keep company with each other, as do 0 to 9."""
    near = torch.tensor([[*range(10)]] * 10 + [[*range(10, 20)]] * 10 + [[20] * 10])
    told = Company(near, torch.zeros(21), torch.zeros(21, dtype=torch.bool), 2)
    rows = torch.arange(20)

    def denied(first: float, second: float) -> list[int]:
        doubts = torch.where(rows < 10, first, second)
        return told.denied(rows, doubts).nonzero().flatten().tolist()

    assert denied(0.0, 0.6) == [*range(10, 20)]
    assert denied(0.0, 0.4) == [*range(10, 20)], "clearly apart, though they are not doubted by half"
    assert denied(0.1, 0.2) == [] and denied(0.7, 0.8) == [*rows.tolist()]
    assert denied(0.45, 0.55) == [*range(10, 20)]
    single = torch.zeros(20)
    single[[3, 12]] = 1.0
    assert told.denied(rows, single).sum() == 0, "each is doubted alone"
