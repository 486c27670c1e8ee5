from __future__ import annotations

import json
import math

import pytest
import torch

from antibackdoor.attacks.badnets import BadNets
from antibackdoor.bench.stealth import ssim, stealth_measures
from antibackdoor.data.core import Data, Spec
from toy import toy_images


def data(x: torch.Tensor, spec: Spec) -> Data:
    return Data(x, torch.arange(len(x)) % 2, spec, [str(k) for k in range(len(x))])


def test_images_by_hand() -> None:
    spec = Spec("image", (1, 2, 2), ("a", "b"))
    old = torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)  # 0.2
    new = old.clone()
    new[0, 0, 0, 0] = 102  # by 0.2
    new[1] = 0
    got = stealth_measures(data(old, spec), data(new, spec), torch.arange(3))
    assert {measure["n"] for measure in got.values()} == {2}  # the third is as it was
    assert got["psnr"]["value"] == pytest.approx((10 * math.log10(4 / 0.04) + 10 * math.log10(1 / 0.04)) / 2, abs=1e-4)
    assert got["relative_l2"]["value"] == pytest.approx((0.5 + 1) / 2, abs=1e-6)
    assert got["max_deviation"]["value"] == pytest.approx(0.2, abs=1e-6)


def test_series_by_hand() -> None:
    spec = Spec("series", (1, 4), ("a", "b"), -2, 2)
    old = torch.tensor([[[3.0, 0, 0, 4]], [[1.0, 1, 1, 1]]])
    new = old + torch.tensor([[[0.0, 1, 0, 0]], [[0.0, 0, 0, 0]]])
    got = stealth_measures(data(old, spec), data(new, spec), torch.tensor([0]))
    assert got == {"relative_l2": {"value": pytest.approx(0.2), "n": 1}, "max_deviation": {"value": 0.25, "n": 1}}


def test_where_all_values_are_equal_the_deviation_is_absolute() -> None:
    spec = Spec("series", (1, 2), ("a", "b"), 3, 3)
    old = torch.full((1, 1, 2), 3.0)
    got = stealth_measures(data(old, spec), data(old + torch.tensor([0.0, 0.5]), spec), torch.tensor([0]))
    assert got["max_deviation"] == {"value": 0.5, "n": 1}


def test_of_much_poison_some_are_compared_from_its_first_to_its_last() -> None:
    """5,000 samples of 1, changed by their number over 5,000: the mean of evenly spread ones is that of all."""
    spec = Spec("series", (1, 1), ("a", "b"), 0, 2)
    old = torch.ones(5001, 1, 1)
    new = old + torch.arange(5001).view(-1, 1, 1) / 5000
    got = stealth_measures(data(old, spec), data(new, spec), torch.arange(1, 5001))
    assert got["relative_l2"] == {"value": pytest.approx(0.5, abs=1e-3), "n": 2048}
    few = stealth_measures(data(old, spec), data(new, spec), torch.tensor([1000, 2000, 4500]))
    assert few["relative_l2"] == {"value": pytest.approx(0.5), "n": 3}


def test_nothing_poisoned_can_be_written_as_json() -> None:
    clean = toy_images(8)
    got = stealth_measures(clean, clean, torch.arange(4))
    assert got["psnr"] == {"value": None, "n": 0}
    json.dumps(got, allow_nan=False)


def test_ssim_of_flat_images_and_of_equal_ones() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    grey, other = torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), 0.25)
    want = (2 * 0.5 * 0.25 + 1e-4) / (0.25 + 0.0625 + 1e-4)  # the rest of the formula is c2 / c2
    torch.testing.assert_close(ssim(grey, other), torch.tensor([want]), atol=1e-4, rtol=0)
    assert ssim(x, x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).max() < 0.99
    assert ssim(x[..., :3, :2], x[..., :3, :2]).tolist() == pytest.approx([1, 1])  # smaller than the window


def test_ssim_of_dark_flat_images_by_hand() -> None:
    black, dark = torch.zeros(1, 1, 12, 12), torch.full((1, 1, 12, 12), 0.01)
    torch.testing.assert_close(ssim(black, dark), torch.tensor([0.5]), atol=1e-4, rtol=0)  # c1 / (c1 + c1)


@pytest.mark.parametrize(("height", "broad", "width"), [(7, 9, 7), (10, 8, 7), (13, 14, 11)])
def test_ssim_by_the_formula_pixel_by_pixel(height: int, broad: int, width: int) -> None:
    rng, half = torch.Generator().manual_seed(2), width // 2
    one, two = (torch.rand(1, 1, height, broad, generator=rng, dtype=torch.float64) for _ in range(2))
    line = torch.tensor([math.exp(-((k - half) ** 2) / (2 * 1.5 * 1.5)) for k in range(width)], dtype=torch.float64)
    window = torch.outer(line, line) / line.sum() ** 2
    first, second = (torch.nn.functional.pad(x, [half] * 4, mode="reflect")[0, 0] for x in (one, two))
    found = []
    for i in range(height):
        for j in range(broad):
            a, b = first[i : i + width, j : j + width], second[i : i + width, j : j + width]
            m1, m2 = float((window * a).sum()), float((window * b).sum())
            s1, s2 = float((window * (a - m1) ** 2).sum()), float((window * (b - m2) ** 2).sum())
            s12 = float((window * (a - m1) * (b - m2)).sum())
            top = (2 * m1 * m2 + 1e-4) * (2 * s12 + 9e-4)
            found.append(top / ((m1 * m1 + m2 * m2 + 1e-4) * (s1 + s2 + 9e-4)))
    assert float(ssim(one.float(), two.float())) == pytest.approx(sum(found) / len(found), abs=1e-5)


def test_a_small_patch_is_harder_to_see_than_a_large_one() -> None:
    clean = toy_images(80)
    small, large = (BadNets(size=size).poison(clean, {}, 0) for size in (2, 6))
    first, second = (stealth_measures(clean, d, t.poisoned.nonzero().flatten()) for d, t in (small, large))
    assert first["psnr"]["value"] > second["psnr"]["value"] and first["ssim"]["value"] > second["ssim"]["value"]
    assert first["relative_l2"]["value"] < second["relative_l2"]["value"]


def test_a_patch_in_the_corner_counts() -> None:
    old, corner, middle = (torch.full((1, 1, 32, 32), 0.5) for _ in range(3))
    corner[..., -3:, -3:], middle[..., 14:17, 14:17] = 1, 1
    assert 0.9 < float(ssim(old, corner)) < 0.99 and float(ssim(old, middle)) < 0.96
