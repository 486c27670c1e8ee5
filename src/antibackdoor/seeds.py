"""Seeds derived by name, so that a resumed run needs no saved random state."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every part: `derive(0, "warm-up", 3)`."""
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive(seed, *parts)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *parts))
