"""What the mechanism of attacks offers beyond one trigger and one target class, on attacks made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from antibackdoor.attacks.base import Attack, Fitted, Role, State, draws
from antibackdoor.bench.poisoned import fitted
from antibackdoor.data.core import Data, Spec
from antibackdoor.options import options
from antibackdoor.training.job import Job
from tiny import FABRIC, stored
from toy import toy_images, toy_series


@options
class Next(Attack):
    """Brightens; the target is the next class."""

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        return x + 0.5

    def decoy(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    def leads_to(self, labels: Tensor, rows: Tensor, classes: int) -> Tensor:
        return (labels + 1) % classes


def test_the_target_may_depend_on_the_sample() -> None:
    clean = toy_images(80)
    data, truth = Next(rate=0.5, cover=0.1).poison(clean, {}, 0)
    assert torch.equal(truth.targets, (clean.y + 1) % 4)
    assert torch.equal(data.y, torch.where(truth.poisoned, (clean.y + 1) % 4, clean.y))
    assert set(clean.y[truth.poisoned].tolist()) == {0, 1, 2, 3}
    triggered, targets = Next().triggered(clean, {})
    assert len(triggered) == 80 and torch.equal(targets, (triggered.y + 1) % 4)


def test_cover_samples_may_carry_something_else() -> None:
    clean = toy_images(80)
    data, truth = Next(rate=0.1, cover=0.1).poison(clean, {}, 0)
    assert not stored(data)[truth.cover].any() and stored(data)[truth.poisoned].any()
    assert torch.equal(data.y[truth.cover], clean.y[truth.cover])


@options
class Pair(Attack):
    """The second half of another sample, for samples of class 1; test samples meet the next sample."""

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([x[..., :half], state["partner"][..., half:]], -1)

    def candidates(self, labels: Tensor, targets: Tensor, role: Role) -> Tensor:
        return labels == 1 if role != "cover" else torch.ones_like(labels, dtype=torch.bool)

    def partners(self, labels: Tensor, rows: Tensor, role: Role) -> Tensor:
        return (rows + (1 if role == "test" else 2)) % len(labels)


@pytest.mark.parametrize("data", [toy_images(80), toy_series(80, classes=4)])
def test_a_sample_may_be_made_from_two(data: Data) -> None:
    half = data.spec.shape[-1] // 2
    poisoned, truth = Pair(rate=0.1, cover=0.1).poison(data, {}, 0)
    for row in (truth.poisoned | truth.cover).nonzero().flatten().tolist():
        assert torch.equal(stored(poisoned)[row][..., :half], stored(data)[row][..., :half])
        assert torch.equal(stored(poisoned)[row][..., half:], stored(data)[(row + 2) % 80][..., half:])
    assert (data.y[truth.poisoned] == 1).all() and len(data.y[truth.cover].unique()) > 1
    triggered, targets = Pair().triggered(data, {})
    assert len(triggered) == 20 and (triggered.y == 1).all() and not targets.any()
    assert torch.equal(stored(triggered)[0][..., half:], stored(data)[2][..., half:])


def test_draws_follow_from_the_row_and_are_uniform() -> None:
    rows = torch.arange(5000)
    got = draws(rows, 3, "test")
    assert torch.equal(got[[7, 4000]], draws(torch.tensor([7, 4000]), 3, "test"))
    assert not torch.equal(got, draws(rows, 3, "other"))
    assert got.dtype == torch.float32 and float(got.min()) >= 0 and float(got.max()) < 1
    assert ((got.mean(0) - 0.5).abs() < 0.02).all() and ((got.var(0) - 1 / 12).abs() < 0.005).all()
    assert torch.corrcoef(torch.cat([got, got.roll(1, 0)], 1).T).fill_diagonal_(0).abs().max() < 0.06


CALLS: list[int] = []


@options
class Learned(Fitted):
    """Keeps a number that its model and seed give."""

    strength: float = 0.5

    def fit(self, clean: Data, job: Job | None = None) -> State:
        assert job is not None
        seed = job.seed
        CALLS.append(job.keep("stage", lambda: seed))
        return {"weight": torch.cat([p.detach().flatten() for p in job.model().parameters()]).sum() + seed}

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        return x + self.strength


def test_what_an_attack_learns_is_kept_under_everything_it_depends_on(tmp_path: Path) -> None:
    CALLS.clear()
    clean, learned = toy_images(80), Learned()

    def fit(method: Attack = learned, data: Data = clean, seed: int = 1, victim: str = "resnet18-w4") -> State:
        return fitted(method, data, seed=seed, victim=victim, fabric=FABRIC, kept=tmp_path)

    first = fit()
    assert len(CALLS) == 1 and fit() == first and len(CALLS) == 1
    assert fit(Learned(surrogate="resnet18-w4"), victim="resnet18-w8") == first and len(CALLS) == 1
    fit(seed=2)
    fit(Learned(strength=0.6))
    fit(data=toy_images(80, seed=1))
    fit(victim="resnet18-w8")
    assert len(CALLS) == 5 and len(list(tmp_path.glob("learned-*/state.safetensors"))) == 5
    assert not list(tmp_path.glob("learned-*/stages"))
    assert fitted(Learned(), clean, seed=1, victim="resnet18-w4", fabric=FABRIC) == first  # kept nowhere: trained again
    assert len(CALLS) == 6
