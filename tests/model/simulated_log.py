"""A simulated log in memory, for tests of features and training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from model.features.account import Float32, observe_log
from model.features.merchant import Labels, observe_merchant_log
from model.features.spec import FeatureSpec
from model.simulator.handbook import DayOfTransactions
from model.training.settings import TrainingSettings
from model.training.source import simulator_of


@dataclass(frozen=True)
class SimulatedLog:
    """Transactions in order of time: columns as in :class:`model.data.dataset.Dataset`."""

    day: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    is_fraud: NDArray[np.bool_]
    scenario: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.day)

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """[N] true for every transaction."""
        return np.ones(len(self), np.bool_)


def simulate(settings: TrainingSettings) -> SimulatedLog:
    """Simulate the days of the settings."""
    days: list[DayOfTransactions] = list(islice(simulator_of(settings).days(), settings.days))
    return SimulatedLog(
        day=np.repeat(np.arange(len(days)), [len(d) for d in days]),
        timestamp_ms=np.concatenate([d.timestamp_ms for d in days]),
        account=np.concatenate([d.account for d in days]),
        merchant=np.concatenate([d.merchant for d in days]),
        amount=np.concatenate([d.amount for d in days]),
        is_fraud=np.concatenate([d.is_fraud for d in days]),
        scenario=np.concatenate([d.scenario for d in days]),
    )


def observe_all(log: SimulatedLog, spec: FeatureSpec) -> Float32:
    """Compute the raw features [N, R] of a log whose labels all arrive after the label delay."""
    labels = Labels.delayed(log.is_fraud, log.timestamp_ms, spec.label_delay_ms)
    of_account = observe_log(log.account, log.amount, log.timestamp_ms, spec.scale)
    of_merchant = observe_merchant_log(log.merchant, log.timestamp_ms, labels, spec.label_delay_ms)
    return np.hstack((of_account, of_merchant))
