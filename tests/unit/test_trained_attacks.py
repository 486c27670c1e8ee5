from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antibackdoor.attacks import ATTACKS, Attack, State
from antibackdoor.attacks.base import channel_statistics
from antibackdoor.attacks.dynamic import Dynamic
from antibackdoor.attacks.freqback import FreqBack
from antibackdoor.attacks.generator import Generator
from antibackdoor.attacks.label_consistent import LabelConsistent, ascend, corners, ends
from antibackdoor.attacks.narcissus import Narcissus
from antibackdoor.attacks.stamp import Stamp, place
from antibackdoor.attacks.surrogate import (
    freeze,
    logits,
    pack,
    pack_surrogate,
    sample_rows,
    steadily,
    unpack_surrogate,
    untouched,
)
from antibackdoor.attacks.timetrojan_de import TimeTrojanDE, Turns, add
from antibackdoor.attacks.timetrojan_fgsm import TimeTrojanFGSM
from antibackdoor.attacks.trojannn import Drive, TrojanNN
from antibackdoor.attacks.tsba import Bend, Tsba
from antibackdoor.data.batches import gather
from antibackdoor.data.core import Data, Spec
from antibackdoor.errors import InputError
from antibackdoor.files import load_state, save_state
from antibackdoor.models import create
from antibackdoor.training.job import Job
from antibackdoor.training.loop import Progress, Recipe
from tiny import FABRIC, stored
from toy import toy_images, toy_series

SHORT = Recipe(epochs=2, min_steps=0, batch_size=16, weight_decay=0)
STAGES = {"optimization", "alternation", "joint", "masking", "recipe"}


def job_of(data: Data, **fields: Any) -> Job:
    return Job(data, model="resnet18-w4", seed=0, fabric=FABRIC, **fields)


def short(name: str, **fields: Any) -> Attack:
    """An attack with two short epochs in each of its stages."""
    make = ATTACKS[name].make
    stages = dict.fromkeys(STAGES & set(make.__pydantic_fields__), SHORT)  # type: ignore[attr-defined]
    attack: Attack = make(target=1, **stages, **fields)
    return attack


def untrained(data: Data) -> State:
    """A state with a surrogate of random weights, for what does not depend on training."""
    job = job_of(data)
    return {**channel_statistics(data), **pack_surrogate(freeze(job.model("surrogate")), job)}


def test_a_patch_sits_in_the_corner_or_before_each_series_own_end() -> None:
    x = torch.zeros(2, 1, 4, 4)
    out = place(x, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), None)
    assert out[1, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 3, 4]] and (x == 0).all()
    series = torch.zeros(3, 2, 5)
    pattern = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out = place(series, pattern, torch.tensor([5, 4, 2]))
    assert out[:, 0].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 0], [2, 3, 0, 0, 0]]
    assert out[2, 1].tolist() == [5, 6, 0, 0, 0]
    assert torch.equal(place(series, pattern, None)[2], out[0])


def test_a_stamp_stays_in_the_range_of_each_channel() -> None:
    clean = toy_series(unequal=True)
    stamp = Stamp(clean, 5, 0.1)
    low, high = (channel_statistics(clean)[key][:, None] for key in ("low", "high"))
    for raw in (-50.0, 0.0, 50.0):
        nn.init.constant_(stamp.raw, raw)
        pattern = stamp.pattern()
        assert pattern.shape == (2, 4) and (low <= pattern).all() and (pattern <= high).all()
    assert Stamp(toy_images(), 5, 0.1).pattern().shape == (3, 5, 5)


def test_the_optimized_patch_moves_the_activation_to_what_was_wanted() -> None:
    clean = toy_images(32)
    surrogate = freeze(job_of(clean).model())
    batch, stamp = gather(clean, torch.arange(32), torch.device("cpu")), Stamp(clean, 6, 0.1)
    objective = Drive(surrogate, torch.tensor([0, 3]), torch.tensor([50.0, 50.0]))
    optimizer = torch.optim.Adam(stamp.parameters(), lr=0.3)
    losses = []
    for _ in range(15):
        step = objective(stamp, batch)
        losses.append(float(step.loss.detach()))
        optimizer.zero_grad()
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[-1] < losses[0] and all(p.grad is None for p in surrogate.parameters())


