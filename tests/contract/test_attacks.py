"""What every attack promises, on every sort of data it is registered for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from antibackdoor.attacks import ATTACKS, Attack
from antibackdoor.bench.judge import attack_measures
from antibackdoor.data.core import Data
from antibackdoor.files import load_state, save_state
from tiny import FABRIC, short, stored, train
from toy import toy_images, toy_series

SETS = {
    "image": lambda seed: toy_images(80, classes=4, size=16, seed=seed),
    "series": lambda seed: toy_series(80, classes=4, seed=seed),
    "unequal series": lambda seed: toy_series(80, classes=4, unequal=True, seed=seed),
}
CASES = [(entry.name, sort) for entry in ATTACKS for sort in SETS if sort.split()[-1] in entry.kinds]
ROWS = torch.arange(80)


def attack_of(name: str, **fields: Any) -> Attack:
    attack: Attack = ATTACKS[name].make(**{"target": 1, "rate": 0.1, "cover": 0.05, **fields})
    return attack


def test_every_attack_is_described() -> None:
    for entry in ATTACKS:
        assert entry.paper and entry.description.endswith("."), entry.name


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_poison(name: str, sort: str) -> None:
    clean, attack = SETS[sort](0), attack_of(name)
    before = clean.fingerprint()
    state = attack.fit(clean)
    frozen = {key: value.clone() for key, value in state.items()}
    data, truth = attack.poison(clean, state, 0)

    assert clean.fingerprint() == before
    assert all(torch.equal(state[key], frozen[key]) for key in frozen) and state.keys() == frozen.keys()
    assert int(truth.poisoned.sum()) == 8 and int(truth.cover.sum()) == 4
    assert not (truth.poisoned & truth.cover).any()
    assert torch.equal(truth.labels, clean.y) and (truth.targets == 1).all()
    assert ((clean.y[truth.poisoned] == 1) == attack.clean_label).all() and (clean.y[truth.cover] != 1).all()
    assert torch.equal(data.y, torch.where(truth.poisoned, 1, clean.y))
    assert list(data.ids) == list(clean.ids) and data.spec == clean.spec

    touched = truth.poisoned | truth.cover
    changed = (stored(data) != stored(clean)).flatten(1).any(1)
    assert torch.equal(changed, touched)
    x = data.spec.decode(stored(data)[touched])
    assert x.isfinite().all() and data.spec.low <= float(x.min()) and float(x.max()) <= data.spec.high


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_triggered(name: str, sort: str) -> None:
    clean, test, attack = SETS[sort](0), SETS[sort](1), attack_of(name)
    before = test.fingerprint()
    state = attack.fit(clean)
    got, targets = attack.triggered(test, state)
    rows = (test.y != 1).nonzero().flatten()
    assert test.fingerprint() == before
    assert torch.equal(got.y, test.y[rows]) and list(got.ids) == [test.ids[i] for i in rows.tolist()]
    assert (stored(got) != test.x[rows]).flatten(1).any(1).all()
    assert stored(got).dtype == test.x.dtype and targets.tolist() == [1] * len(got)
    assert got.fingerprint() == attack.triggered(test, state)[0].fingerprint()


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_trigger_is_pure_and_does_not_depend_on_the_batch(name: str, sort: str) -> None:
    clean, attack = SETS[sort](0), attack_of(name)
    state = attack.fit(clean)

    def apply(verb: str, rows: torch.Tensor) -> torch.Tensor:
        lengths = None if clean.lengths is None else clean.lengths[rows]
        x = clean.spec.decode(clean.x[rows])
        before = x.clone()
        out: torch.Tensor = getattr(attack, verb)(x, clean.spec, state, rows, lengths)
        assert torch.equal(x, before), "the trigger changed its argument"
        return out

    for verb in ("trigger", "craft"):
        whole = apply(verb, ROWS)
        torch.testing.assert_close(torch.cat([apply(verb, part) for part in ROWS.split(37)]), whole, rtol=0, atol=0)
        torch.testing.assert_close(apply(verb, ROWS.flip(0)).flip(0), whole, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_same_seed_same_result(name: str, sort: str) -> None:
    clean, attack = SETS[sort](0), attack_of(name)
    first, again = (attack.poison(clean, attack.fit(clean), 0) for _ in range(2))
    other = attack.poison(clean, attack.fit(clean), 1)
    assert first[0].fingerprint() == again[0].fingerprint() and torch.equal(first[1].poisoned, again[1].poisoned)
    assert not torch.equal(first[1].poisoned, other[1].poisoned)


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_state_is_flat_and_survives_a_file(name: str, sort: str, tmp_path: Path) -> None:
    clean, attack = SETS[sort](0), attack_of(name)
    state = attack.fit(clean)
    assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    save_state(tmp_path / "state", state)
    again = attack.poison(clean, load_state(tmp_path / "state"), 0)[0]
    assert again.fingerprint() == attack.poison(clean, state, 0)[0].fingerprint()


@pytest.mark.parametrize("name", sorted({name for name, sort in CASES if sort == "unequal series"}))
def test_padding_stays_zero(name: str) -> None:
    clean, attack = SETS["unequal series"](0), attack_of(name)
    state = attack.fit(clean)
    for data in (attack.poison(clean, state, 0)[0], attack.triggered(clean, state)[0]):
        assert data.lengths is not None
        after = (torch.arange(data.spec.shape[-1]) >= data.lengths[:, None])[:, None].expand(
            len(data), *data.spec.shape
        )
        assert after.any() and (stored(data)[after] == 0).all()


BITING: dict[str, dict[str, Any]] = {
    "badnets": {"rate": 0.15, "share": 0.1},
    "blend": {"rate": 0.1, "alpha": 0.3, "strength": 1.0},
    "sig": {"rate": 0.24, "frequency": 5, "delta": 150, "amplitude": 3.0},
}
"""Strong settings: the toy classes are learned so fast that a weak trigger has nothing to offer."""
FLOOR = {"badnets": 0.9, "blend": 0.9, "sig": 0.9}
"""Least attack success rate under plain training; a structural test passes an attack that does nothing."""


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Plainly trained models on clean data, one for each sort; filled when first asked for."""
    return {}


def plainly_trained(data: Data) -> nn.Module:
    return train(data, "none", {**short("none", 6), "recipe.augment": "none"})[0].model


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_attack_bites(name: str, sort: str, models: dict[str, nn.Module]) -> None:
    make = {"image": toy_images, "series": toy_series}[sort.rsplit(maxsplit=1)[-1]]
    fields = {"unequal": True} if sort == "unequal series" else {}
    clean, test = (make(160, classes=4, seed=seed, **fields) for seed in (0, 1))
    attack = attack_of(name, cover=0, **BITING[name])
    state = attack.fit(clean)
    models[sort] = models.get(sort) or plainly_trained(clean)
    poisoned = plainly_trained(attack.poison(clean, state, 0)[0])
    triggered, targets = attack.triggered(test, state)
    bitten, control = (attack_measures(model, test, triggered, targets, FABRIC) for model in (poisoned, models[sort]))
    assert bitten["attack_success_rate"]["value"] >= FLOOR[name]
    assert control["attack_success_rate"]["value"] < 0.2
    assert bitten["clean_accuracy"]["value"] > 0.9
