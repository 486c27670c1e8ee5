from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antibackdoor.attacks import ATTACKS, Fitted
from antibackdoor.bench.poisoned import poison
from antibackdoor.data.core import Splits
from antibackdoor.errors import InputError
from antibackdoor.options import build
from toy import toy_images, toy_series

NAMES = [entry.name for entry in ATTACKS if not issubclass(entry.make, Fitted)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["image", "series"]),
    size=st.integers(2, 16),
    n=st.integers(1, 40),
    classes=st.integers(1, 5),
    target=st.integers(0, 6),
    rate=st.floats(0.001, 1),
    cover=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_counts_are_exact_or_the_request_is_refused(
    name: str, kind: str, size: int, n: int, classes: int, target: int, rate: float, cover: float, seed: int
) -> None:
    if kind not in ATTACKS[name].kinds:
        return
    clean = toy_images(n, classes, size=size) if kind == "image" else toy_series(n, classes, length=size)
    count, covers = max(1, round(rate * n)), max(1, round(cover * n)) if cover else 0
    try:
        attack = build(ATTACKS[name].make, {"target": target, "rate": rate, "cover": cover}, name)
        attack.check(clean)
    except InputError:
        return
    state, targets = attack.fit(clean), attack.leads_to(clean.y, torch.arange(n), classes)
    pool = int(attack.candidates(clean.y, targets, "poison").sum())
    if count > pool:
        with pytest.raises(InputError, match=f"{pool} are|nothing to poison"):
            attack.poison(clean, state, seed)
        return
    try:
        data, truth = attack.poison(clean, state, seed)
    except InputError as error:
        assert "are free" in str(error)
        assert covers > int(attack.candidates(clean.y, targets, "cover").sum()) - count
        return
    assert int(truth.poisoned.sum()) == count and int(truth.cover.sum()) == covers
    assert attack.candidates(clean.y, targets, "poison")[truth.poisoned].all()
    assert attack.candidates(clean.y, targets, "cover")[truth.cover].all()
    rows = (~(truth.poisoned | truth.cover)).nonzero().flatten()
    assert torch.equal(data.x[rows], clean.x[rows]) and torch.equal(data.y[rows], clean.y[rows])


@pytest.mark.parametrize("entry", list(ATTACKS), ids=lambda entry: str(entry.name))
def test_an_attack_that_is_not_meant_for_the_data_says_so(entry: object) -> None:
    for kind, make in (("image", toy_images), ("series", toy_series)):
        if kind not in entry.kinds:  # type: ignore[attr-defined]
            with pytest.raises(InputError, match=f"does not work on data of kind '{kind}'"):
                poison(Splits(make(), make(seed=1)), entry.name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["badnets", "all_to_all", "tact", "several", "adaptive_patch"])
def test_an_image_smaller_than_the_trigger_is_refused(name: str) -> None:
    clean = toy_images(40, size=4)
    with pytest.raises(InputError, match="fit into images"):
        poison(Splits(clean, toy_images(40, size=4, seed=1)), name, {"size": 5})
