"""Columns of simulated payments that are not yet in order of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.simulator.world import LEGITIMATE

TO_DRAW = -1
"""Placeholder for a merchant that is not drawn yet."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Payments:
    """Payments of one day; arrays of the same length.

    Attributes:
        account: int64[n].
        time_ms: int64[n] since midnight.
        amount: EUR, not rounded.
        merchant: int64[n], or :data:`TO_DRAW`.
        scenario: int8[n].
    """

    account: Ints
    time_ms: Ints
    amount: Floats
    merchant: Ints
    scenario: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.account)

    @classmethod
    def of(
        cls, account: Ints, time_ms: Ints, amount: Floats, scenario: int = LEGITIMATE
    ) -> Payments:
        """Make payments of one scenario whose merchants are still to be drawn."""
        n = len(account)
        return cls(account, time_ms, amount, np.full(n, TO_DRAW), np.full(n, scenario, np.int8))

    def at(self, rows: NDArray[np.bool_] | Ints) -> Payments:
        """Return the payments at the given places."""
        return Payments(
            self.account[rows],
            self.time_ms[rows],
            self.amount[rows],
            self.merchant[rows],
            self.scenario[rows],
        )

    @staticmethod
    def joined(parts: Sequence[Payments]) -> Payments:
        """Concatenate one or more parts."""
        return Payments(
            np.concatenate([p.account for p in parts]),
            np.concatenate([p.time_ms for p in parts]),
            np.concatenate([p.amount for p in parts]),
            np.concatenate([p.merchant for p in parts]),
            np.concatenate([p.scenario for p in parts]),
        )
