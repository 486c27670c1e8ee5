"""A scikit-learn classifier: `fit` on data nobody vouches for, `predict` with the clean model, then `suspects_`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    check_random_state,
    column_or_1d,
    validate_data,
)
from torch import nn

from antibackdoor.api import train
from antibackdoor.data.core import Data, Kind, Spec, as_stored
from antibackdoor.training.job import make_fabric
from antibackdoor.training.scores import logits_of

Array = npt.NDArray[Any]


class RobustClassifier(ClassifierMixin, BaseEstimator):
    """Trains on labels and samples that may be poisoned, as `antibackdoor.train` does.

    X is what scikit-learn and aeon pass around: `(n, features)`, taken as series of one channel in the order of the
    columns; `(n, C, T)`, series as aeon has them; or `(n, C, H, W)` (C 1 or 3) or `(n, H, W, C)`, images as uint8 or as
    floats in [0, 1]. y are names or numbers of any kind.

    Parameters: `defense`, `options`, `model`, `epochs`, `device` as for `antibackdoor.train`; `random_state` is None (a
    run of its own every time), an integer, or a RandomState.

    After `fit`: `classes_` (K,), `suspects_` (a table of every row, most suspicious first; "id" is the row number),
    `verdict_`, `model_` (a plain module), `n_features_in_` for two-dimensional X, `result_`.
    """

    def __init__(
        self,
        defense: str = "auto",
        *,
        options: dict[str, Any] | None = None,
        model: str | nn.Module = "auto",
        epochs: int | None = None,
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
    ):
        self.defense = defense
        self.options = options
        self.model = model
        self.epochs = epochs
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> RobustClassifier:
        """Train on `X` and the labels `y` (n,) as given; returns self. Raises ValueError for what cannot be learned."""
        if y is None:
            raise ValueError("RobustClassifier requires y to be passed, but the target y is None.")
        x = self._checked(X, fitting=True)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        check_consistent_length(x, y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class only ({self.classes_[0]!r}); a classifier needs at least two classes.")
        data = self._data(x, numbers.astype(np.int64), None)
        result = train(
            data,
            defense=self.defense,
            options=self.options,
            model=self.model,
            epochs=self.epochs,
            device=self.device,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
        )
        self.result_, self.spec_ = result, data.spec
        self.model_, self.verdict_ = result.model, result.verdict
        self.suspects_: pd.DataFrame = result.suspects
        return self

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities `(n, K)`, columns in the order of `classes_`."""
        check_is_fitted(self, "model_")
        x = self._checked(X, fitting=False)
        data = self._data(x, np.zeros(len(x), dtype=np.int64), self.spec_)
        fabric = make_fabric(self.device, "32-true")
        logits = logits_of(self.model_.to(fabric.device), data, fabric)
        probabilities: Array = logits.double().softmax(1).numpy()
        return probabilities

    def predict(self, X: Any) -> Array:
        """The most probable class of each sample `(n,)`."""
        best = self.predict_proba(X).argmax(1)
        named: Array = self.classes_[best]
        return named

    def __sklearn_tags__(self) -> Any:
        """Series `(n, C, T)` are welcome too."""
        parent: Any = super()
        tags = parent.__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _checked(self, x: Any, *, fitting: bool) -> Array:
        """X as an array of 2, 3 or 4 dimensions; the number of features as seen when fitting."""
        least = {"ensure_min_samples": 2 if fitting else 1, "ensure_min_features": 2 if fitting else 1}
        checked: Array = validate_data(
            self, x, reset=fitting, allow_nd=True, dtype=[np.float64, np.float32, np.uint8], **least
        )
        if checked.ndim == 4 and checked.shape[1] not in (1, 3) and checked.shape[3] in (1, 3):
            checked = checked.transpose(0, 3, 1, 2)
        if checked.ndim > 4 or (checked.ndim == 4 and checked.shape[1] not in (1, 3)):
            raise ValueError(f"X must be (n, T), (n, C, T) or images (n, 1 or 3, H, W), got shape {checked.shape}.")
        return checked

    def _data(self, x: Array, y: npt.NDArray[np.int64], spec: Spec | None) -> Data:
        """Rows as they are stored; `spec` is that of the training data."""
        labels, ids = torch.from_numpy(y), [str(row) for row in range(len(x))]
        names = tuple(str(name) for name in self.classes_)
        names = names if len(set(names)) == len(names) else tuple(str(k) for k in range(len(names)))
        kind: Kind = "image" if x.ndim == 4 else "series"
        with np.errstate(over="ignore"):  # `as_stored` tells
            x = np.ascontiguousarray(
                x if x.ndim > 2 else x[:, None], dtype=np.uint8 if x.dtype == np.uint8 else np.float32
            )
        stored = as_stored(torch.from_numpy(x), kind)
        if spec is None:
            low, high = (0.0, 1.0) if kind == "image" else (float(stored.min()), float(stored.max()))
            spec = Spec(kind, tuple(stored.shape[1:]), names, low, high)
        return Data(stored, labels, spec, ids)
