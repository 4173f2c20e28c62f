"""The forecast head in NumPy: one day of n accounts at a time.

The decoder keeps a second hidden state. The account's state sets its first value. Each day's
calendar updates it. The caller chooses the number of days.

A sigmoid is computed as ``(1 + tanh(z / 2)) / 2``, so nothing overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.forecast.shape import (
    LEVELS,
    LOG_DISPERSION_RANGE,
    LOG_MEAN_RANGE,
    LOG_RATE_MIN,
    LOG_SCALE_RANGE,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class DecodedDay:
    """A day of n forecasts, before calibration.

    Attributes:
        mean, dispersion: [n] expected number of payments, and r of its variance ``m + m**2 / r``.
        amount, largest: [n, Q] quantiles in units of the usual amount, at least 0 and rising.
        shift: [n] added to the logit that the account pays, if it was silent on the days before.
        fraud: [n] logit that a payment of the day is fraud.
    """

    mean: Float64
    dispersion: Float64
    amount: Float64
    largest: Float64
    shift: Float64
    fraud: Float64


class Decoder:
    """The steps of a forecast head.

    Args:
        weights: its tensors by name, without the prefix of the checkpoint.
    """

    def __init__(self, weights: Mapping[str, Float32]) -> None:
        self._weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}

    @property
    def inputs(self) -> int:
        """Number of inputs, B + H."""
        return int(self._weights["context.weight"].shape[1])

    def start(self, inputs: Float32) -> tuple[Float32, Float32]:
        """Return the context [n, C] and the first hidden state [n, S] for inputs [n, B + H]."""
        w = self._weights
        context = np.maximum(inputs @ w["context.weight"].T + w["context.bias"], 0.0)
        state = np.tanh(context @ w["start.weight"].T + w["start.bias"])
        return context, state

    def step(
        self, context: Float32, state: Float32, day: Float32, log_rate: Float64, is_first: bool
    ) -> tuple[DecodedDay, Float32]:
        """Advance n forecasts by one day.

        Args:
            context: [n, C] of :meth:`start`.
            state: [n, S] before the day.
            day: [n, D] inputs of the day.
            log_rate: [n] logarithm of the payments a day.
            is_first: whether it is the first day of the forecast.

        Returns:
            the day, and the hidden state [n, S] after it.
        """
        w, size = self._weights, state.shape[1]
        given = day @ w["cell.weight_ih"].T + w["cell.bias_ih"]  # [n, 3 S]: r, z and n
        kept = state @ w["cell.weight_hh"].T + w["cell.bias_hh"]
        gates = _sigmoid(given[:, : 2 * size] + kept[:, : 2 * size])
        new = np.tanh(given[:, 2 * size :] + gates[:, :size] * kept[:, 2 * size :])
        after: Float32 = new + gates[:, size:] * (state - new)
        joined = np.concatenate((after, context), axis=1)
        joined = np.maximum(joined @ w["joined.weight"].T + w["joined.bias"], 0.0)
        output = (joined @ w["output.weight"].T + w["output.bias"]).astype(np.float64)
        return _decoded(output, log_rate, is_first), after


def _decoded(output: Float64, log_rate: Float64, is_first: bool) -> DecodedDay:
    q = len(LEVELS)
    log_mean = np.clip(log_rate + output[:, 0], *LOG_MEAN_RANGE)
    log_dispersion = np.clip(output[:, 1], *LOG_DISPERSION_RANGE)
    base = 0.5 * np.maximum(log_rate, LOG_RATE_MIN)
    return DecodedDay(
        np.exp(log_mean),
        np.exp(log_dispersion),
        _rising(output[:, 2 : 3 + q], base),
        _rising(output[:, 3 + q : 4 + 2 * q], base),
        np.zeros(len(output)) if is_first else output[:, -2],
        output[:, -1],
    )


def _rising(output: Float64, base: Float64) -> Float64:
    """Turn a scale, a first value and steps [n, 1 + Q] into quantiles [n, Q] of at least 0."""
    scale = np.exp(np.clip(base + output[:, 0], *LOG_SCALE_RANGE))[:, None]
    steps = np.concatenate((output[:, 1:2], np.logaddexp(0.0, output[:, 2:])), axis=1)
    rising: Float64 = np.maximum(scale * np.cumsum(steps, axis=1), 0.0)
    return rising


def _sigmoid(z: Float32) -> Float32:
    half: Float32 = 0.5 + 0.5 * np.tanh(0.5 * z)
    return half
