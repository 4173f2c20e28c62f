"""Columns of simulated payments that are not yet in order of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.simulator.world import LEGITIMATE, Range
from model.units import DAY_MS

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


def log_uniform(
    rng: np.random.Generator, low: float | Floats, high: float | Floats, size: int
) -> Floats:
    """Draw numbers [size] evenly on a logarithmic scale."""
    drawn: Floats = np.exp(rng.uniform(np.log(low), np.log(high), size))
    return drawn


def whole(rng: np.random.Generator, bounds: Range, size: int) -> Ints:
    """Draw whole numbers [size] evenly on a logarithmic scale, including both ends."""
    low, high = bounds
    return np.floor(log_uniform(rng, low, high + 1, size)).astype(np.int64)


def chosen(rng: np.random.Generator, rate: float | Floats, size: int | None = None) -> Ints:
    """Draw the places at which an event happens.

    Args:
        rng: draws them.
        rate: probability of the event, one for all places or [n].
        size: number of places, if there is one rate.
    """
    return np.flatnonzero(rng.random(np.shape(rate) if size is None else size) < rate)


def numbered(count: Ints) -> tuple[Ints, Ints]:
    """Number the members of groups: the group of each, and its number in the group.

    >>> numbered(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    group = np.repeat(np.arange(len(count)), count)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)


def within(rng: np.random.Generator, count: Ints, duration_ms: Ints) -> Ints:
    """Draw times since midnight for series of payments.

    Each series is in order, within its duration and within the day.
    """
    duration_ms = np.minimum(duration_ms, DAY_MS - 1)
    start = rng.uniform(0, DAY_MS - duration_ms)
    group, number = numbered(count)
    share = (number + rng.random(len(group))) / count[group]
    return np.minimum(start[group] + share * duration_ms[group], DAY_MS - 1).astype(np.int64)


def check_amounts(rng: np.random.Generator, size: int) -> Floats:
    """Draw amounts [size] of card checks: nothing, a cent or one euro."""
    return rng.choice([0.0, 0.01, 1.0], size, p=[0.5, 0.15, 0.35])
