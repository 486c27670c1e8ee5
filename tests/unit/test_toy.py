from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from antibackdoor.data.core import Data
from toy import toy_images, toy_series


@pytest.mark.parametrize(
    "make",
    [
        toy_images,
        lambda seed: toy_images(classes=10, size=16, seed=seed),
        toy_series,
        lambda seed: toy_series(unequal=True, seed=seed),
    ],
)
def test_what_one_seed_teaches_holds_for_another(make: Callable[..., Data]) -> None:
    train, test = make(seed=0), make(seed=1)
    x, z = (d.spec.decode(d.x[torch.arange(len(d))]).flatten(1) for d in (train, test))
    centers = torch.stack([x[train.y == k].mean(0) for k in range(len(train.spec.classes))])
    assert (torch.cdist(z, centers).argmin(1) == test.y).float().mean() > 0.95
