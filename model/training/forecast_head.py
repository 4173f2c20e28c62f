"""The forecast head: what an account pays in the days to come (many to many, unsynchronised).

The head is fitted after the network, when the hidden states no longer change. Its encoder is the
network as workers run it, frozen. Its decoder is :class:`model.forecast.network.ForecastNetwork`.

    states and days of the training  ->  fit  ->  days of the validation  ->  calibration
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Dataset
from model.features.account import Float32
from model.features.spec import FeatureSpec
from model.forecast.forecaster import Forecaster
from model.forecast.inputs import STEADY_BOOKKEEPING, day_inputs
from model.forecast.network import DayTerms, ForecastNetwork
from model.forecast.shape import DAYS_MAX, LEVELS, LOG_RATE_MIN, ForecastShape
from model.stepper import Stepper
from model.torch_threads import one_thread
from model.training.forecast_calibration import calibrate
from model.training.forecast_measures import measure_forecasts
from model.training.forecast_samples import (
    ForecastSamples,
    StateLog,
    random_moments,
    some_accounts,
)
from model.training.sequences import Sequences
from model.training.split import Split

SAMPLES_MAX = 80_000
"""Moments that are drawn for the training; as many for the calibration."""

TEST_SAMPLES_MAX = 10_000
"""Moments of the held-out days at which a head is measured."""

SAMPLES_FOR_ACCOUNT = 60
"""Moments that are drawn for each account, if there are few accounts."""

SAMPLES_MIN = 200
"""Fewest samples to which a head is fitted."""

BATCH = 512
UPDATES = 1000
"""Most updates; fewer with few samples."""

EPOCHS = 20
"""Epochs with few samples."""

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
GRADIENT_MAX = 1.0

Show = Callable[[float], None]


@dataclass(frozen=True)
class ForecastData:
    """A log from which a forecast head is fitted and measured.

    Attributes:
        dataset: the transactions.
        sequences: the transactions of each account.
        raw: [N, R] raw features, in the order of ``sequences.row``.
        spec: specification of the network's inputs.
        split: the periods.
    """

    dataset: Dataset
    sequences: Sequences
    raw: Float32
    spec: FeatureSpec
    split: Split


@dataclass(frozen=True)
class ForecastHead:
    """A fitted forecast head.

    Attributes:
        shape: sizes of the head.
        weights: its tensors by name, without the prefix of the checkpoint.
    """

    shape: ForecastShape
    weights: dict[str, Float32]


def fit_forecast_head(
    stepper: Stepper,
    data: ForecastData,
    seed: int,
    show: Show = lambda share: None,
) -> ForecastHead | None:
    """Fit and calibrate a head, and measure it; None if the data have too few samples for one.

    The head learns from the training days, and is calibrated on the validation days. Its measures
    are those of the held-out days.

    Args:
        stepper: the network, as workers run it.
        data: the log.
        seed: decides samples and weights.
        show: called with the share done.
    """
    log, split = state_log(stepper, data), data.split
    chosen = some_accounts(data.sequences, seed)
    days = split.training, split.validation
    training = draw_samples(log, chosen, days, split.validation, seed)
    show(0.1)
    if len(training) < SAMPLES_MIN:
        return None
    shape = ForecastShape(bookkeeping=len(STEADY_BOOKKEEPING))
    network = fit_decoder(training, shape, seed, lambda share: show(0.1 + 0.7 * share))
    # Moments before the validation days as well: their later days show the far end of a forecast.
    begin = max(split.training, split.validation - DAYS_MAX // 2)
    held = draw_samples(log, chosen, (begin, split.gap), split.gap, seed + 1, split.validation)
    weights = calibrate(network.weights(), data.spec.scale, held)
    show(0.9)
    test = held_out_samples(log, chosen, split, seed + 2)
    measures = measure_forecasts(Forecaster(weights, data.spec.scale).decode(test.asked), test)
    shape = msgspec.structs.replace(shape, samples=len(training), metrics=measures)
    return ForecastHead(shape, weights)


def state_log(stepper: Stepper, data: ForecastData) -> StateLog:
    """Return the states along a log."""
    return StateLog(data.dataset, data.sequences, data.raw, data.spec, stepper)


def held_out_samples(
    log: StateLog, sequences: Sequences, split: Split, seed: int, size: int = TEST_SAMPLES_MAX
) -> ForecastSamples:
    """Draw moments of the held-out days, of accounts as they are."""
    accounts = int((sequences.length > 0).sum())
    size = min(size, SAMPLES_FOR_ACCOUNT * accounts)
    moments = random_moments(log.dataset, sequences, (split.held_out, split.end), size, seed)
    samples = log.samples(sequences, moments, split.end, split.held_out)
    return samples.take(np.flatnonzero(samples.after.known.any(axis=1)))


def draw_samples(
    log: StateLog,
    sequences: Sequences,
    days: tuple[int, int],
    until_day: int,
    seed: int,
    from_day: int = 0,
    *,
    whole: bool = False,
) -> ForecastSamples:
    """Draw samples: two of accounts as they are for each of an account that begins at a payment.

    Args:
        log: the states along the log.
        sequences: the accounts to draw from.
        days: days of the moments, counted from the first day of the data.
        until_day, from_day: days that are known; the others are masked.
        seed: decides them.
        whole: only accounts as they are.
    """
    accounts = int((sequences.length > 0).sum())
    size = min(SAMPLES_MAX, SAMPLES_FOR_ACCOUNT * accounts)
    moments = random_moments(log.dataset, sequences, days, size, seed)
    parts = [log.samples(sequences, moments, until_day, from_day)]
    if not whole:
        parts.append(_young_samples(log, sequences, days, until_day, seed, from_day, size // 2))
    joined = ForecastSamples.joined(parts)
    return joined.take(np.flatnonzero(joined.after.known.any(axis=1)))


def _young_samples(
    log: StateLog,
    sequences: Sequences,
    days: tuple[int, int],
    until_day: int,
    seed: int,
    from_day: int,
    size: int,
) -> ForecastSamples:
    """Draw samples of accounts that begin at some payment."""
    restarted = sequences.restarted(sequences.length, seed)
    restarted = restarted.with_lengths(restarted.length * (np.arange(len(restarted.length)) % 2))
    young = random_moments(log.dataset, restarted, days, size, seed + 1, young=True)
    return log.samples(restarted, young, until_day, from_day)


def fit_decoder(
    samples: ForecastSamples, shape: ForecastShape, seed: int, show: Show = lambda share: None
) -> ForecastNetwork:
    """Fit the head to samples; it is not calibrated yet."""
    given, _ = samples.asked.given(shape.bookkeeping)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        network = ForecastNetwork.for_inputs(shape, given.shape[1])
        network.standardise(torch.from_numpy(given))
        _descend(network, _Tensors.of(samples, shape.bookkeeping), seed, show)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Tensors:
    inputs: Tensor
    log_rate: Tensor
    days: Tensor
    count: Tensor
    amount: Tensor
    largest: Tensor
    fraud: Tensor
    known: Tensor
    at_risk: Tensor

    @classmethod
    def of(cls, samples: ForecastSamples, bookkeeping: int) -> _Tensors:
        asked, after = samples.asked, samples.after
        inputs, log_rate = asked.given(bookkeeping)
        unit = np.exp(0.5 * np.maximum(log_rate, LOG_RATE_MIN)) * asked.unit
        days = np.stack([day_inputs(asked.first_day, k) for k in range(DAYS_MAX)], axis=1)
        known = np.logical_and.accumulate(after.known, axis=1)
        paid = after.count > 0
        at_risk = known & (np.cumsum(paid, axis=1) - paid == 0)

        def tensor(values: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.float32))

        return cls(
            tensor(inputs),
            tensor(log_rate),
            tensor(days),
            tensor(after.count),
            tensor(after.amount / unit[:, None]),
            tensor(after.largest / unit[:, None]),
            tensor(after.is_fraud),
            tensor(after.known),
            tensor(at_risk),
        )

    def take(self, rows: Tensor) -> _Tensors:
        return _Tensors(*(value[rows] for value in vars(self).values()))


def _descend(network: ForecastNetwork, samples: _Tensors, seed: int, show: Show) -> None:
    m = len(samples.inputs)
    batches = math.ceil(m / BATCH)
    updates = min(UPDATES, EPOCHS * batches)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, updates)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(m, generator=generator)
    begin = 0
    for update in range(updates):
        if begin >= m:
            order, begin = torch.randperm(m, generator=generator), 0
        batch = samples.take(order[begin : begin + BATCH])
        begin += BATCH
        optimizer.zero_grad()
        loss = _loss(network.unroll(batch.inputs, batch.log_rate, batch.days), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_MAX)
        optimizer.step()
        schedule.step()
        if update % 20 == 0:
            show(update / updates)


def _loss(terms: DayTerms, batch: _Tensors) -> Tensor:
    """Return the loss of a day: counts, pinball of the amounts, silence and fraud."""
    days = batch.known.sum().clamp(min=1.0)
    base = torch.exp(0.5 * batch.log_rate.clamp(min=LOG_RATE_MIN))[:, None, None]
    count = _count_loss(terms, batch.count)
    amount = pinball(terms.amount / base, batch.amount)
    largest = pinball(terms.largest / base, batch.largest)
    fraud = F.binary_cross_entropy_with_logits(terms.fraud, batch.fraud, reduction="none")
    paid = (batch.count > 0).to(torch.float32)
    # The count alone decides the first day, and its gradient must not come from here.
    silence = F.binary_cross_entropy_with_logits(terms.hazard, paid, reduction="none")
    whole = (count + amount + largest + fraud) * batch.known + 0.2 * silence * batch.at_risk
    return whole.sum() / days


def _count_loss(terms: DayTerms, count: Tensor) -> Tensor:
    """Return the negative logarithm of the count's probability [n, T], without its constant."""
    r = terms.log_dispersion.exp()
    log_total = torch.logaddexp(terms.log_dispersion, terms.log_mean)  # of r + mean
    gained = torch.lgamma(count + r) - torch.lgamma(r)
    log_p = gained + r * (terms.log_dispersion - log_total) + count * (terms.log_mean - log_total)
    return -log_p + torch.lgamma(count + 1)


def pinball(quantiles: Tensor, truth: Tensor) -> Tensor:
    """Return the pinball loss [n, T], summed over the levels."""
    levels = torch.tensor(LEVELS)
    above = truth.unsqueeze(-1) - quantiles
    return torch.maximum(levels * above, (levels - 1.0) * above).sum(-1)
