"""The inputs of a forecast: rates that do not depend on an account's age."""

from __future__ import annotations

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.features.account import AccountHistory, observe
from model.features.amount_scale import AmountScale
from model.forecast.inputs import (
    AGE_MAX_DAYS,
    BOOKKEEPING,
    BOOKKEEPINGS,
    STEADY_BOOKKEEPING,
    AskedStates,
    asked_states,
)
from model.units import DAY_MS
from tests.fakes.forecasts import FIRST_SHAPE, some_histories, with_random_forecast
from tests.fakes.memory_workers import small_checkpoint

SCALE = AmountScale(floor=0.5, usual=40.0)
START_MS = 1_530_403_200_000
ACCOUNTS = 400


def steady(days: int, rate: float, quiet_days: int = 0) -> AskedStates:
    """Ask about accounts that began ``days`` ago and paid at this rate until lately."""
    rng = np.random.default_rng(days)
    number = 1 + rng.poisson(rate * days, ACCOUNTS)
    at = np.sort(
        np.where(
            np.arange(number.max()) < number[:, None], rng.random((ACCOUNTS, number.max())), 2.0
        )
    )
    at[:, 0] = 0.0
    history = AccountHistory.empty(ACCOUNTS)
    for place in range(number.max()):
        rows = np.flatnonzero(place < number)
        times = START_MS + (at[rows, place] * days * DAY_MS).astype(np.int64)
        _, after = observe(history.take(rows), np.full(len(rows), 30.0), times, SCALE)
        history.put(rows, after)
    asked = np.full(ACCOUNTS, START_MS + (days + quiet_days) * DAY_MS)
    return asked_states(history, np.zeros((ACCOUNTS, 1, 4), np.float16), asked, SCALE)


def column(asked: AskedStates, name: str) -> np.ndarray:
    return asked.steady[:, STEADY_BOOKKEEPING.index(name)]


@pytest.mark.parametrize("days", [20, 60, 240])
def test_the_rate_of_a_steady_account_does_not_depend_on_its_age(days: int) -> None:
    asked = steady(days, 2.0)

    assert np.exp(column(asked, "log_steady_rate_30d")).mean() == pytest.approx(2.0, rel=0.06)
    assert np.exp(asked.log_long_rate).mean() == pytest.approx(2.0, rel=0.06)
    plain = np.exp(asked.log_rate).mean()
    assert plain < 1.2 if days == 20 else plain > 1.6, "else there was nothing to correct"


def test_the_rate_over_a_long_time_varies_less_than_that_of_a_month() -> None:
    asked = steady(240, 2.0)

    month = np.exp(column(asked, "log_steady_rate_30d"))
    assert np.exp(asked.log_long_rate).var() < 0.9 * month.var()


def test_no_input_of_an_old_account_grows_with_its_age() -> None:
    old, older = steady(180, 2.0), steady(360, 2.0)

    moved = np.abs(old.steady.mean(axis=0) - older.steady.mean(axis=0))
    assert moved.max() < 0.12, STEADY_BOOKKEEPING[int(moved.argmax())]
    payments = BOOKKEEPING.index("log_payments")
    assert (older.bookkeeping - old.bookkeeping)[:, payments].mean() > 0.5


def test_the_implied_age_of_a_young_account_is_about_its_age() -> None:
    age = np.expm1(column(steady(20, 2.0), "log_age_days"))
    assert np.median(age) == pytest.approx(20, rel=0.15)
    assert np.expm1(column(steady(240, 2.0), "log_age_days")).max() <= AGE_MAX_DAYS + 1e-3


def test_a_rate_falls_with_silence() -> None:
    after = [np.exp(steady(60, 2.0, quiet).log_long_rate).mean() for quiet in (0, 10, 40)]
    assert after[0] > 1.15 * after[1]
    assert after[1] > 1.5 * after[2]


def test_inputs_are_finite_for_any_history() -> None:
    history = some_histories(500)
    history.decayed_count[:50] = 1.0  # one payment, or all others long ago
    asked = asked_states(history, np.zeros((500, 1, 4), np.float16), np.full(500, START_MS), SCALE)

    assert np.isfinite(asked.steady).all()
    assert np.isfinite(asked.log_long_rate).all()


def test_a_head_of_the_first_bookkeeping_still_answers() -> None:
    assert len({len(names) for names in BOOKKEEPINGS}) == len(BOOKKEEPINGS)
    assert FIRST_SHAPE.bookkeeping == len(BOOKKEEPING), "headers of such heads do not say it"
    checkpoint: Checkpoint = with_random_forecast(small_checkpoint(), shape=FIRST_SHAPE)
    assert checkpoint.forecaster is not None
    hidden = np.zeros((20, 1, 8), np.float16)
    found = checkpoint.forecaster.forecast(some_histories(20), hidden, np.full(20, START_MS), 3)
    assert np.isfinite(found.amount).all()
