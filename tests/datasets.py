"""Datasets for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from numpy.typing import NDArray

from model.dataset import Dataset


def rows_of(log: Dataset, rows: NDArray[Any] | slice) -> Dataset:
    """Some rows of a dataset, as often as they are named."""
    return dataclasses.replace(
        log,
        account=log.account[rows],
        merchant=log.merchant[rows],
        amount=log.amount[rows],
        timestamp_ms=log.timestamp_ms[rows],
        label=log.label[rows],
        scenario=log.scenario[rows],
    )
