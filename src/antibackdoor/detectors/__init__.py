"""Detectors: one file each, imported here by name so that the list is easy to find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antibackdoor.detectors import (
    activation_clustering,
    entropy,
    jury,
    loss,
    loss_drop,
    spectral_signatures,
    trap,
    witnesses,
)
from antibackdoor.detectors.base import DETECTORS, Detector
from antibackdoor.options import build

AUTO = "jury"
"""What `auto` means."""


def make_detector(name: str, settings: Mapping[str, Any] | None = None) -> Detector:
    """A detector from its name and settings; InputError for an unknown name or setting, with the nearest known one."""
    name = AUTO if name == "auto" else name
    return build(DETECTORS[name].make, settings or {}, f"detector {name}")


__all__ = [
    "DETECTORS",
    "Detector",
    "activation_clustering",
    "entropy",
    "jury",
    "loss",
    "loss_drop",
    "make_detector",
    "spectral_signatures",
    "trap",
    "witnesses",
]
