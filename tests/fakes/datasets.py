"""Datasets for tests."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.simulator.handbook import Simulator


def rows_of(log: Dataset, rows: NDArray[Any] | slice) -> Dataset:
    """Select rows of a dataset; a row may appear several times."""
    return dataclasses.replace(
        log,
        account=log.account[rows],
        merchant=log.merchant[rows],
        amount=log.amount[rows],
        timestamp_ms=log.timestamp_ms[rows],
        label=log.label[rows],
        scenario=log.scenario[rows],
    )


def simulated_dataset(customers: int, terminals: int, days: int, seed: int = 1) -> Dataset:
    """Simulate the first days in memory."""
    simulated = list(islice(Simulator(customers, terminals, seed=seed).days(), days))

    def column(name: str, kind: Any) -> Any:
        return np.concatenate([getattr(day, name) for day in simulated]).astype(kind)

    return Dataset(
        column("account", np.int32),
        column("merchant", np.int32),
        column("amount", np.float64),
        column("timestamp_ms", np.int64),
        column("is_fraud", np.int8),
        column("scenario", np.int8),
    )
