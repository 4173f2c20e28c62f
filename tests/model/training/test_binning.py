"""Binning finds the edges that made the labels, and few others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.training.binning import EDGES_MAX, learn_bin_edges


def test_an_edge_in_noise_is_found() -> None:
    rng = np.random.default_rng(0)
    amount = np.round(rng.gamma(2.0, 40.0, 200_000), 2).astype(np.float32)
    is_fraud = rng.random(200_000) < np.where(amount > 220, 0.9, 0.003)

    steps = learn_bin_edges(amount, is_fraud)

    assert min(abs(step - 220) for step in steps) < 0.5
    assert len(steps) <= 2


def test_an_island_of_fraud_has_an_edge_on_either_side() -> None:
    rng = np.random.default_rng(1)
    hour = rng.uniform(0, 24, 100_000).astype(np.float32)
    is_fraud = rng.random(100_000) < np.where((hour >= 2) & (hour < 5), 0.2, 0.001)

    steps = learn_bin_edges(hour, is_fraud)

    for edge in (2, 5):
        assert min(abs(step - edge) for step in steps) < 0.05


def test_chance_gives_no_edges_and_their_number_is_bounded() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=50_000).astype(np.float32)
    assert learn_bin_edges(values, rng.random(50_000) < 0.01) == ()
    wavy = np.sin(values * 20) > 0  # dozens of sharp edges
    assert len(learn_bin_edges(values, wavy)) == EDGES_MAX


def test_a_bin_holds_enough_transactions() -> None:
    """An edge above a few values would only memorise them."""
    values = np.arange(1000, dtype=np.float32)
    assert learn_bin_edges(values, values >= 990, leaf_min=10) == (989.5,)
    assert learn_bin_edges(values, values >= 991, edges_max=1, leaf_min=10) != (990.5,)


@pytest.mark.parametrize("constant", [0.0, 1e30, float("nan"), float("-inf")])
def test_an_uninformative_feature_has_no_edges(constant: float) -> None:
    is_fraud = np.arange(1000) % 3 == 0
    assert learn_bin_edges(np.full(1000, constant, np.float32), is_fraud) == ()
    assert learn_bin_edges(np.zeros(0, np.float32), np.zeros(0, np.bool_)) == ()


def test_missing_values_are_left_out() -> None:
    values = np.arange(2000, dtype=np.float32)
    with_missing = np.where(np.arange(2000) % 2, values, np.float32(np.nan))
    assert learn_bin_edges(with_missing, values >= 1000) == (1000.0,)  # between 999 and 1001


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_the_first_edge_is_the_best_of_all(seed: int, distinct: int) -> None:
    """It is compared with every possible edge, and separates neighbouring float32 values."""
    rng = np.random.default_rng(seed)
    values = (np.float32(16_777_216) + rng.integers(0, distinct, 60) * 2).astype(np.float32)
    is_fraud = (
        rng.random(60) < rng.choice([0.1, 0.9], distinct)[((values - 16_777_216) / 2).astype(int)]
    )

    def likelihood(part: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
        rate = part.mean()
        return float(np.log(np.where(part, max(rate, 1e-300), max(1 - rate, 1e-300))).sum())

    def gain(threshold: float) -> float:
        over = values >= np.float32(threshold)
        if not 0 < over.sum() < len(over):
            return 0.0
        return likelihood(is_fraud[over]) + likelihood(is_fraud[~over]) - likelihood(is_fraud)

    best = max(gain(float(v)) for v in values)
    steps = learn_bin_edges(values, is_fraud, edges_max=1, leaf_min=1, gain_min_nats=1e-6)
    if steps:
        assert gain(steps[0]) == pytest.approx(best, abs=1e-6)
    else:
        assert best < 1e-5
