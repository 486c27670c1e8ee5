"""Within an epoch nothing waits for the device: no number is read from it, and no size depends on what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antibackdoor.data import batches
from antibackdoor.data.batches import Batch
from antibackdoor.data.core import Data
from antibackdoor.training import loop
from tiny import short, train
from toy import toy_images, toy_series

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
"""Operations whose result, or its size, is needed in main memory. What main memory knows anyway goes through numpy."""


class Waits(TorchDispatchMode):
    """Notes them; indexing by a mask is one of them in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """On from the first batch of an epoch to the last step."""
    mode = Waits()

    def watched(*given: Any) -> Iterator[Batch]:
        with mode:
            yield from batches.shuffled(*given)

    monkeypatch.setattr(loop, "shuffled", watched)
    return mode


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("none", "abl", "dlp", "harvey", "nad", "anp")]


@pytest.mark.parametrize("data", [toy_images(40), toy_series(40)], ids=["images", "series"])
@pytest.mark.parametrize("defense", ["e2abl", "jury", *SLOW])  # not mcr, which draws a number in main memory
def test_no_step_waits(waits: Waits, defense: str, data: Data) -> None:
    _, job = train(data, defense, short(defense, 2), model="resnet18-w4")
    assert len(job.history) > 1 and waits.found == []


def test_the_search_finds() -> None:
    x = torch.arange(4.0)
    with Waits() as mode:
        x.sum().item()
        x[x > 1]
        (x > 1).nonzero()
        bool(x.any())
        x[torch.tensor([1, 2])]
    assert mode.found == ["_local_scalar_dense", "index", "nonzero", "_local_scalar_dense"]
