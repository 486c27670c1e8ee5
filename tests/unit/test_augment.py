from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from antibackdoor.data import augment
from antibackdoor.data.augment import AUGMENTATIONS, strong, weak
from antibackdoor.data.core import Spec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(n: int = 6, c: int = 3, h: int = 16, w: int = 24) -> tuple[torch.Tensor, Spec]:
    return torch.rand(n, c, h, w, generator=seeded(1)), Spec("image", (c, h, w), ("a", "b"))


def series(n: int = 6, c: int = 2, t: int = 40) -> tuple[torch.Tensor, Spec, torch.Tensor]:
    lengths = torch.randint(1, t + 1, (n,), generator=seeded(2))
    x = torch.randn(n, c, t, generator=seeded(1))
    return x.masked_fill(torch.arange(t) >= lengths[:, None, None], 0), Spec("series", (c, t), ("a", "b")), lengths


def shifts(x: torch.Tensor) -> list[torch.Tensor]:
    """All results that shifting and mirroring one image (C, H, W) may give."""
    h, w = x.shape[1:]
    padded = F.pad(x, (w // 8, w // 8, h // 8, h // 8))
    crops = [padded[:, i : i + h, j : j + w] for i in range(2 * (h // 8) + 1) for j in range(2 * (w // 8) + 1)]
    return crops + [crop.flip(2) for crop in crops]


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_images_that_mean_something_else_mirrored_are_not(name: str) -> None:
    x, spec = image()
    plain, never = (AUGMENTATIONS[name](x, s, seeded(3)) for s in (spec, replace(spec, mirror=False)))
    same = AUGMENTATIONS[name](x, spec, seeded(3), flip=False)
    assert torch.equal(never, same) and not torch.equal(never, plain)


def test_weak_crop_equals_a_loop_over_rows():
    x, spec = image()
    out = weak(x, spec, seeded(3))
    g = seeded(3)
    top, left, mirrored = (torch.randint(0, high, (len(x), 1), generator=g).squeeze(1) for high in (5, 7, 2))
    padded = F.pad(x, (3, 3, 2, 2))
    for i in range(len(x)):
        want = padded[i, :, top[i] : top[i] + 16, left[i] : left[i] + 24]
        assert torch.equal(out[i], want.flip(2) if mirrored[i] else want)


def test_every_weak_image_is_a_shift_or_its_mirror_and_both_occur():
    x, spec = image(n=32, c=1, h=8, w=8)
    out = weak(x, spec, seeded())
    which = [next(k for k, s in enumerate(shifts(x[i])) if torch.equal(out[i], s)) for i in range(32)]
    assert min(which) < 9 <= max(which)
    assert len(set(which)) > 5


def test_no_mirror_unless_wanted():
    x, spec = image(n=32, c=1, h=8, w=8)
    out = weak(x, spec, seeded(), flip=False)
    assert all(any(torch.equal(out[i], s) for s in shifts(x[i])[:9]) for i in range(32))


def test_cutout_blanks_one_square():
    out = augment._cutout(torch.ones(50, 2, 8, 12), seeded())
    assert torch.equal(out[:, 0], out[:, 1])
    holes = 96 - out[:, 0].sum((1, 2))
    assert holes.max() == 24  # a whole square of 4 x 6
    assert holes.min() >= 2 * 3  # never more than about half of it sticks out on each axis
    assert set(out.unique().tolist()) == {0, 1}


def test_neutral_strengths_change_nothing():
    x, _ = image()
    off = torch.zeros(6, 13, dtype=torch.bool)
    torch.testing.assert_close(augment._recolor(x, off[:, :8], seeded()), x)
    torch.testing.assert_close(augment._move(x, off[:, 8:], seeded()), x, rtol=0, atol=1e-5)


def test_each_row_draws_two():
    assert augment._pick(100, 14, 2, seeded(), torch.ones(1)).sum(1).tolist() == [2] * 100
    assert augment._pick(200, 14, 2, seeded(), torch.ones(1)).any(0).all()


@pytest.mark.parametrize("which", range(8))
def test_every_color_change_acts_on_its_rows_only(which):
    x, _ = image()
    x = 0.1 + 0.9 * x  # leaves something for auto contrast to do
    chosen = torch.zeros(6, 8, dtype=torch.bool)
    chosen[::2, which] = True
    out = augment._recolor(x, chosen, seeded())
    assert [not torch.allclose(a, b, atol=1e-4) for a, b in zip(out, x, strict=True)] == [True, False] * 3


@pytest.mark.parametrize("which", range(5))
def test_every_move_acts_on_its_rows_only(which):
    x, _ = image()
    chosen = torch.zeros(6, 5, dtype=torch.bool)
    chosen[::2, which] = True
    out = augment._move(x, chosen, seeded())
    assert [not torch.allclose(a, b, atol=1e-4) for a, b in zip(out, x, strict=True)] == [True, False] * 3


def test_a_rotation_keeps_its_shape_on_an_oblong_image(monkeypatch):
    monkeypatch.setattr(augment, "_uniform", lambda shape, low, high, g, like: torch.full(shape, torch.pi / 2))
    x = torch.zeros(1, 1, 9, 15)
    x[0, 0, 4, 4:11] = 1  # a bar of 7 pixels through the middle
    out = augment._move(x, torch.tensor([[True, False, False, False, False]]), seeded())
    want = torch.zeros(9, 15)
    want[1:8, 7] = 1
    torch.testing.assert_close(out[0, 0], want, rtol=0, atol=1e-5)


def test_resample_interpolates_and_holds_the_ends():
    x = torch.tensor([[[0.0, 10.0, 20.0, 0.0]]])
    positions = torch.tensor([[-1.0, 0.5, 1.25, 9.0]])
    full = augment._resample(x, positions, torch.tensor([[4]]))
    assert full.tolist() == [[[0.0, 5.0, 12.5, 0.0]]]
    short = augment._resample(x, torch.tensor([[-1.0, 0.5, 9.0, 9.0]]), torch.tensor([[3]]))
    assert short.tolist() == [[[0.0, 5.0, 20.0, 0.0]]]


def test_spread_counts_data_only():
    x, _, lengths = series()
    got = augment._spread(x, lengths[:, None])
    for i, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[i, :, 0], x[i, :, :length].std(1, correction=0), rtol=1e-4, atol=1e-6)


def test_time_warp_keeps_order_and_ends(monkeypatch):
    warp_only = torch.tensor([False, False, False, True, False, False, False])
    monkeypatch.setattr(augment, "_pick", lambda n, *rest: warp_only.expand(n, 7))
    x = torch.arange(40.0).expand(8, 1, 40).clone()
    out = augment._distort(x, torch.full((8, 1), 40), seeded())
    assert (out.diff(dim=2) > 0).all()
    torch.testing.assert_close(out[:, :, [0, -1]], x[:, :, [0, -1]])
    assert not torch.allclose(out, x, atol=0.5)


def test_a_lost_channel_leaves_the_others(monkeypatch):
    drop_only = torch.tensor([False] * 6 + [True])
    monkeypatch.setattr(augment, "_pick", lambda n, *rest: drop_only.expand(n, 7))
    x = torch.randn(20, 3, 10)
    lost = ~augment._distort(x, torch.full((20, 1), 10), seeded()).any(2)
    assert lost.sum(1).tolist() == [1] * 20
    assert augment._distort(x[:, :1], torch.full((20, 1), 10), seeded()).any(2).all()


def test_equalize_makes_all_levels_equally_frequent():
    x = torch.arange(64.0).view(1, 1, 8, 8) / 255  # 64 dark levels
    out = augment._equalized(x)
    torch.testing.assert_close(out.flatten(), torch.arange(64.0) / 63)
    flat = torch.full((1, 2, 8, 8), 0.3)
    torch.testing.assert_close(augment._equalized(flat), flat)


def test_auto_contrast_uses_the_whole_range_of_each_channel():
    x = 0.3 + 0.2 * torch.rand(2, 3, 8, 8, generator=seeded())
    out = augment._recolor(x, torch.tensor([[True] + [False] * 7]).expand(2, 8), seeded())
    torch.testing.assert_close(out.amin((2, 3)), torch.zeros(2, 3))
    torch.testing.assert_close(out.amax((2, 3)), torch.ones(2, 3))


def test_a_hole_in_time_takes_its_share_of_the_row_and_not_of_the_padding(monkeypatch):
    hole_only = torch.tensor([False] * 5 + [True, False])
    monkeypatch.setattr(augment, "_pick", lambda n, *rest: hole_only.expand(n, 7))
    count = torch.tensor([[40], [20], [10]])
    x = torch.ones(3, 2, 40).masked_fill(torch.arange(40) >= count[:, :, None], 0)
    out = augment._distort(x, count, seeded())
    assert torch.equal(out[:, 0], out[:, 1])
    assert (x - out)[:, 0].sum(1).tolist() == [8, 4, 2]


@pytest.mark.parametrize("kind", ["image", "series"])
def test_strong_grows_with_its_numbers(kind):
    x, spec, lengths = series(n=64) if kind == "series" else (*image(n=64), None)

    def change(**numbers):
        return float((strong(x, spec, seeded(), lengths, flip=False, **numbers) - x).abs().mean())

    assert change(magnitude=0.1, hole=0) < change(magnitude=1, hole=0) < change(magnitude=1, operations=5, hole=0)
    assert change(hole=0) < change(hole=0.8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("kind", ["image", "series"])
def test_pure_and_reproducible(name, kind):
    x, spec, lengths = series() if kind == "series" else (*image(), None)
    before, transform = x.clone(), AUGMENTATIONS[name]
    first, again, other = (transform(x, spec, seeded(s), lengths) for s in (5, 5, 6))
    assert torch.equal(x, before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) is (name == "none")


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 4), c=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_images_keep_shape_and_range(n, c, h, w, seed):
    x, spec = image(n, c, h, w)
    for transform in (weak, strong):
        out = transform(x, spec, seeded(seed))
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert 0 <= out.min() <= out.max() <= 1


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 4), c=st.integers(1, 3), t=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_series_keep_shape_and_padding(n, c, t, seed):
    x, spec, lengths = series(n, c, t)
    padding = (torch.arange(t) >= lengths[:, None, None]).expand_as(x)
    for transform in (weak, strong):
        out = transform(x, spec, seeded(seed), lengths)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert out.isfinite().all()
        assert not out[padding].any()
        assert transform(x, spec, seeded(seed)).isfinite().all()
