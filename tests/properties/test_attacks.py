from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antibackdoor.attacks import ATTACKS, Fitted
from antibackdoor.errors import InputError
from toy import toy_images

NAMES = [entry.name for entry in ATTACKS if "image" in entry.kinds and not issubclass(entry.make, Fitted)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    classes=st.integers(1, 5),
    target=st.integers(0, 6),
    rate=st.floats(0.001, 1),
    cover=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_counts_are_exact_or_the_request_is_refused(
    name: str, n: int, classes: int, target: int, rate: float, cover: float, seed: int
) -> None:
    clean = toy_images(n, classes=classes, size=16)
    attack = ATTACKS[name].make(target=target, rate=rate, cover=cover)
    count, covers = max(1, round(rate * n)), max(1, round(cover * n)) if cover else 0
    inside = int((clean.y == target).sum())
    pool, free = (inside, n - inside) if attack.clean_label else (n - inside, n - inside - count)
    if target >= classes or count > pool or covers > free:
        with pytest.raises(InputError):
            attack.poison(clean, attack.fit(clean), seed)
        return
    data, truth = attack.poison(clean, attack.fit(clean), seed)
    assert int(truth.poisoned.sum()) == count and int(truth.cover.sum()) == covers
    untouched = ~(truth.poisoned | truth.cover)
    rows = untouched.nonzero().flatten()
    assert torch.equal(data.x[rows], clean.x[rows]) and torch.equal(data.y[rows], clean.y[rows])
