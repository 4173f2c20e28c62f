"""The forecast head: all days at once in torch are the days one by one in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.features.amount_scale import AmountScale
from model.forecast.decoder import DecodedDay, Decoder
from model.forecast.forecaster import none_probability
from model.forecast.inputs import asked_states, day_inputs
from model.forecast.network import pays_logit
from model.forecast.shape import DAYS_MAX, ForecastShape
from tests.fakes.forecasts import FIRST_SHAPE, SHAPE, random_decoder, some_histories

ENCODER = 16
ASKED_MS = 1_530_600_000_000


def decoded(n: int, shape: ForecastShape = SHAPE) -> tuple[list[DecodedDay], dict[str, np.ndarray]]:
    """Decode each day by itself in NumPy, and all of them at once in torch."""
    hidden = np.random.default_rng(0).uniform(-1, 1, (n, 1, ENCODER)).astype(np.float16)
    scale = AmountScale(floor=0.5, usual=40.0)
    asked = asked_states(some_histories(n), hidden, np.full(n, ASKED_MS), scale)
    network = random_decoder(ENCODER, shape=shape)
    decoder = Decoder(network.weights())
    given, log_rate = asked.given(shape.bookkeeping)
    context, state = decoder.start(given)
    days = []
    for ahead in range(DAYS_MAX):
        inputs = day_inputs(asked.first_day, ahead)
        day, state = decoder.step(context, state, inputs, log_rate, ahead == 0)
        days.append(day)
    calendar = np.stack([day_inputs(asked.first_day, k) for k in range(DAYS_MAX)], axis=1)
    terms = network.unroll(
        torch.from_numpy(given),
        torch.from_numpy(log_rate.astype(np.float32)),
        torch.from_numpy(calendar),
    )
    return days, {name: value.numpy() for name, value in terms._asdict().items()}


@pytest.mark.parametrize("shape", [SHAPE, FIRST_SHAPE])
def test_days_unrolled_at_once_are_the_days_one_by_one(shape: ForecastShape) -> None:
    days, terms = decoded(40, shape)

    for ahead, day in enumerate(days):
        np.testing.assert_allclose(np.log(day.mean), terms["log_mean"][:, ahead], atol=1e-5)
        dispersion = np.log(day.dispersion)
        np.testing.assert_allclose(dispersion, terms["log_dispersion"][:, ahead], atol=1e-5)
        for name in ("amount", "largest"):
            unrolled = np.maximum(terms[name][:, ahead], 0.0)
            np.testing.assert_allclose(getattr(day, name), unrolled, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(day.fraud, terms["fraud"][:, ahead], atol=1e-5)
    assert np.ptp(terms["log_mean"], axis=1).min() > 0.01, "equal days would prove nothing"
    assert np.ptp(terms["log_mean"], axis=0).min() > 0.1, "equal accounts would prove nothing"


def test_the_hazard_of_silence_is_that_of_the_count_on_the_first_day() -> None:
    days, terms = decoded(20)

    none = none_probability(days[0].mean, days[0].dispersion)
    np.testing.assert_allclose(np.log1p(-none) - np.log(none), terms["hazard"][:, 0], atol=1e-3)
    assert (days[0].shift == 0).all()
    later = pays_logit(
        torch.from_numpy(terms["log_mean"][:, 5]), torch.from_numpy(terms["log_dispersion"][:, 5])
    )
    np.testing.assert_allclose(terms["hazard"][:, 5] - later.numpy(), days[5].shift, atol=1e-4)
