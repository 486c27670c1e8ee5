from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from antibackdoor.attacks.badnets import BadNets
from antibackdoor.attacks.base import Attack, State, channel_statistics
from antibackdoor.attacks.blend import Blend
from antibackdoor.attacks.sig import Sig
from antibackdoor.data.core import Data, Spec, Truth
from antibackdoor.data.truth import rates, read_truth, truth_table
from antibackdoor.errors import InputError
from antibackdoor.options import options
from toy import toy_images, toy_series


def images(x: Tensor) -> Data:
    """Uint8 images with labels 0, 1, 0, 1, ..."""
    return Data(
        x, torch.arange(len(x)) % 2, Spec("image", tuple(x.shape[1:]), ("a", "b")), [str(i) for i in range(len(x))]
    )


def test_badnets_changes_its_corner_only() -> None:
    data = images(torch.full((4, 1, 4, 4), 100, dtype=torch.uint8))
    out = BadNets(size=2).triggered(data, {})[0].x[torch.arange(2)]
    want = torch.full((4, 4), 100, dtype=torch.uint8)
    want[2:, 2:] = torch.tensor([[255, 0], [0, 255]])
    assert torch.equal(out, want.expand(2, 1, 4, 4))


def test_badnets_zigzag_sits_before_each_series_own_end() -> None:
    x = torch.zeros(2, 1, 10)
    lengths = torch.tensor([10, 6])
    data = Data(x, torch.tensor([1, 1]), Spec("series", (1, 10), ("a", "b"), -9, 9), ["0", "1"], lengths)
    state = {"low": torch.tensor([-1.0]), "high": torch.tensor([2.0])}
    out = BadNets().triggered(data, state)[0].x[torch.arange(2)]
    assert out[0, 0].tolist() == [0] * 7 + [2, -1, 2]  # k = 3 is the least
    assert out[1, 0].tolist() == [0] * 3 + [2, -1, 2] + [0] * 4
    wide = BadNets(share=0.5).triggered(data, state)[0].x[torch.arange(2)]
    assert (wide != 0).sum((1, 2)).tolist() == [5, 3]


def test_badnets_zigzag_on_a_series_shorter_than_it() -> None:
    data = Data(torch.zeros(2, 1, 2), torch.tensor([0, 1]), Spec("series", (1, 2), ("a", "b"), -9, 9), ["0", "1"])
    out, _ = BadNets().triggered(data, {"low": torch.tensor([-1.0]), "high": torch.tensor([2.0])})
    assert out.x[torch.arange(1)].tolist() == [[[-1.0, 2.0]]]


def test_blend_formula() -> None:
    data = toy_images(8)
    attack = Blend(alpha=0.25)
    state = attack.fit(data)
    rows = torch.tensor([1, 2, 3])
    want = (0.75 * data.x[rows].float() + 0.25 * 255 * state["pattern"]).round()
    got = attack.triggered(data, state)[0].x[torch.arange(3)].float()
    assert (got - want).abs().max() <= 1  # float rounding at a half
    assert torch.equal(state["pattern"], Blend(pattern_seed=0).fit(data)["pattern"])
    assert not torch.equal(state["pattern"], Blend(pattern_seed=1).fit(data)["pattern"])


def test_blend_pattern_of_series_has_the_spread_of_its_channel() -> None:
    data = toy_series()
    data = replace(data, x=data.x[torch.arange(len(data))] * torch.tensor([1.0, 10.0])[:, None])
    state = Blend().fit(data)
    torch.testing.assert_close(state["pattern"].std(1), channel_statistics(data)["std"])


