"""Properties that hold for any input: rows, options, seeds, stored states, detection measures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from antibackdoor.attacks.badnets import BadNets
from antibackdoor.bench.judge import detection_measures
from antibackdoor.data.batches import shuffled
from antibackdoor.data.core import Truth
from antibackdoor.data.rows import Overlay, View
from antibackdoor.defenses import Outcome
from antibackdoor.files import load_state, save_state
from antibackdoor.options import build, values
from antibackdoor.seeds import derive
from antibackdoor.training.loop import Recipe
from toy import toy_images

quick = settings(max_examples=40, deadline=None)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def gathers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(source, rows replaced, their values, rows asked for)."""
    n = draw(st.integers(1, 12))
    rows = torch.tensor(sorted(draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64)
    asked = torch.tensor(draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=torch.int64)
    return torch.arange(2.0 * n).reshape(n, 2), rows, -1 - torch.arange(2.0 * len(rows)).reshape(-1, 2), asked


@quick
@given(gathers())
def test_an_overlay_is_its_materialized_copy(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    source, rows, new, asked = case
    copy, before = source.clone(), source.clone()
    copy[rows] = new
    overlay = Overlay(source, rows, new)
    assert torch.equal(overlay[asked], copy[asked])
    assert torch.equal(overlay[torch.arange(len(copy))], copy) and torch.equal(source, before)
    assert len(overlay) == len(copy) and tuple(overlay.shape) == tuple(copy.shape)


@quick
@given(gathers(), st.data())
def test_a_view_of_a_view_is_one_gather(case: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    source, rows, new, asked = case
    inner = View(Overlay(source, rows, new), asked)
    places = st.lists(st.integers(0, len(asked) - 1), max_size=9) if len(asked) else st.just([])
    again, last = (torch.tensor(data.draw(places), dtype=torch.int64) for _ in range(2))
    outer = View(inner, again)
    assert len(outer) == len(again) == outer.shape[0]
    picked = last[last < len(again)]
    assert torch.equal(outer[picked], Overlay(source, rows, new)[asked[again[picked]]])


@quick
@given(n=st.integers(2, 70), size=st.integers(2, 30), seed=st.integers(0, 2**62))
def test_batches_hold_every_row_once_and_never_one_alone(n: int, size: int, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    sizes, rows = [], []
    for batch in shuffled(toy_images(n, size=2), torch.arange(n), size, order, torch.device("cpu")):
        sizes.append(len(batch.rows))
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(n))
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and max(sizes) <= size + 1


recipes = st.builds(
    Recipe,
    epochs=st.integers(1, 10**6),
    min_steps=st.integers(0, 10**6),
    batch_size=st.integers(2, 10**6),
    learning_rate=st.floats(1e-12, 1e6),
    momentum=st.floats(0, 0.999),
    weight_decay=st.floats(0, 10),
    schedule=st.sampled_from(["cosine", "constant"]),
    augment=st.sampled_from(["none", "weak", "strong"]),
)


@quick
@given(recipes)
def test_options_survive_their_values_as_json_and_as_text(recipe: Recipe) -> None:
    plain = values(recipe)
    assert build(Recipe, plain, "recipe") == recipe
    assert build(Recipe, {name: str(value) for name, value in plain.items()}, "recipe") == recipe


@quick
@given(st.floats(0.001, 1), st.floats(0, 1), st.integers(0, 10**9))
def test_attack_options_survive_too(rate: float, cover: float, target: int) -> None:
    attack = BadNets(rate=rate, cover=cover, target=target)
    assert build(BadNets, values(attack), "attack") == attack


parts = st.lists(st.one_of(st.text(alphabet="ab-1 ", max_size=4), st.integers(0, 30)), max_size=4)


@quick
@given(st.tuples(st.integers(0, 5), parts), st.tuples(st.integers(0, 5), parts))
def test_derived_seeds_are_stable_and_distinct(one: tuple[int, list[Any]], two: tuple[int, list[Any]]) -> None:
    seeds = [derive(seed, *names) for seed, names in (one, two, one)]
    assert seeds[0] == seeds[2] and 0 <= seeds[0] < 2**63
    same = one[0] == two[0] and list(map(str, one[1])) == list(map(str, two[1]))
    assert (seeds[0] == seeds[1]) == same


tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(), tensors
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, two: Any) -> bool:
    """Equal structures with equal types, tensors bit for bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


@quick
@given(trees)
def test_a_state_survives_a_file(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", tree)
        assert same(load_state(Path(folder) / "state"), tree)


@quick
@given(st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=2, max_size=30))
def test_detection_does_not_depend_on_the_scale_of_the_scores(samples: list[tuple[int, bool]]) -> None:
    scores, poisoned = (torch.tensor(column) for column in zip(*samples, strict=True))
    n, none = len(samples), torch.zeros(len(samples), dtype=torch.bool)
    truth = Truth(poisoned, none, torch.ones(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64))

    def measures(scores: Tensor) -> dict[str, Any]:
        return detection_measures(Outcome(nn.Identity(), scores, scores * 0, none, none.long() - 1), truth)

    plain = measures(scores.double())
    assert plain == measures(scores.double() * 3 - 7) == measures(scores.double().div(20).exp())
    assert ("auroc" in plain) == (bool(poisoned.any()) and not bool(poisoned.all()))
    if "auroc" in plain:
        assert abs(measures(-scores.double())["auroc"]["value"] + plain["auroc"]["value"] - 1) < 1e-9