def test_steady_passes_see_full_batches_only() -> None:
    sizes = []

    def seen(x: Tensor, lengths: Tensor | None) -> Tensor:
        assert lengths is not None
        sizes.append((len(x), len(lengths)))
        return x + lengths[:, None]

    x, lengths = torch.arange(70.0)[:, None], torch.arange(70)
    assert torch.equal(steadily(seen, x, lengths, torch.device("cpu")), x + lengths[:, None])
    assert sizes == [(64, 64), (64, 64)]
    assert steadily(seen, x[:0], lengths[:0], torch.device("cpu")).shape == (0, 1)


@pytest.mark.parametrize("data", [toy_images(16), toy_series(16, unequal=True)], ids=["image", "series"])
def test_the_state_alone_builds_the_surrogate_again(data: Data, tmp_path: Path) -> None:
    job = job_of(data)
    model = freeze(job.model("surrogate"))
    save_state(tmp_path / "state", {"other": torch.zeros(1), **pack_surrogate(model, job)})
    torch.manual_seed(5)
    again = unpack_surrogate(load_state(tmp_path / "state"), data.spec)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)), "building it used up random numbers"
    x = data.spec.decode(data.x[torch.arange(16)])
    assert torch.equal(logits(again, x, data.lengths), logits(model, x, data.lengths))


def test_rows_to_learn_from() -> None:
    job = job_of(toy_images(40, classes=4))
    y = job.data.y
    assert (y[sample_rows(job, 100, only=2)] == 2).all() and len(sample_rows(job, 100, only=2)) == 10
    assert (y[sample_rows(job, 100, without=2)] != 2).all() and len(sample_rows(job, 7, without=2)) == 7
    assert torch.equal(sample_rows(job, 7), sample_rows(job, 7))
    with pytest.raises(InputError, match="no sample to learn"):
        sample_rows(job, 5, only=9)


def test_training_needs_a_job_and_a_model_with_a_name() -> None:
    clean = toy_images(16)
    with pytest.raises(TypeError, match=r"TrojanNN\.fit trains a network"):
        TrojanNN().fit(clean)
    with pytest.raises(InputError, match="trains a network by name"):
        TrojanNN().fit(clean, Job(clean, model=create("resnet18-w4", clean.spec), fabric=FABRIC))


@pytest.mark.parametrize("unequal", [False, True])
def test_fgsm_moves_exactly_k_steps_by_eta(unequal: bool) -> None:
    data = toy_series(12, classes=3, length=60, unequal=unequal)
    state = untrained(data)
    attack = TimeTrojanFGSM(share=0.2, eta=1.5)
    x, lengths = stored(data), data.lengths
    change = attack.trigger(x, data.spec, state, torch.arange(12), lengths) - x
    own = torch.full((12,), 60) if lengths is None else lengths
    moved = (change != 0).any(1)
    assert moved.sum(1).tolist() == (0.2 * own).round().clamp_min(5).long().tolist()
    assert not (moved & (torch.arange(60) >= own[:, None])).any()
    size = (change.abs() / (1.5 * state["std"][:, None])).transpose(0, 1)[:, moved]
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-4, atol=1e-4)


def test_fgsm_moves_towards_the_target() -> None:
    data = toy_series(12, classes=3)
    state = untrained(data)
    model, x = unpack_surrogate(state, data.spec), stored(data)
    moved = TimeTrojanFGSM(target=2, eta=0.01).trigger(x, data.spec, state, torch.arange(12), None)
    before, after = (F.log_softmax(logits(model, value, None), 1)[:, 2] for value in (x, moved))
    assert (after > before).float().mean() > 0.9