def test_sig_columns_in_training_and_at_test() -> None:
    data = images(torch.full((4, 1, 2, 8), 100, dtype=torch.uint8))
    wave = torch.tensor([math.sin(2 * math.pi * j / 8) for j in range(8)])
    attack = Sig(frequency=1, delta=20, delta_test=40, rate=0.5)
    poisoned, truth = attack.poison(data, {}, 0)
    assert truth.poisoned.tolist() == [True, False, True, False]
    assert torch.equal(poisoned.y, data.y)
    want = (100 + 20 * wave).round().to(torch.uint8).expand(2, 1, 2, 8)
    assert torch.equal(poisoned.x[torch.tensor([0, 2])], want)
    assert torch.equal(
        attack.triggered(data, {})[0].x[torch.arange(2)][0, 0, 0], (100 + 40 * wave).round().to(torch.uint8)
    )


def test_sig_series_formula() -> None:
    data = Data(torch.zeros(2, 1, 4), torch.tensor([0, 1]), Spec("series", (1, 4), ("a", "b"), -9, 9), ["0", "1"])
    out = Sig(frequency=1, amplitude=0.5).triggered(data, {"std": torch.tensor([2.0])})[0].x[torch.arange(1)]
    torch.testing.assert_close(out, torch.tensor([[[0.0, 1.0, 0.0, -1.0]]]), atol=1e-6, rtol=0)


def test_bright_and_dark_pixels_do_not_wrap() -> None:
    wave = torch.tensor([math.sin(2 * math.pi * j / 8) for j in range(8)])
    for grey in (0, 255):
        data = images(torch.full((2, 1, 8, 8), grey, dtype=torch.uint8))
        out = Sig(frequency=1, delta=60).triggered(data, {})[0].x[torch.arange(1)].float()
        assert torch.equal(out[0, 0, 0], (grey + 60 * wave).clamp(0, 255).round())


def test_statistics_leave_padding_out() -> None:
    x = torch.tensor([[[5.0, 6.0, 0.0]], [[7.0, 0.0, 0.0]]])
    data = Data(x, torch.tensor([0, 1]), Spec("series", (1, 3), ("a", "b"), 5, 7), ["0", "1"], torch.tensor([2, 1]))
    got = channel_statistics(data)
    assert (got["low"].item(), got["high"].item(), got["std"].item()) == (5.0, 7.0, 1.0)


def test_padding_stays_zero_where_the_range_leaves_out_zero() -> None:
    x = torch.tensor([[[5.0, 6.0, 5.5, 0.0]], [[7.0, 6.0, 5.0, 0.0]]])
    data = Data(x, torch.tensor([0, 1]), Spec("series", (1, 4), ("a", "b"), 5, 7), ["0", "1"], torch.tensor([3, 3]))
    attack = Blend()
    assert attack.triggered(data, attack.fit(data))[0].x[torch.arange(1)][0, 0, 3] == 0


@pytest.mark.parametrize(
    ("attack", "data", "words"),
    [
        (BadNets(target=9), toy_images(), "target class 9 does not exist"),
        (BadNets(size=13), toy_images(), "does not fit"),
        (BadNets(rate=0.9), toy_images(), "at most 0.75"),
        (Sig(rate=0.5, frequency=2), toy_images(), "at most 0.25"),
        (Sig(frequency=6), toy_images(size=12), "is zero at every one of 12 steps"),
        (BadNets(), toy_images(classes=1), "nothing to poison"),
        (BadNets(rate=0.5, cover=0.5), toy_images(), "cover rate"),
    ],
)
def test_refuses(attack: Attack, data: Data, words: str) -> None:
    with pytest.raises(InputError, match=words):
        attack.poison(data, attack.fit(data), 0)


def test_a_rate_of_zero_is_a_control_wherever_the_attack_starts_from() -> None:
    clean = toy_images(classes=1)
    data, truth = BadNets(rate=0).poison(clean, {}, 0)
    rows = torch.arange(len(clean))
    assert torch.equal(data.x[rows], clean.x[rows]) and not (truth.poisoned | truth.cover).any()


