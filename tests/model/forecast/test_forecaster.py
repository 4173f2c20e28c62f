"""Forecasts: quantiles rise, silence falls, units transfer, and days are the caller's choice."""

from __future__ import annotations

import numpy as np
import pytest

from model.features.account import AccountHistory
from model.features.amount_scale import AmountScale
from model.forecast.answer import day_forecasts
from model.forecast.forecaster import DaysError, Forecaster, Forecasts, count_quantiles
from model.forecast.shape import DAYS_MAX, LEVELS
from tests.fakes.forecasts import random_decoder, some_histories, with_random_forecast
from tests.fakes.memory_workers import small_checkpoint

ENCODER = 8
ASKED_MS = 1_530_600_000_000
CHECKPOINT = with_random_forecast(small_checkpoint())


def forecast(history: AccountHistory, days: int = DAYS_MAX, asked_ms: int = ASKED_MS) -> Forecasts:
    hidden = np.random.default_rng(5).uniform(-1, 1, (len(history), 1, ENCODER)).astype(np.float16)
    assert CHECKPOINT.forecaster is not None
    return CHECKPOINT.forecaster.forecast(history, hidden, np.full(len(history), asked_ms), days)


def test_quantiles_rise_and_the_probability_of_silence_never_does() -> None:
    found = forecast(some_histories(300))

    for quantiles in (found.payments, found.amount, found.largest):
        assert quantiles.shape == (300, DAYS_MAX, len(LEVELS))
        assert (quantiles >= 0).all()
        assert (np.diff(quantiles, axis=-1) >= 0).all()
    assert (np.diff(found.silent, axis=1) <= 0).all()
    assert ((found.silent > 0) & (found.silent < 1)).all()
    assert ((found.fraud > 0) & (found.fraud < 1)).all()


def test_a_quantile_up_to_the_probability_of_no_payment_is_0() -> None:
    found = forecast(some_histories(300))

    is_zero = np.array(LEVELS) <= found.none[..., None]
    assert is_zero.any()
    assert not is_zero.all()
    assert (found.amount[is_zero] == 0).all()
    assert (found.largest[is_zero] == 0).all()
    assert (found.payments[is_zero] == 0).all()


@pytest.mark.parametrize("days", [1, 7])
def test_a_shorter_forecast_is_the_beginning_of_a_longer_one(days: int) -> None:
    history = some_histories(20)
    whole, part = forecast(history), forecast(history, days)

    for name in ("mean_payments", "payments", "amount", "largest", "none", "silent", "fraud"):
        assert (getattr(part, name) == getattr(whole, name)[:, :days]).all(), name


@pytest.mark.parametrize("days", [0, -1, DAYS_MAX + 1])
def test_a_wrong_number_of_days_is_named(days: int) -> None:
    with pytest.raises(DaysError, match=f"{days} days; a forecast has 1 to 30"):
        forecast(some_histories(1), days)


def test_amounts_follow_the_currency() -> None:
    history = some_histories(20)
    yen = history.take(slice(None))
    yen.usual_amount = history.usual_amount * 128
    yen.decayed_amount = history.decayed_amount * 128
    hidden = np.zeros((20, 1, ENCODER), np.float16)
    weights = random_decoder(ENCODER).weights()
    asked = np.full(20, ASKED_MS)

    euros = Forecaster(weights, AmountScale(0.5, 40.0)).forecast(history, hidden, asked)
    converted = Forecaster(weights, AmountScale(64.0, 5120.0)).forecast(yen, hidden, asked)

    np.testing.assert_allclose(converted.amount, euros.amount * 128, rtol=1e-5)
    np.testing.assert_allclose(converted.mean_payments, euros.mean_payments, rtol=1e-5)


def test_the_first_day_is_the_next_whole_one() -> None:
    history = some_histories(1)
    midnight = 17_800 * 86_400_000

    assert forecast(history, 1, midnight).first_day.tolist() == [17_800]
    assert forecast(history, 1, midnight + 1).first_day.tolist() == [17_801]
    days = day_forecasts(forecast(history, 2, midnight))
    assert [day.date for day in days] == ["2018-09-26", "2018-09-27"]


def test_counts_of_a_busy_account_have_quantiles() -> None:
    found = count_quantiles(np.array([2.0, 3000.0]), np.array([1e6, 50.0]))

    assert found[0].tolist() == [0, 0, 1, 2, 3, 4, 5]  # Poisson
    deviation = np.sqrt(3000 + 3000**2 / 50)
    assert found[1, 3] == pytest.approx(3000, abs=0.1 * deviation)
    assert found[1, 5] == pytest.approx(3000 + 1.28 * deviation, abs=0.1 * deviation)
