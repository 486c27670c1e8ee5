"""How far a share measured on few samples can be trusted."""

from __future__ import annotations

import math

ONE_SIDED = 1.64
"""Standard errors of a one-sided interval of 95 %."""


def lower(count: int, n: int) -> float:
    """Lower end of the Wilson interval of `count` in `n`, one-sided 95 %; 0 where there is nothing to count."""
    return _wilson(count, n, -ONE_SIDED) if n else 0.0


def upper(count: int, n: int) -> float:
    """Upper end of the Wilson interval of `count` in `n`, one-sided 95 %; 1 where there is nothing to count."""
    return _wilson(count, n, ONE_SIDED) if n else 1.0


def _wilson(count: int, n: int, z: float) -> float:
    p = count / n
    return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
