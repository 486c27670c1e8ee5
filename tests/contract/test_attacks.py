"""What every attack promises, on every sort of data it is registered for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from antibackdoor.attacks import ATTACKS, Attack, State
from antibackdoor.bench.judge import attack_measures
from antibackdoor.bench.poisoned import fitted
from antibackdoor.data.core import Data
from antibackdoor.files import load_state, save_state
from attack_settings import BITING, FLOOR, LEFT_OUT, TINY
from tiny import FABRIC, short, stored, train
from toy import toy_images, toy_series

SETS = {
    "image": lambda n, seed: toy_images(n, classes=4, size=16, seed=seed),
    "series": lambda n, seed: toy_series(n, classes=4, seed=seed),
    "unequal series": lambda n, seed: toy_series(n, classes=4, unequal=True, seed=seed),
}
CASES = [(entry.name, sort) for entry in ATTACKS for sort in SETS if sort.split()[-1] in entry.kinds]
ROWS = torch.arange(80)


def attack_of(name: str, **fields: Any) -> Attack:
    attack: Attack = ATTACKS[name].make(**{**TINY.get(name, {}), "target": 1, "rate": 0.1, "cover": 0.05, **fields})
    return attack


def fit(attack: Attack, clean: Data) -> State:
    return fitted(attack, clean, seed=0, victim="resnet18-w4", fabric=FABRIC)


@cache
def case(name: str, sort: str) -> tuple[Data, Data, Attack, State]:
    """Clean training and test set, the attack, and what it learned; made once for all tests."""
    clean, attack = SETS[sort](80, 0), attack_of(name)
    return clean, SETS[sort](80, 1), attack, fit(attack, clean)


def test_every_attack_is_described() -> None:
    for entry in ATTACKS:
        assert entry.paper and entry.description.endswith("."), entry.name


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_poison(name: str, sort: str) -> None:
    clean, _, attack, state = case(name, sort)
    before = clean.fingerprint()
    frozen = {key: value.clone() for key, value in state.items()}
    data, truth = attack.poison(clean, state, 0)

    assert clean.fingerprint() == before
    assert all(torch.equal(state[key], frozen[key]) for key in frozen) and state.keys() == frozen.keys()
    assert int(truth.poisoned.sum()) == 8 and int(truth.cover.sum()) == 4
    assert not (truth.poisoned & truth.cover).any()
    assert torch.equal(truth.labels, clean.y) and torch.equal(truth.targets, attack.leads_to(clean.y, ROWS, 4))
    assert ((clean.y == truth.targets)[truth.poisoned] == attack.clean_label).all()
    for role, rows in (("poison", truth.poisoned), ("cover", truth.cover)):
        assert attack.candidates(clean.y, truth.targets, role)[rows].all()  # type: ignore[arg-type]
    assert torch.equal(data.y, torch.where(truth.poisoned, truth.targets, clean.y))
    assert list(data.ids) == list(clean.ids) and data.spec == clean.spec

    touched = truth.poisoned | truth.cover
    changed = (stored(data) != stored(clean)).flatten(1).any(1)
    assert torch.equal(changed, touched)
    x = data.spec.decode(stored(data)[touched])
    assert x.isfinite().all() and data.spec.low <= float(x.min()) and float(x.max()) <= data.spec.high


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_at_a_rate_of_zero_nothing_is_poisoned_and_the_test_set_is_triggered_as_ever(name: str, sort: str) -> None:
    clean, test, attack, state = case(name, sort)
    control = replace(attack, rate=0.0, cover=0.0)
    data, truth = control.poison(clean, state, 0)
    assert data.fingerprint() == clean.fingerprint() and not (truth.poisoned | truth.cover).any()
    assert control.triggered(test, state)[0].fingerprint() == attack.triggered(test, state)[0].fingerprint()


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_triggered(name: str, sort: str) -> None:
    _, test, attack, state = case(name, sort)
    before = test.fingerprint()
    got, targets = attack.triggered(test, state)
    every = attack.leads_to(test.y, ROWS, 4)
    rows = attack.candidates(test.y, every, "test").nonzero().flatten()
    assert test.fingerprint() == before
    assert torch.equal(got.y, test.y[rows]) and list(got.ids) == [test.ids[i] for i in rows.tolist()]
    assert torch.equal(targets, every[rows]) and (targets != got.y).all()
    assert (stored(got) != test.x[rows]).flatten(1).any(1).all()
    assert stored(got).dtype == test.x.dtype
    assert got.fingerprint() == attack.triggered(test, state)[0].fingerprint()


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_samples_do_not_depend_on_the_batch(name: str, sort: str) -> None:
    clean, _, attack, state = case(name, sort)
    before = clean.fingerprint()
    for role in ("poison", "cover", "test"):
        rows = attack.candidates(clean.y, attack.leads_to(clean.y, ROWS, 4), role).nonzero().flatten()  # type: ignore[arg-type]

        def made(some: torch.Tensor, role: Any = role) -> torch.Tensor:
            return attack.make(clean, some, state, role)

        whole = made(rows)
        assert torch.equal(torch.cat([made(part) for part in rows.split(13)]), whole)
        assert torch.equal(made(rows.flip(0)).flip(0), whole)
    assert clean.fingerprint() == before


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_same_seed_same_result(name: str, sort: str) -> None:
    clean, _, attack, state = case(name, sort)
    again = fit(attack, clean)
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    first, second, other = (attack.poison(clean, state, seed) for seed in (0, 0, 1))
    assert first[0].fingerprint() == second[0].fingerprint() and torch.equal(first[1].poisoned, second[1].poisoned)
    assert not torch.equal(first[1].poisoned, other[1].poisoned)


@pytest.mark.parametrize(("name", "sort"), CASES)
def test_state_is_flat_and_survives_a_file(name: str, sort: str, tmp_path: Path) -> None:
    clean, _, attack, state = case(name, sort)
    assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    save_state(tmp_path / "state", state)
    again = attack.poison(clean, load_state(tmp_path / "state"), 0)[0]
    assert again.fingerprint() == attack.poison(clean, state, 0)[0].fingerprint()


@pytest.mark.parametrize("name", sorted({name for name, sort in CASES if sort == "unequal series"}))
def test_padding_stays_zero(name: str) -> None:
    clean, _, attack, state = case(name, "unequal series")
    for data in (attack.poison(clean, state, 0)[0], attack.triggered(clean, state)[0]):
        assert data.lengths is not None
        after = (torch.arange(data.spec.shape[-1]) >= data.lengths[:, None])[:, None].expand(
            len(data), *data.spec.shape
        )
        assert after.any() and (stored(data)[after] == 0).all()


class Small(nn.Module):
    """Three convolutions: what bites here needs no deep network, and there are many attacks."""

    def __init__(self, kind: str, channels: int):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if kind == "image" else (nn.Conv1d, nn.BatchNorm1d)
        widths = [(channels, 16, 1), (16, 24, 2), (24, 32, 2)]
        layers = [[conv(i, o, 5, s, 2), norm(o), nn.ReLU()] for i, o, s in widths]
        self.body = nn.Sequential(*(layer for group in layers for layer in group))
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        features: torch.Tensor = self.body(x).flatten(2)
        logits: torch.Tensor = self.head(torch.cat([features.mean(2), features.amax(2)], 1))
        return logits


def plainly_trained(data: Data) -> nn.Module:
    torch.manual_seed(0)
    model = Small(data.spec.kind, data.spec.shape[0])
    return train(data, "none", {**short("none", 8), "recipe.augment": "none"}, model=model)[0].model


@cache
def clean_model(sort: str) -> nn.Module:
    """A plainly trained model on clean data."""
    return plainly_trained(SETS[sort](160, 0))


def bite(name: str, sort: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures of a model trained on the poisoned set, and of one trained on the clean set."""
    clean, test = (SETS[sort](160, seed) for seed in (0, 1))
    attack = attack_of(name, **{"cover": 0, **TINY.get(name, {}), **BITING.get(name, {})})
    state = fit(attack, clean)
    poisoned = plainly_trained(attack.poison(clean, state, 0)[0])
    triggered, targets = attack.triggered(test, state)
    models = (poisoned, clean_model(sort))
    bitten, control = (attack_measures(model, test, triggered, targets, FABRIC) for model in models)
    return bitten, control


BITE_CASES = [case for case in CASES if case[1] != "unequal series" and case not in LEFT_OUT]


@pytest.mark.parametrize(("name", "sort"), BITE_CASES)
def test_attack_bites(name: str, sort: str) -> None:
    bitten, control = bite(name, sort)
    success, without = (measures["attack_success_rate"]["value"] for measures in (bitten, control))
    assert success >= FLOOR.get(name, 0.9)
    assert without < 0.2, "the trigger alone moves a clean model: this shows nothing"
    assert bitten["clean_accuracy"]["value"] > 0.9