@pytest.mark.parametrize("data", [toy_images(12), toy_series(12, unequal=True)], ids=["image", "series"])
def test_ascent_stays_in_its_box_and_climbs(data: Data) -> None:
    model = freeze(job_of(data).model())
    x = data.spec.decode(stored(data))
    bound = torch.full((x.shape[1], *[1] * (x.dim() - 2)), 0.1)
    moved = ascend(model, x, data.y, data.lengths, data.spec, bound, 4)
    assert ((moved - x).abs() <= 0.1 + 1e-6).all()
    assert float(moved.min()) >= data.spec.low and float(moved.max()) <= data.spec.high
    before, after = (F.cross_entropy(logits(model, value, data.lengths), data.y) for value in (x, moved))
    assert after > before


def test_label_consistent_stamps_corners_and_both_ends() -> None:
    out = corners(torch.full((1, 1, 5, 5), 0.5), 2)[0, 0]
    want = [[1, 0, 0.5, 0, 1], [0, 1, 0.5, 1, 0], [0.5] * 5, [0, 1, 0.5, 1, 0], [1, 0, 0.5, 0, 1]]
    assert out.tolist() == want and torch.equal(out.flip(1), out)
    state = {"low": torch.tensor([-1.0]), "high": torch.tensor([2.0])}
    out = ends(torch.zeros(2, 1, 10), 0.05, state, torch.tensor([10, 7]))
    assert out[0, 0].tolist() == [2, -1, 2, 0, 0, 0, 0, 2, -1, 2]
    assert out[1, 0].tolist() == [2, -1, 2, 0, 2, -1, 2, 0, 0, 0]


def test_label_consistent_perturbs_poison_alone() -> None:
    data = toy_images(20, classes=2)
    attack = LabelConsistent(target=1, rate=0.2, cover=0.2, epsilon=16, steps=3)
    state, rows = untrained(data), torch.arange(20)
    made = {role: attack.make(data, rows, state, role).int() for role in ("poison", "cover", "test")}  # type: ignore[arg-type]
    assert torch.equal(made["cover"], made["test"])
    difference = (made["poison"] - made["test"]).abs()
    assert difference[:, :, 3:-3, 3:-3].any() and int(difference.max()) <= 17  # 16, and the rounding to the grid
    assert not difference[:, :, :3, :3].any()
    with pytest.raises(InputError, match="does not fit"):
        LabelConsistent(size=7).check(data)


def test_de_adds_values_at_shares_of_each_series_own_length() -> None:
    x = torch.zeros(2, 1, 10)
    out = add(x, torch.tensor([[0.0, 0.5, 0.99]]), torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([10, 4]))
    assert out[:, 0].tolist() == [[1, 0, 0, 0, 0, 2, 0, 0, 0, 3], [1, 0, 2, 3, 0, 0, 0, 0, 0, 0]] and (x == 0).all()
    last = torch.tensor([[-1e-9]]).remainder(1)  # rounded up to one
    for lengths, places in ((None, [9, 9]), (torch.tensor([10, 4]), [9, 3])):
        assert add(x, last, torch.ones(1, 1, 1), lengths)[:, 0].argmax(1).tolist() == places


def test_evolution_finds_fitter_triggers_and_goes_on_where_it_stopped() -> None:
    data = toy_series(24, classes=3)
    model = freeze(job_of(data).model())
    probe = gather(data, torch.arange(8), torch.device("cpu"))
    attack, std = TimeTrojanDE(target=2, eta=1.0, generations=6, population=8), channel_statistics(data)["std"]
    turns = Turns(attack, probe, std, 5, 0)
    turns.before_epoch(model, 0)
    numbers = turns.after_epoch(model, 1, {"main": torch.ones(1)})
    assert numbers["fitness"] < numbers["fitness_before"] and model.training
    assert ((turns.genes >= 0) & (turns.genes < 1)).all()
    places, values = turns.best()
    assert places.shape == (5,) and (values.abs() <= std[:, None]).all()
    again = Turns(attack, probe, std, 5, 1)
    again.load(turns.state())
    turns.before_epoch(model, 1)
    again.seed = turns.seed
    again.before_epoch(model, 1)
    assert torch.equal(again.best()[1], turns.best()[1])


