"""A log of transactions with their truth, as columns: what networks are compared on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from model.simulator import DAY_MS, Simulator

DIGEST_DIGITS = 12


@dataclass(frozen=True)
class LabelledLog:
    """N transactions in order of time.

    Attributes:
        timestamp_ms: [N] epoch milliseconds.
        account, merchant: [N] whole numbers, any.
        amount: [N] in one currency.
        is_fraud: [N] the truth.
        scenario: [N] kind of fraud, 0 for genuine; all 0 or 1 where kinds are not known.
    """

    timestamp_ms: NDArray[np.int64]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    is_fraud: NDArray[np.bool_]
    scenario: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.timestamp_ms)

    @property
    def day(self) -> NDArray[np.int64]:
        """[N] UTC days since 1970-01-01."""
        return self.timestamp_ms // DAY_MS

    def before(self, timestamp_ms: int) -> LabelledLog:
        """Its transactions before that time."""
        end = int(np.searchsorted(self.timestamp_ms, timestamp_ms))
        return LabelledLog(*(getattr(self, field.name)[:end] for field in fields(self)))

    def digest(self) -> str:
        """12 hex digits of the SHA-256 of all columns."""
        digest = hashlib.sha256()
        for field in fields(self):
            column: NDArray[np.generic] = getattr(self, field.name)
            digest.update(field.name.encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:DIGEST_DIGITS]


def simulated_log(
    customers: int = 5000,
    terminals: int = 10_000,
    days: int = 183,
    start_date: str = "2018-04-01",
    seed: int = 1,
) -> LabelledLog:
    """The simulator's first days (:class:`model.simulator.Simulator`)."""
    simulated = list(islice(Simulator(customers, terminals, start_date, seed).days(), days))
    return LabelledLog(
        *(
            np.concatenate([getattr(day, field.name) for day in simulated])
            for field in fields(LabelledLog)
        )
    )