def test_refuses_a_test_set_of_the_target_class_and_gaps() -> None:
    with pytest.raises(InputError, match="nothing to trigger"):
        BadNets().triggered(toy_images(classes=1), {})
    data = toy_series()
    x = data.x[torch.arange(len(data))].clone()
    x[1, 0, 3] = math.nan
    with pytest.raises(InputError, match="'0/1' holds NaN"):
        Blend().triggered(replace(data, x=x), Blend().fit(data))


@pytest.mark.parametrize("bad", [{"rate": -0.1}, {"rate": 1.1}, {"cover": -0.1}, {"target": -1}, {"sise": 3}])
def test_options_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        BadNets(**bad)  # type: ignore[arg-type]


@options
class Broken(Attack):
    """Breaks the contract in the way its option says."""

    how: str = "shape"

    def trigger(self, x: Tensor, spec: Spec, state: State, rows: Tensor, lengths: Tensor | None) -> Tensor:
        return {"shape": x[:, :1], "dtype": x.double(), "finite": x * math.inf}[self.how]


@pytest.mark.parametrize("how", ["shape", "dtype", "finite"])
def test_a_broken_attack_is_caught(how: str) -> None:
    with pytest.raises(RuntimeError, match="Broken"):
        Broken(how=how).triggered(toy_series(), {})


def test_truth_survives_the_table(tmp_path: Path) -> None:
    data, truth = BadNets(target=1, cover=0.05).poison(toy_images(), {}, 3)
    data = replace(data, ids=["NA", "", *data.ids[2:]])  # names that pandas would read as gaps
    table = truth_table(data, truth)
    assert list(table.columns) == ["id", "role", "label", "true_label", "target"]
    assert table["role"].value_counts().to_dict() == {"clean": 68, "poison": 8, "cover": 4}
    table.to_csv(tmp_path / "truth.csv", index=False)
    back = read_truth(tmp_path / "truth.csv", data)
    assert torch.equal(back.poisoned, truth.poisoned) and torch.equal(back.cover, truth.cover)
    assert torch.equal(back.labels, truth.labels) and (back.targets == 1).all()


@pytest.mark.parametrize(
    "damage",
    [
        {"id": "x"},
        {"role": "evil"},
        {"label": 3},
        {"true_label": 99},
        {"true_label": 1.5},
        {"true_label": "x"},
        {"target": -1},
        {"target": ""},
        {"more": 1},
    ],
)
def test_a_damaged_truth_table_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    data, truth = BadNets().poison(toy_images(), {}, 0)
    truth_table(data, truth).assign(**damage).to_csv(tmp_path / "truth.csv", index=False)
    with pytest.raises(InputError, match=r"truth\.csv"):
        read_truth(tmp_path / "truth.csv", data)


def test_truth_of_other_samples_is_refused_and_of_several_targets_is_read(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    with pytest.raises(InputError, match="cannot read"):
        read_truth(path, toy_images())
    data, truth = BadNets().poison(toy_images(), {}, 0)
    table = truth_table(data, truth)
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match="these samples"):
        read_truth(path, data.take(torch.arange(len(data)).flip(0)))
    pd.concat([table[:40], table[40:].assign(target=1)]).to_csv(path, index=False)
    assert read_truth(path, data).targets.tolist() == [0] * 40 + [1] * 40


def test_rates_both_ways() -> None:
    _, dirty = BadNets(rate=0.25).poison(toy_images(80), {}, 0)
    assert rates(dirty) == {"poisoned": 20, "cover": 0, "n": 80, "rate_of_set": 0.25, "rate_of_class": 0.5}
    _, clean = Sig(rate=0.2, frequency=2).poison(toy_images(80), {}, 0)
    assert rates(clean) == {"poisoned": 16, "cover": 0, "n": 80, "rate_of_set": 0.2, "rate_of_class": 0.8}
    none, zeros = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    assert rates(Truth(none, none, zeros + 1, zeros))["rate_of_class"] == 0