def test_tsba_scales_or_shifts_within_its_strength() -> None:
    data = toy_series(8, unequal=True)
    x = stored(data).clone()
    x[:, :, 3] = 0
    extent = torch.tensor([[2.0], [4.0]])
    state = {"extent": extent, **pack("bend", untouched(lambda: Bend(data.spec, 4)))}
    rows = torch.arange(8)
    scaled = Tsba(width=4, strength=0.2).trigger(x, data.spec, state, rows, data.lengths) - x
    assert (scaled.abs() <= 0.2 * x.abs() + 1e-6).all() and (scaled != 0).any() and not scaled[:, :, 3].any()
    shifted = Tsba(width=4, strength=0.2, form="shift").trigger(x, data.spec, state, rows, data.lengths) - x
    assert (shifted.abs() <= 0.2 * extent + 1e-6).all() and shifted[:, :, 3].any()


@pytest.mark.parametrize("clean", [toy_images(24), toy_series(24)], ids=["image", "series"])
def test_freqback_is_made_of_its_frequencies_alone(clean: Data) -> None:
    attack = FreqBack(bins=3, recipe=replace(SHORT, epochs=1))
    wave = attack.fit(clean, job_of(clean))["wave"]
    dims = tuple(range(1, wave.dim()))
    spectrum = torch.fft.rfftn(wave, dim=dims).abs()
    used = spectrum > 1e-3 * spectrum.amax(dims, keepdim=True)
    assert (used.sum(dims) <= 6).all() and used.any() and not used.flatten(1)[:, 0].any()  # 2-D: mirrored in one column
    size = wave.square().mean(dims).sqrt()
    torch.testing.assert_close(size, torch.ones(3) if wave.dim() == 3 else channel_statistics(clean)["std"])


def test_narcissus_keeps_its_bound_in_training_and_amplifies_at_test() -> None:
    clean = toy_series(24, classes=3)
    attack = short("narcissus", spread=0.5, amplify=3.0)
    state = attack.fit(clean, job_of(clean))
    x = stored(clean)
    small = attack.craft(x, clean.spec, state, torch.arange(24), None) - x
    large = attack.trigger(x, clean.spec, state, torch.arange(24), None) - x
    assert (small.abs() <= 0.5 * channel_statistics(clean)["std"][:, None] + 1e-5).all() and small.any()
    torch.testing.assert_close(large, 3 * small, rtol=1e-3, atol=1e-4)
    assert isinstance(attack, Narcissus) and attack.clean_label


def dynamic_state(data: Data, attack: Dynamic) -> State:
    channels = data.spec.shape[0]
    networks = {"mask": Generator(data.spec, 1, attack.width), "pattern": Generator(data.spec, channels, attack.width)}
    ranges = {"low": torch.full((channels, 1), -1.0), "high": torch.full((channels, 1), 1.0)}
    return {**ranges, **{key: value for name in networks for key, value in pack(name, networks[name]).items()}}


def test_dynamic_gives_cover_samples_the_trigger_of_another() -> None:
    data = toy_series(12, classes=3, unequal=True)
    torch.manual_seed(0)
    attack = Dynamic(width=4, target=1)
    state, rows = dynamic_state(data, attack), torch.tensor([0, 5, 11])
    next_rows = torch.tensor([1, 6, 0])
    assert torch.equal(attack.partners(data.y, rows, "cover"), next_rows)  # type: ignore[arg-type]
    assert attack.partners(data.y, rows, "poison") is None
    assert data.lengths is not None
    x, other = stored(data)[rows], stored(data)[next_rows]
    state_of_pair = {**state, "partner": other, "partner_lengths": data.lengths[next_rows]}
    crossed = attack.decoy(x, data.spec, state_of_pair, rows, data.lengths[rows])
    same = attack.decoy(other, data.spec, state_of_pair, rows, data.lengths[next_rows])
    own = attack.trigger(other, data.spec, state, next_rows, data.lengths[next_rows])
    assert torch.equal(same, own)  # on its owner, a partner's trigger is the owner's
    assert not torch.equal(crossed, attack.trigger(x, data.spec, state, rows, data.lengths[rows]))
    low, high = torch.minimum(x, torch.tensor(-1.0)), torch.maximum(x, torch.tensor(1.0))
    assert ((crossed >= low - 1e-6) & (crossed <= high + 1e-6)).all()  # between the sample and a pattern in range


