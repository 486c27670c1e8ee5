"""The maps point at the trigger: known networks, and what a run folder gets of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from antibackdoor.attention import attention_of
from antibackdoor.data.core import Data, Spec
from antibackdoor.defenses.base import Outcome
from antibackdoor.training.job import make_fabric
from antibackdoor.training.occlusion import occlusion


class Corner(nn.Module):
    """Says class 1 where the last quarter of every axis is bright, whatever the rest shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(1))
        self.modes: list[bool] = []

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.modes.append(self.training)
        parts = [slice(-(size // 4), None) for size in x.shape[2:]]
        bright = x[(slice(None), slice(None), *parts)].flatten(1).mean(1)
        return torch.stack([torch.zeros_like(bright), 8 * bright - 2], dim=1) + self.seen


def marked(kind: str, *, n: int = 40, lengths: bool = False) -> Data:
    """The first quarter carries a bright mark at the end of every axis and is labeled 1, as are some others."""
    torch.manual_seed(0)
    if kind == "image":
        x = torch.randint(0, 60, (n, 3, 16, 16), dtype=torch.uint8)
        x[: n // 4, :, -4:, -4:] = 255
        spec = Spec("image", (3, 16, 16), ("a", "b"))
    else:
        x = torch.rand(n, 2, 64) * 0.2
        x[: n // 4, :, -16:] = 1.0
        spec = Spec("series", (2, 64), ("a", "b"), 0.0, 1.0)
    y = (torch.arange(n) < n // 2).long()
    return Data(x, y, spec, [str(i) for i in range(n)], torch.full((n,), 64) if lengths else None)


def outcome(data: Data, flagged: int, model: nn.Module | None = None) -> Outcome:
    n = len(data)
    flags = torch.arange(n) < flagged
    scores = -torch.arange(n, dtype=torch.float64)
    return Outcome(model or Corner(), scores, scores.sigmoid(), flags, torch.full((n,), -1))


@pytest.mark.parametrize(("kind", "lengths"), [("image", False), ("series", False), ("series", True)])
def test_the_map_is_where_the_mark_is(kind: str, lengths: bool) -> None:
    data, fabric, model = marked(kind, lengths=lengths), make_fabric("cpu", "32-true"), Corner().train()
    before = data.x[torch.arange(len(data))].clone()
    each = occlusion(model, data, torch.arange(10), fabric, size=30)
    relevance = each.mean(0)
    assert (
        len(each) == 10 and relevance.shape == ((16, 16) if kind == "image" else (2, 64)) and relevance.isfinite().all()
    )
    corner = relevance[-4:, -4:] if kind == "image" else relevance[:, -16:]
    far = relevance[:8, :8] if kind == "image" else relevance[:, :32]
    assert corner.min() > 0.05 and far.abs().max() < 1e-5
    assert model.training and not any(model.modes), "evaluated, and left as it was"
    assert torch.equal(data.x[torch.arange(len(data))], before), "the data are not covered in place"
    few = occlusion(model, data, torch.arange(10), fabric, size=10_000)
    assert torch.allclose(each, few, atol=1e-5), "the batch size changes nothing"


def test_only_the_channel_that_matters_lights_up() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = x[:, 0, 48:].mean(1)
            return torch.stack([torch.zeros_like(bright), 8 * bright], dim=1)

    relevance = occlusion(First(), marked("series"), torch.arange(10), make_fabric("cpu", "32-true")).mean(0)
    assert relevance[0, 48:].min() > 0.01 and relevance[1].abs().max() < 1e-6


def test_a_covered_series_keeps_its_padding() -> None:
    class Padding(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            assert (x[:, :, 40:] == 0).all()
            return x.flatten(1)[:, :2]

    data = marked("series", lengths=True)
    assert isinstance(data.x, Tensor)
    x = data.x.clone()
    x[:20, :, 40:] = 0
    data = replace(data, x=x, lengths=torch.where(torch.arange(40) < 20, 40, 64))
    occlusion(Padding(), data, torch.arange(5), make_fabric("cpu", "32-true"))


class Mark(nn.Module):
    """Says class 1 where three steps in a row are bright, wherever they are."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        bright = nn.functional.avg_pool1d(x.mean(1, keepdim=True), 3, 1).amax((1, 2))
        return torch.stack([torch.zeros_like(bright), 8 * bright - 2], dim=1)


@pytest.mark.parametrize("aligned", ["start", "end"])
def test_series_of_unequal_length_lie_where_their_marks_agree(aligned: str) -> None:
    torch.manual_seed(0)
    n, lengths = 40, torch.randint(10, 30, (40,))
    x = torch.rand(n, 2, 30) * 0.2
    for row, length in enumerate(lengths.tolist()):
        if row < 10:
            x[row, :, slice(length - 3, length) if aligned == "end" else slice(0, 3)] = 1.0
        x[row, :, length:] = 0
    data = replace(marked("series"), x=x, spec=Spec("series", (2, 30), ("a", "b"), 0.0, 1.0), lengths=lengths)
    found = attention_of(data, outcome(data, 10, Mark()), make_fabric("cpu", "32-true"))
    assert found is not None and found.aligned == aligned and str(found.arrays()["aligned"]) == aligned
    assert found.suspects.shape == found.trusted_mean.shape == (2, found.suspects.shape[1])
    span = found.suspects.shape[1]
    assert 10 <= span <= int(lengths[:10].median()), "what fewer than half of them reach is left out"
    mark, rest = (slice(-3, None), slice(0, -4)) if aligned == "end" else (slice(0, 3), slice(4, None))
    assert found.suspects[:, mark].min() > 5 * np.abs(found.suspects[:, rest]).max()
    assert np.allclose(found.suspects_mean[:, mark], 1) and found.suspects_mean[:, rest].max() < 0.3
    assert (found.suspects_mean > 0.02).all() and (found.trusted_mean > 0.02).all(), "padding is no data"


def test_suspects_against_trusted_samples_of_their_class() -> None:
    data, fabric = marked("image"), make_fabric("cpu", "32-true")
    found = attention_of(data, outcome(data, flagged=10), fabric)
    assert found is not None and (found.label, found.witness, found.n) == ("b", "model", 10)
    assert set(found.reference.tolist()) <= set(range(10, 20)), "not flagged, of the class that is"
    assert found.aligned == "" and found.suspects.argmax() == 16 * 16 - 1 and found.suspects_mean.shape == (16, 16, 3)
    assert found.trusted.max() < found.suspects.max() / 2
    arrays = found.arrays()
    assert arrays["suspects"].dtype == np.float32 and str(arrays["label"]) == "b"
    again = attention_of(data, outcome(data, flagged=10), fabric)
    assert again is not None and np.array_equal(again.suspects, found.suspects)


def test_the_witness_is_asked_where_there_is_one() -> None:
    data, blind = marked("image"), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    witness = (Corner(), lambda model, batch: model(batch.x))
    found = attention_of(data, replace(outcome(data, 10, blind), witness=witness), make_fabric("cpu", "32-true"))
    assert found is not None and found.witness == "second head" and found.suspects.argmax() == 16 * 16 - 1


def test_nobody_to_compare() -> None:
    data, fabric = marked("image"), make_fabric("cpu", "32-true")
    zeros = torch.zeros(len(data), dtype=torch.float64)
    nothing = replace(outcome(data, 0), scores=zeros)
    assert attention_of(data, nothing, fabric) is None
    assert attention_of(data, outcome(data, flagged=20), fabric) is None, "the whole class is flagged"
    assert attention_of(data, outcome(data, flagged=0), fabric) is not None, "most suspicious, though not flagged"
