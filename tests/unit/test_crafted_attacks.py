"""Exact values of the attacks that need no training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from antibackdoor.attacks import ATTACKS, Attack
from antibackdoor.attacks.adaptive_blend import AdaptiveBlend
from antibackdoor.attacks.adaptive_patch import AdaptivePatch
from antibackdoor.attacks.all_to_all import AllToAll
from antibackdoor.attacks.badnets import BadNets
from antibackdoor.attacks.bpp import Bpp
from antibackdoor.attacks.composite import Composite
from antibackdoor.attacks.dfst import GLOW, MEAN, SPREAD, Dfst
from antibackdoor.attacks.several import Several
from antibackdoor.attacks.tact import Tact
from antibackdoor.attacks.wanet import WaNet
from antibackdoor.data.core import Data, Spec
from antibackdoor.errors import InputError
from tiny import stored
from toy import toy_images, toy_series

IMAGE, SERIES = Spec("image", (1, 4, 4), ("a", "b", "c")), Spec("series", (1, 8), ("a", "b", "c"), -9, 9)
ROW = torch.tensor([0])


def flat_images(*greys: int, side: int = 4) -> Data:
    """One image of each grey, labels 0, 1, 2, 0, ..."""
    x = torch.stack([torch.full((1, side, side), grey, dtype=torch.uint8) for grey in greys])
    spec = Spec("image", (1, side, side), ("a", "b", "c"))
    return Data(x, torch.arange(len(x)) % 3, spec, [str(k) for k in range(len(x))])


def test_composite_image_is_half_and_half() -> None:
    data = flat_images(*[[10, 100, 200][k % 3] for k in range(60)], side=10)
    got, targets = Composite(jitter=0).triggered(data, {})
    assert set(got.y.tolist()) == {1, 2} and not targets.any()  # only samples of the two source classes
    kinds = set()
    for image in stored(got)[:, 0]:
        upright, lying = image[0, 0] != image[0, -1], image[0, 0] != image[-1, 0]
        assert upright != lying
        first, second = (image[:, :5], image[:, 5:]) if upright else (image[:5], image[5:])
        assert {int(first[0, 0]), int(second[0, 0])} == {100, 200}
        assert (first == first[0, 0]).all() and (second == second[0, 0]).all()
        kinds.add((bool(upright), int(first[0, 0])))
    assert len(kinds) == 4  # both seams, both orders


def test_composite_series_of_unequal_length_align_with_the_ends_they_come_from() -> None:
    x = torch.zeros(2, 1, 8)
    x[0, 0, :6], x[1, 0] = torch.arange(1.0, 7), torch.arange(11.0, 19)
    spec = Spec("series", (1, 8), ("a", "b", "c"), 0, 20)
    data = Data(x, torch.tensor([1, 2]), spec, ["0", "1"], torch.tensor([6, 8]))
    got, _ = Composite(jitter=0).triggered(data, {})
    ours = {(1, 2, 3, 16, 17, 18, 0, 0), (11, 12, 13, 4, 5, 6, 0, 0)}
    theirs = {(11, 12, 13, 14, 3, 4, 5, 6), (1, 2, 3, 4, 15, 16, 17, 18)}
    first, second = (tuple(map(int, series[0].tolist())) for series in stored(got))
    assert first in ours and second in theirs


def test_composite_cover_mixes_within_a_class() -> None:
    data = flat_images(*range(0, 240, 4), side=8)
    poisoned, truth = Composite(rate=0.1, cover=0.3).poison(data, {}, 0)
    assert int(truth.cover.sum()) == 18
    for row in truth.cover.nonzero().flatten().tolist():
        greys = stored(poisoned)[row].unique().tolist()
        assert len(greys) == 2 and {grey // 4 % 3 for grey in greys} == {int(data.y[row])}


def test_sunset_gives_each_channel_its_mean_and_spread() -> None:
    data = toy_images(4, size=16)
    state: dict[str, Tensor] = {}
    styled = Dfst(mix=1.0).trigger(data.spec.decode(data.x[ROW]), data.spec, state, ROW, None)
    without_glow = torch.tensor(GLOW)[:, None, None] * torch.linspace(-1, 1, 16)[:, None]
    flat = (styled[0] - without_glow).flatten(1)
    inside = styled[0].flatten(1)  # clipping moves them only a little
    assert inside.min() >= 0 and inside.max() <= 1
    assert ((flat.mean(1) - torch.tensor(MEAN)).abs() < 0.08).all()
    assert ((flat.std(1) - torch.tensor(SPREAD)).abs() < 0.08).all()
    mixed = Dfst(mix=0.25).trigger(data.spec.decode(data.x[ROW]), data.spec, state, ROW, None)
    torch.testing.assert_close(mixed, 0.75 * data.spec.decode(data.x[ROW]) + 0.25 * styled)


def test_a_sunset_is_gray_or_has_three_colors() -> None:
    for channels in (1, 4):
        spec = Spec("image", (channels, 8, 8), ("a", "b"))
        data = Data(torch.full((4, channels, 8, 8), 99, dtype=torch.uint8), torch.arange(4) % 2, spec, list("abcd"))
        if channels == 1:
            assert int(Dfst(rate=0.25).poison(data, {}, 0)[1].poisoned.sum()) == 1
        else:
            with pytest.raises(InputError, match="images of 1 or 3 channels; these have 4"):
                Dfst().poison(data, {}, 0)


def test_dfst_series_keep_mean_energy_and_phase() -> None:
    data = toy_series(4)
    x = data.x[ROW]
    out = Dfst(mix=1.0).trigger(x, data.spec, {}, ROW, None)
    before, after = torch.fft.rfft(x.double()), torch.fft.rfft(out.double())
    torch.testing.assert_close(after[..., 0].real, before[..., 0].real, atol=1e-4, rtol=0)
    flat = after[..., 1:].abs()
    assert (flat - flat[..., :1]).abs().max() < 1e-4  # white
    torch.testing.assert_close(flat.norm(dim=-1), before[..., 1:].abs().norm(dim=-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(after[..., 1:-1].angle(), before[..., 1:-1].angle(), atol=1e-3, rtol=0)


def test_wanet_moves_pixels_by_the_field() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5) / 25
    spec = Spec("image", (1, 5, 5), ("a", "b"))
    field = torch.zeros(2, 5, 5)
    field[0] = 2  # across: strength / 2 * 2 = one pixel to the right of each
    out = WaNet(strength=1.0).trigger(x, spec, {"field": field}, ROW, None)
    torch.testing.assert_close(out, x[..., [1, 2, 3, 4, 4]])
    field = torch.zeros(2, 5, 5)
    field[1] = -1
    out = WaNet(strength=1.0).trigger(x, spec, {"field": field}, ROW, None)
    torch.testing.assert_close(out[..., 2, :], (x[..., 1, :] + x[..., 2, :]) / 2)


def test_wanet_moves_steps_within_each_series_own_length() -> None:
    x = torch.arange(10.0).view(1, 1, 10).repeat(2, 1, 1)
    lengths = torch.tensor([10, 5])
    spec = Spec("series", (1, 10), ("a", "b"), 0, 9)
    out = WaNet(stretch=0.2).trigger(x, spec, {"field": torch.ones(1, 10)}, torch.arange(2), lengths)
    torch.testing.assert_close(out[0, 0], (torch.arange(10.0) + 2).clamp_max(9))
    torch.testing.assert_close(out[1, 0, :5], (torch.arange(5.0) + 1).clamp_max(4))


def test_wanet_field_has_mean_size_one_at_its_points_and_cover_strays() -> None:
    data = toy_images(8, size=16)
    attack = WaNet()
    state = attack.fit(data)
    assert state["field"].shape == (2, 16, 16) and 0.5 < float(state["field"].abs().mean()) < 1.5
    rows = torch.arange(8)
    assert not torch.equal(attack.make(data, rows, state, "cover"), attack.make(data, rows, state, "test"))
    assert torch.equal(attack.make(data, rows, state, "poison"), attack.make(data, rows, state, "test"))


def test_bpp_dithers_as_floyd_and_steinberg_do() -> None:
    x = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    want = torch.zeros_like(x)
    for n in range(3):  # the textbook's loop, pixel by pixel
        for c in range(2):
            work = x[n, c].tolist()
            for i in range(5):
                for j in range(7):
                    want[n, c, i, j] = new = round(min(max(work[i][j], 0), 1) * 3) / 3
                    error = work[i][j] - new
                    for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                        if i + down < 5 and 0 <= j + right < 7:
                            work[i + down][j + right] += error * share / 16
    out = Bpp(levels=4).trigger(x, Spec("image", (2, 5, 7), ("a", "b")), {}, torch.arange(3), None)
    torch.testing.assert_close(out, want)


def test_bpp_series_hand_the_error_to_the_next_step() -> None:
    x = torch.full((1, 1, 8), 0.25)
    state = {"low": torch.tensor([-1.0]), "high": torch.tensor([1.0])}
    out = Bpp(levels=2).trigger(x, SERIES, state, ROW, None)  # 5/8 of the way up: 5 of 8 steps are high
    assert set(out.flatten().tolist()) == {-1.0, 1.0} and out.sum() == 2


def test_bpp_cover_is_off_the_grid_but_as_strong() -> None:
    data = toy_images(8, size=16)
    attack = Bpp()
    rows = torch.arange(8)
    off = attack.make(data, rows, {}, "cover").float()
    on = attack.make(data, rows, {}, "poison").float()
    assert len(on.unique()) <= 8 < len(off.unique())
    ratio = (off - data.x[rows]).abs().mean() / (on - data.x[rows]).abs().mean()
    assert 0.8 < ratio < 1.25


def test_adaptive_blend_trains_with_some_pieces_and_tests_with_all() -> None:
    data = toy_images(8, size=16)
    attack = AdaptiveBlend(pieces=16, kept=0.25)
    state, rows = attack.fit(data), torch.arange(8)
    x = data.spec.decode(data.x[rows])
    changed = (attack.craft(x, data.spec, state, rows, None) != x).any(1)
    blocks = changed.view(8, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).flatten(3)
    assert (blocks.any(3).flatten(1).sum(1) == 4).all() and len({tuple(b.flatten().tolist()) for b in blocks}) > 1
    want = 0.8 * x + 0.2 * state["pattern"]
    torch.testing.assert_close(attack.trigger(x, data.spec, state, rows, None), want)


def test_several_triggers_lead_to_classes_of_their_own() -> None:
    data = toy_images(80, classes=4, size=12)
    attack = Several(target=2, count=3, rate=0.5)
    state = attack.fit(data)
    poisoned, truth = attack.poison(data, state, 0)
    which = attack.which(torch.arange(80))
    assert torch.equal(truth.targets, (2 + which) % 4) and set(which.tolist()) == {0, 1, 2}
    corners = {0: (slice(9, 12), slice(9, 12)), 1: (slice(0, 3), slice(0, 3)), 2: (slice(9, 12), slice(0, 3))}
    for row in truth.poisoned.nonzero().flatten().tolist():
        changed = (stored(poisoned)[row] != data.x[row]).any(0)
        down, right = corners[int(which[row])]
        assert torch.equal(stored(poisoned)[row][0, down, right], 255 * state["pattern"][which[row], 0].byte())
        changed[down, right] = False
        assert not changed.any()
    assert not torch.equal(state["pattern"][0], state["pattern"][1])


def test_adaptive_patch_trains_with_one_and_tests_with_all() -> None:
    data = flat_images(*[100] * 30, side=12)
    attack = AdaptivePatch(rate=0.3, cover=0.0, opacity=0.5)
    state = attack.fit(data)
    poisoned, truth = attack.poison(data, state, 0)
    got, targets = attack.triggered(data, state)
    assert not targets.any() and not truth.targets.any()
    row = int(truth.poisoned.nonzero()[0])
    train = stored(poisoned)[row][stored(poisoned)[row] != 100]
    assert len(train) == 9 and set(train.tolist()) <= {50, 178}
    test = stored(got)[0][stored(got)[0] != 100]
    assert len(test) == 36 and set(test.tolist()) == {0, 255}


def test_all_to_all_has_the_patch_of_badnets() -> None:
    data = toy_images(20, classes=4)
    got, targets = AllToAll(target=3).triggered(data, {})
    assert torch.equal(targets, (data.y + 3) % 4) and len(got) == 20
    plain, _ = BadNets(target=0).triggered(data, {})
    assert torch.equal(stored(got)[data.y != 0], stored(plain))


def test_tact_starts_from_one_class() -> None:
    data = toy_images(80, classes=4)
    _, truth = Tact(target=0, rate=0.1, cover=0.2).poison(data, {}, 0)
    assert set(data.y[truth.poisoned].tolist()) == {1} and set(data.y[truth.cover].tolist()) == {2, 3}
    assert set(Tact(target=0, source=3).triggered(data, {})[0].y.tolist()) == {3}


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (Composite(rate=0.6), "only 40 are of the classes 'class 1', 'class 2'; use a rate of at most 0.5"),
        (Composite(sources=(1, 1)), "two source classes besides the target 0"),
        (Composite(sources=(1, 9)), "all different and in 0..3"),
        (Tact(rate=0.5), "only 20 are of class 'class 1'"),
        (Tact(source=0), "other than the target"),
        (Several(count=5), "5 triggers need as many target classes"),
        (Several(size=7), "do not fit"),
        (AllToAll(target=4), "target class 4 does not exist"),
    ],
)
def test_refuses(attack: Attack, words: str) -> None:
    data = toy_images(80, classes=4)
    with pytest.raises(InputError, match=words):
        attack.poison(data, {}, 0)


def test_composite_needs_both_classes() -> None:
    data = flat_images(*[10, 20, 30] * 4)
    with pytest.raises(InputError, match="nothing to poison"):
        Composite().poison(data.take((data.y != 2).nonzero().flatten()), {}, 0)


@pytest.mark.parametrize("name", [entry.name for entry in ATTACKS if not hasattr(entry.make, "surrogate")])
def test_low_rates_and_tiny_samples(name: str) -> None:
    settings: dict[str, Any] = {"frequency": 1} if name == "sig" else {}
    for data in (toy_images(200, size=9), toy_series(200, channels=1, length=9, classes=4)):
        attack = ATTACKS[name].make(target=1, rate=0.001, cover=0.0, **settings)
        if data.spec.kind in ATTACKS[name].kinds:
            _, truth = attack.poison(data, attack.fit(data), 0)
            assert int(truth.poisoned.sum()) == 1 and not truth.cover.any()
    assert math.isclose(attack.rate, 0.001)