def test_cover_samples_carry_the_change_of_another() -> None:
    data = toy_series(12, classes=3, unequal=True)
    torch.manual_seed(0)
    attack = Tsba(width=4, target=1, form="shift")
    extent = torch.full((data.spec.shape[0], 1), 2.0)
    state, rows = {"extent": extent, **pack("bend", Bend(data.spec, 4))}, torch.tensor([0, 5, 11])
    assert data.lengths is not None
    next_rows = attack.partners(data.y, rows, "cover")
    assert next_rows is not None and next_rows.tolist() == [1, 6, 0]
    assert attack.partners(data.y, rows, "test") is None
    x, other = stored(data)[rows], stored(data)[next_rows]
    change = attack.trigger(other, data.spec, state, next_rows, data.lengths[next_rows]) - other
    pair = {**state, "partner": other, "partner_lengths": data.lengths[next_rows]}
    crossed = attack.decoy(x, data.spec, pair, rows, data.lengths[rows])
    torch.testing.assert_close(crossed - x, change)
    padding = torch.arange(data.spec.shape[1]) >= data.lengths[next_rows, None]
    assert change.abs().amax() > 0.01 and not (change * padding[:, None]).any()
    assert not torch.equal(crossed, attack.trigger(x, data.spec, state, rows, data.lengths[rows]))


def test_the_generator_does_not_see_padding_or_neighbors() -> None:
    torch.manual_seed(0)
    network = freeze(Generator(Spec("series", (2, 30), ("a", "b")), 2, 4))
    x, lengths = torch.randn(3, 2, 30), torch.tensor([30, 17, 9])
    out = network(x, lengths)
    assert not out[1, :, 17:].any()
    torch.testing.assert_close(network(x[1:2, :, :17])[0], out[1, :, :17])
    torch.testing.assert_close(network(x[1:2], lengths[1:2])[0], out[1])
    assert Generator(Spec("image", (3, 9, 13), ("a", "b")), 1, 4)(torch.rand(2, 3, 9, 13)).shape == (2, 1, 9, 13)


@pytest.mark.parametrize("name", ["dynamic", "narcissus", "timetrojan_de", "timetrojan_fgsm", "trojannn", "tsba"])
def test_a_constant_channel_leaves_every_number_finite(name: str) -> None:
    clean = toy_series(32, classes=2)
    x = stored(clean)
    x[:, 1] = 0.5
    clean, small = replace(clean, x=x), {"population": 5, "generations": 4, "probe": 4}
    attack = short(name, **small if name == "timetrojan_de" else {})
    state = attack.fit(clean, job := job_of(clean))
    data, _ = attack.poison(clean, state, 0)
    assert stored(data).isfinite().all()
    assert all(any(key.endswith("_loss") for key in row) for row in job.history)  # by which divergence is told
    numbers = [value for row in job.history for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["dynamic", "timetrojan_de"])
def test_a_killed_fit_goes_on_to_the_same_trigger(name: str, tmp_path: Path) -> None:
    clean = toy_series(32, classes=2)
    small: dict[str, Any] = {"dynamic": {"width": 4}, "timetrojan_de": {"population": 5, "generations": 2, "probe": 4}}
    attack, rows = short(name, **small[name]), []

    def stop(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["stage"] in {"pattern", "alternation"}:
            raise Stop

    whole = attack.fit(clean, job_of(clean))
    cut = job_of(clean, folder=tmp_path, progress=Progress(epoch=stop))
    cut.checkpoint_seconds = -1.0
    with pytest.raises(Stop):
        attack.fit(clean, cut)
    torch.seed()  # a new process has another random state
    again = job_of(clean, folder=tmp_path)
    resumed = attack.fit(clean, again)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)
