"""The forecast head in PyTorch, for training: all days of many accounts at once.

A worker's side is :class:`model.forecast.decoder.Decoder`, with the same weights and without torch.
The two agree to 1e-5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.forecast.inputs import DAY_INPUTS
from model.forecast.shape import (
    CALIBRATION_SHAPES,
    LEVELS,
    LOG_DISPERSION_RANGE,
    LOG_MEAN_RANGE,
    LOG_RATE_MIN,
    LOG_SCALE_RANGE,
    OUTPUTS,
    ForecastShape,
)

LOG_NONE_MIN = -30.0
"""Smallest logarithm of the probability of a day without payment."""


class DayTerms(NamedTuple):
    """The terms of n forecasts of T days.

    Attributes:
        log_mean: [n, T] logarithm of the expected number of payments.
        log_dispersion: [n, T].
        amount: [n, T, Q] quantiles in units of the usual amount; under 0 counts as 0.
        largest: [n, T, Q] quantiles of the largest payment.
        hazard: [n, T] logit that the account pays on the day, if it was silent before.
        fraud: [n, T] logit that a payment of the day is fraud.
    """

    log_mean: Tensor
    log_dispersion: Tensor
    amount: Tensor
    largest: Tensor
    hazard: Tensor
    fraud: Tensor


class ForecastNetwork(nn.Module):
    """Decoder that unrolls an account's state over the days to come (many to many).

    Args:
        shape: sizes of the head.
        encoder: size of the account's hidden state.

    Attributes:
        mean, deviation: [B + H] by which inputs are standardised; not in the checkpoint, because
            :meth:`weights` folds them into the first layer.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: ForecastShape, encoder: int) -> None:
        super().__init__()
        inputs = shape.bookkeeping + encoder
        self.shape = shape
        self.context = nn.Linear(inputs, shape.context_size)
        self.start = nn.Linear(shape.context_size, shape.hidden_size)
        self.cell = nn.GRU(len(DAY_INPUTS), shape.hidden_size, batch_first=True)
        self.joined = nn.Linear(shape.hidden_size + shape.context_size, shape.context_size)
        self.output = nn.Linear(shape.context_size, OUTPUTS)
        with torch.no_grad():
            self.output.weight.mul_(0.1)
        self.register_buffer("mean", torch.zeros(inputs), persistent=False)
        self.register_buffer("deviation", torch.ones(inputs), persistent=False)

    @classmethod
    def for_inputs(cls, shape: ForecastShape, inputs: int) -> ForecastNetwork:
        """Make a network for this number of inputs, B + H."""
        return cls(shape, inputs - shape.bookkeeping)

    def standardise(self, inputs: Tensor) -> None:
        """Take mean and deviation of the inputs from samples [m, B + H]."""
        self.mean.copy_(inputs.mean(0))
        self.deviation.copy_(inputs.std(0).clamp(min=1e-2))

    def unroll(self, inputs: Tensor, log_rate: Tensor, days: Tensor) -> DayTerms:
        """Forecast T days of n accounts at once.

        Args:
            inputs: [n, B + H] of :class:`model.forecast.inputs.AskedStates`.
            log_rate: [n].
            days: [n, T, D] of :func:`model.forecast.inputs.day_inputs`.
        """
        context = F.relu(self.context((inputs - self.mean) / self.deviation))  # [n, C]
        state = torch.tanh(self.start(context)).unsqueeze(0)  # [1, n, S]
        states, _ = self.cell(days, state)  # [n, T, S]
        repeated = context.unsqueeze(1).expand(-1, days.shape[1], -1)
        joined = F.relu(self.joined(torch.cat((states, repeated), -1)))
        return terms(self.output(joined), log_rate)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return the tensors by the names of a checkpoint, with a neutral calibration."""
        named = {
            k.replace("_l0", ""): v.numpy(force=True).copy() for k, v in self.state_dict().items()
        }
        deviation, mean = self.deviation.numpy(force=True), self.mean.numpy(force=True)
        named["context.weight"] = named["context.weight"] / deviation
        named["context.bias"] = named["context.bias"] - named["context.weight"] @ mean
        for name, shape in CALIBRATION_SHAPES.items():
            neutral = 0.0 if name in ("calibration.silent", "calibration.fraud") else 1.0
            named[name] = np.full(shape, neutral, np.float32)
        return {name: value.astype(np.float32) for name, value in named.items()}


def terms(output: Tensor, log_rate: Tensor) -> DayTerms:
    """Turn raw outputs [n, T, :data:`OUTPUTS`] into the terms of each day."""
    q = len(LEVELS)
    rate = log_rate.unsqueeze(-1)  # [n, 1]
    log_mean = (rate + output[..., 0]).clamp(*LOG_MEAN_RANGE)
    log_dispersion = output[..., 1].clamp(*LOG_DISPERSION_RANGE)
    base = 0.5 * rate.clamp(min=LOG_RATE_MIN)
    hazard = pays_logit(log_mean, log_dispersion)
    shift = output[..., -2].clone()
    shift[:, 0] = 0.0  # on the first day the two are one
    return DayTerms(
        log_mean,
        log_dispersion,
        _rising(output[..., 2 : 3 + q], base),
        _rising(output[..., 3 + q : 4 + 2 * q], base),
        hazard + shift,
        output[..., -1],
    )


def pays_logit(log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Return the logit that a negative binomial count is not 0."""
    log_none = -log_dispersion.exp() * torch.log1p((log_mean - log_dispersion).exp())
    return torch.log(torch.expm1(-log_none.clamp(LOG_NONE_MIN, -1e-7)))


def _rising(output: Tensor, base: Tensor) -> Tensor:
    """Turn a scale, a first value and steps [..., 1 + Q] into rising quantiles [..., Q]."""
    scale = (base + output[..., 0]).clamp(*LOG_SCALE_RANGE).exp().unsqueeze(-1)
    steps = torch.cat((output[..., 1:2], F.softplus(output[..., 2:])), -1)
    return scale * steps.cumsum(-1)
