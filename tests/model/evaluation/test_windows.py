"""Exact windows, compared with their definition for each transaction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.dataset import Dataset
from model.evaluation.windows import WINDOW_DAYS, WINDOW_INPUTS, window_inputs
from model.units import DAY_MS
from tests.fakes.datasets import rows_of


def dataset(seed: int, size: int, days: float) -> Dataset:
    """Draw transactions of few cards and terminals, some at the same time."""
    rng = np.random.default_rng(seed)
    half_days = np.sort(rng.integers(0, round(2 * days), size))
    return Dataset(
        account=rng.integers(0, 3, size).astype(np.int32),
        merchant=rng.integers(5, 8, size).astype(np.int32),
        amount=rng.integers(1, 100, size).astype(np.float64),
        timestamp_ms=17_622 * DAY_MS + half_days * DAY_MS // 2,
        label=(rng.random(size) < 0.3).astype(np.int8),
        scenario=np.zeros(size, np.int8),
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([0.0, 7.0]))
def test_each_column_matches_its_definition(seed: int, size: int, delay_days: float) -> None:
    log = dataset(seed, size, days=60)
    found = window_inputs(log, delay_days)
    columns = {name: found[:, i] for i, name in enumerate(WINDOW_INPUTS)}
    for row in range(len(log)):
        now = log.timestamp_ms[row]
        for days in WINDOW_DAYS:
            begin = now - days * DAY_MS
            times = log.timestamp_ms
            of_card = (log.account == log.account[row]) & (times <= now) & (times > begin)
            assert columns[f"card_transactions_{days}d"][row] == of_card.sum()
            assert columns[f"card_mean_amount_{days}d"][row] == pytest.approx(
                log.amount[of_card].mean(), rel=1e-6
            )
            later = round(delay_days * DAY_MS)
            of_terminal = (log.merchant == log.merchant[row]) & (times <= now - later)
            of_terminal &= times > begin - later
            assert columns[f"terminal_transactions_{days}d"][row] == of_terminal.sum()
            risk = log.is_fraud[of_terminal].mean() if of_terminal.any() else 0.0
            assert columns[f"terminal_risk_{days}d"][row] == pytest.approx(risk, rel=1e-6)


def test_night_and_weekend_are_in_utc() -> None:
    friday = 17_627 * DAY_MS  # 2018-04-06
    hour = 3_600_000
    times = np.array([friday + 6 * hour, friday + 7 * hour, friday + 30 * hour])
    one = np.ones(3, np.int32)
    log = Dataset(one, one, np.ones(3), times, np.zeros(3, np.int8), np.zeros(3, np.int8))
    found = window_inputs(log)
    assert found[:, WINDOW_INPUTS.index("night")].tolist() == [1, 0, 1]
    assert found[:, WINDOW_INPUTS.index("weekend")].tolist() == [0, 0, 1]


def test_nothing_looks_ahead() -> None:
    log = dataset(1, 200, days=60)
    whole = window_inputs(log)
    cut = int(np.searchsorted(log.timestamp_ms, log.timestamp_ms[120]))
    part = rows_of(log, slice(cut))
    assert np.array_equal(window_inputs(part), whole[:cut])


def test_an_empty_log_has_no_windows() -> None:
    log = rows_of(dataset(1, 5, 60), slice(0))
    assert window_inputs(log).shape == (0, len(WINDOW_INPUTS))
