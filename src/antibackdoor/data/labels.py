"""Names of classes and of splits, the same for every reader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from antibackdoor.errors import InputError
from antibackdoor.limits import MAX_NAME

TEST_NAMES = ("test", "validation", "valid", "val")
"""What the part of a set that nothing is trained on may be called; the first of these that is there is taken."""

UNKNOWN = "?"
"""The class of samples that nobody gave a label, where none is needed."""


def wrong_split(name: str) -> str:
    """What is wrong with the name of a split in a list or table; nothing if it is `train` or one of `TEST_NAMES`."""
    return "" if name in ("train", *TEST_NAMES) else f"has the split {name!r}; known: train, {', '.join(TEST_NAMES)}."


def number(names: Sequence[str], ids: Sequence[str], classes: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """Labels `(n,)` int64 in 0..K-1 and the K class names, sorted as plain text.

    classes: the training set's, sorted, when `names` belong to a test set; a class that no test sample has is fine.
    Raises InputError for a class that is not among them.
    """
    longest = max(map(len, names), default=0)
    if longest > MAX_NAME:
        raise InputError(f"a class has a name of {longest:,} characters; at most {MAX_NAME:,} make sense.")
    known = sorted(set(names)) if classes is None else list(classes)
    place = {name: k for k, name in enumerate(known)}
    lost = next((row for row, name in enumerate(names) if name not in place), None)
    if lost is not None:
        raise InputError(
            f"test sample {ids[lost]!r} is of class {names[lost]!r}, which the training set does not have; "
            "leave that class out of the test set or add it to the training set."
        )
    return torch.tensor([place[name] for name in names], dtype=torch.int64), known
