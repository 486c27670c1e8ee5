"""antibackdoor: train a clean model on data nobody vouches for, and name the samples that look poisoned."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antibackdoor.api import train
    from antibackdoor.bench.judge import Experiment
    from antibackdoor.data.core import Data, Spec, Splits
    from antibackdoor.data.load import load
    from antibackdoor.errors import InputError
    from antibackdoor.estimator import RobustClassifier
    from antibackdoor.findings import Findings, Result
    from antibackdoor.runs import load_model
    from antibackdoor.scanning import scan

__version__ = "0.1.0"
__all__ = [
    "Data",
    "Experiment",
    "Findings",
    "InputError",
    "Result",
    "RobustClassifier",
    "Spec",
    "Splits",
    "load",
    "load_model",
    "scan",
    "train",
]

_ROOMS = {
    "Data": "data.core",
    "Experiment": "bench.judge",
    "Findings": "findings",
    "InputError": "errors",
    "Result": "findings",
    "Spec": "data.core",
    "RobustClassifier": "estimator",
    "Splits": "data.core",
    "load": "data.load",
    "load_model": "runs",
    "scan": "scanning",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `antibackdoor --help` does not wait for torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'antibackdoor' has no attribute {name!r}")
    return getattr(import_module(f"antibackdoor.{_ROOMS[name]}"), name)
