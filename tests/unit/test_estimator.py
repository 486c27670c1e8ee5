"""The scikit-learn estimator: scikit-learn's own checks, a Pipeline, series and images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from antibackdoor import RobustClassifier
from toy import toy_images, toy_series

TINY: dict[str, Any] = {"defense": "none", "model": "resnet18-w8", "epochs": 1, "device": "cpu", "random_state": 0}
QUICK = {"recipe.min_steps": 0}

NOT_MET = {
    "check_methods_sample_order_invariance": "convolutions of other batch layouts differ in the last bits",
    "check_methods_subset_invariance": "convolutions of other batch sizes differ in the last bits",
}
"""Checks that cannot hold, and why."""
LONG = {"check_classifiers_train", "check_classifiers_classes", "check_classifiers_regression_target"}
"""Checks that ask for an accuracy, and so for more than one epoch."""


def made(check: Any) -> RobustClassifier:
    name = check.func.__name__ if hasattr(check, "func") else check.__name__
    return RobustClassifier(**TINY, options={"recipe.min_steps": 150} if name in LONG else QUICK)


CHECKS = list(estimator_checks_generator(RobustClassifier(**TINY, options=QUICK), expected_failed_checks=NOT_MET,
                                         mark="skip"))  # fmt: skip


@pytest.mark.slow  # fifty checks, most of which train: `pytest -m slow tests/unit/test_estimator.py`
@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=lambda c: getattr(c, "func", c).__name__)
def test_checks_of_scikit_learn(check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(made(check))


def test_pipeline_and_cross_validation() -> None:
    data = toy_series(60, channels=1)
    x, y = data.x[torch.arange(60)][:, 0].numpy(), np.array(data.spec.classes)[data.y.numpy()]
    model = make_pipeline(StandardScaler(), RobustClassifier(**TINY, options={"recipe.min_steps": 60}))
    assert cross_val_score(clone(model), x, y, cv=2).mean() > 0.6
    model.fit(x, y)
    assert set(model.predict(x)) <= set(y) and len(model[-1].suspects_) == 60


def test_series_as_aeon_has_them() -> None:
    data = toy_series(60, channels=2)
    x, y = data.x[torch.arange(60)].numpy().astype(np.float64), data.y.numpy() + 5
    model = RobustClassifier(**TINY, options={"recipe.min_steps": 60}).fit(x, y)
    assert model.classes_.tolist() == [5, 6, 7] and model.score(x, y) > 0.8
    assert model.suspects_["id"].astype(int).sort_values().tolist() == list(range(60))
    assert model.verdict_.poisoned is False and isinstance(model.model_, torch.nn.Module)


def test_a_set_of_aeon_behind_one_of_its_transformers() -> None:
    pytest.importorskip("aeon")
    from aeon.datasets import load_basic_motions
    from aeon.transformations.collection import Normalizer

    model = make_pipeline(Normalizer(), RobustClassifier(**TINY, options={"recipe.min_steps": 60}))
    model.fit(*load_basic_motions(split="train"))
    x, y = load_basic_motions(split="test")
    assert x.shape[1:] == (6, 100) and set(model.classes_) == set(y) and model.score(x, y) > 0.8


@pytest.mark.parametrize("form", ["uint8", "float", "channels last"])
def test_images(form: str) -> None:
    data = toy_images(40)
    x = data.x[torch.arange(40)].numpy()
    x = x if form == "uint8" else (x / 255).astype(np.float32) if form == "float" else x.transpose(0, 2, 3, 1)
    model = RobustClassifier(**TINY, options=QUICK).fit(x, data.y.numpy())
    assert model.spec_.shape == (3, 12, 12) and model.predict_proba(x).shape == (40, 4)
    with pytest.raises(ValueError, match="without normalization"):
        model.predict(np.full((2, *x.shape[1:]), 7.0))


def test_what_a_transformer_gives() -> None:
    flat = make_pipeline(
        FunctionTransformer(lambda x: x.reshape(len(x), 1, -1)), RobustClassifier(**TINY, options=QUICK)
    )
    assert flat.fit(np.random.default_rng(0).normal(size=(30, 20)), ["a", "b"] * 15).predict(
        np.zeros((2, 20))
    ).shape == (2,)
