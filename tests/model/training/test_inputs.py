"""Tests of the inputs that a new network gets."""

from __future__ import annotations

import numpy as np
import pytest

from model.features.spec import FEATURES, SMALL_SHARE, Encoder, FeatureSpec, Field, Input
from model.training.inputs import Float32, fitted_spec

TO_LEAST = FEATURES.index("amount_to_least")
CATEGORY = (Field("category", "categorical", ("food",)),)


def log_of(to_least: Float32) -> Float32:
    """Return raw features and a category, in which only the ratio to what is usual differs."""
    raw = np.ones((len(to_least), len(FEATURES) + 1), np.float32)
    raw[:, TO_LEAST] = to_least
    return raw


def small_steps(spec: FeatureSpec) -> list[Input]:
    """Return the steps of the amount under what is usual."""
    return [i for i in spec.inputs if i.feature == "amount_to_least" and i.transform == "step"]


@pytest.mark.parametrize("lowest", [0.02, 0.3])
def test_frauds_of_some_small_amounts_have_steps_for_the_context(lowest: float) -> None:
    rng = np.random.default_rng(3)
    to_least = rng.uniform(0.0, 3.0, 20_000).astype(np.float32)
    is_fraud = (to_least > lowest) & (to_least < lowest + 0.1)
    spec = fitted_spec(log_of(to_least), is_fraud, CATEGORY)
    steps = small_steps(spec)
    assert [i.threshold for i in steps] == pytest.approx([lowest, lowest + 0.1], abs=1e-3)
    assert {i.role for i in steps} == {"own"}
    # From what is usual on, no step moves: there only the rising part sees the amount.
    places = [spec.inputs.index(i) for i in steps]
    over = log_of(np.array([SMALL_SHARE, 1.5, 3.0], np.float32))
    assert (np.diff(Encoder(spec).encode(over)[:, places], axis=0) == 0).all()


def test_frauds_of_large_amounts_alone_have_no_small_steps() -> None:
    rng = np.random.default_rng(4)
    to_least = rng.uniform(0.0, 3.0, 20_000).astype(np.float32)
    spec = fitted_spec(log_of(to_least), to_least > 2.0, CATEGORY)
    assert small_steps(spec) == []


def test_data_without_categories_have_no_small_steps() -> None:
    rng = np.random.default_rng(5)
    to_least = rng.uniform(0.0, 3.0, 20_000).astype(np.float32)
    spec = fitted_spec(log_of(to_least)[:, :-1], to_least < 0.1)
    assert small_steps(spec) == []
