"""Forecast heads for tests: random weights, and a calibration that changes something."""

from __future__ import annotations

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.features.account import AccountHistory
from model.forecast.inputs import STEADY_BOOKKEEPING
from model.forecast.network import ForecastNetwork
from model.forecast.shape import ForecastShape

SHAPE = ForecastShape(context_size=12, hidden_size=6, bookkeeping=len(STEADY_BOOKKEEPING))
FIRST_SHAPE = ForecastShape(context_size=12, hidden_size=6)
"""Shape of a head from before the second bookkeeping; its header does not say it."""


def random_decoder(encoder: int, seed: int = 3, shape: ForecastShape = SHAPE) -> ForecastNetwork:
    """Make an untrained head whose outputs differ from day to day and account to account."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ForecastNetwork(shape, encoder)
        with torch.no_grad():
            network.output.weight.mul_(10.0)
        network.standardise(torch.randn(50, network.context.in_features) * 2.0 + 0.5)
    return network.eval().requires_grad_(False)


def with_random_forecast(
    checkpoint: Checkpoint, seed: int = 3, shape: ForecastShape = SHAPE
) -> Checkpoint:
    """Add an untrained head to a checkpoint, with a calibration of its own for every group."""
    weights = random_decoder(checkpoint.header.architecture.hidden_size, seed, shape).weights()
    rng = np.random.default_rng(seed)
    for name, value in weights.items():
        if name.startswith("calibration."):
            weights[name] = value * rng.uniform(0.8, 1.25, value.shape).astype(np.float32)
    return checkpoint.with_forecast(shape, weights)


def some_histories(n: int, seed: int = 1) -> AccountHistory:
    """Make histories of accounts of all lengths, with payments up to 2 July 2018."""
    rng = np.random.default_rng(seed)
    count = np.ceil(np.exp(rng.uniform(0, 7, n)))
    history = AccountHistory.empty(n)
    history.count[:] = count
    history.last_event_ms[:] = 1_530_500_000_000 - rng.integers(0, 40 * 86_400_000, n)
    for window, days in enumerate((1, 7, 30)):
        history.decayed_count[:, window] = 1 + np.minimum(count - 1, rng.uniform(0, 3 * days, n))
    history.usual_amount[:] = np.exp(rng.uniform(0, 6, n))
    history.decayed_amount[:] = history.decayed_count * history.usual_amount[:, None]
    history.decayed_amount *= rng.uniform(0.5, 2, (n, 3)).astype(np.float32)
    history.usual_count[:] = np.minimum(count, 100)
    return history
