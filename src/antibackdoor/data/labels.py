"""Class names to numbers, the same way for every reader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from antibackdoor.errors import InputError
from antibackdoor.limits import MAX_NAME


def number(names: Sequence[str], ids: Sequence[str], classes: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """Labels `(n,)` int64 in 0..K-1 and the K class names, sorted as plain text.

    classes: the training set's, sorted, when `names` belong to a test set; a class that no test sample has is fine.
    Raises InputError for a class that is not among them.
    """
    longest = max(map(len, names), default=0)
    if longest > MAX_NAME:  # one such name makes every row of a text array as long
        raise InputError(f"a class has a name of {longest:,} characters; at most {MAX_NAME:,} make sense.")
    given = np.asarray(names, dtype=np.str_)
    known = np.unique(given) if classes is None else np.asarray(classes, dtype=np.str_)
    if len(given) == 0:
        return torch.zeros(0, dtype=torch.int64), known.tolist()
    place = np.searchsorted(known, given)
    lost = known[place.clip(max=len(known) - 1)] != given
    if lost.any():
        first = int(lost.argmax())
        raise InputError(
            f"test sample {ids[first]!r} is of class {str(given[first])!r}, which the training set does not have; "
            "leave that class out of the test set or add it to the training set."
        )
    return torch.from_numpy(place.astype(np.int64)), known.tolist()
