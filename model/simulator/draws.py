"""Random draws of the simulated worlds."""

from __future__ import annotations

import numpy as np

from model.simulator.payments import Floats, Ints
from model.simulator.world import Range
from model.units import DAY_MS


def log_uniform(
    rng: np.random.Generator, low: float | Floats, high: float | Floats, size: int
) -> Floats:
    """Draw numbers [size] evenly on a logarithmic scale."""
    drawn: Floats = np.exp(rng.uniform(np.log(low), np.log(high), size))
    return drawn


def whole_numbers(rng: np.random.Generator, bounds: Range, size: int) -> Ints:
    """Draw whole numbers [size] evenly on a logarithmic scale, including both ends."""
    low, high = bounds
    return np.floor(log_uniform(rng, low, high + 1, size)).astype(np.int64)


def events(rng: np.random.Generator, rate: float | Floats, size: int | None = None) -> Ints:
    """Draw the places at which an event happens.

    Args:
        rng: draws them.
        rate: probability of the event, one for all places or [n].
        size: number of places, if there is one rate.
    """
    return np.flatnonzero(rng.random(np.shape(rate) if size is None else size) < rate)


def group_members(count: Ints) -> tuple[Ints, Ints]:
    """Number the members of groups: the group of each, and its number in the group.

    >>> group_members(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    group = np.repeat(np.arange(len(count)), count)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)


def times_within(rng: np.random.Generator, count: Ints, duration_ms: Ints) -> Ints:
    """Draw times since midnight for series of payments.

    Each series is in order, within its duration and within the day.
    """
    duration_ms = np.minimum(duration_ms, DAY_MS - 1)
    start = rng.uniform(0, DAY_MS - duration_ms)
    group, number = group_members(count)
    share = (number + rng.random(len(group))) / count[group]
    return np.minimum(start[group] + share * duration_ms[group], DAY_MS - 1).astype(np.int64)


def check_amounts(rng: np.random.Generator, size: int) -> Floats:
    """Draw amounts [size] of card checks: nothing, a cent or one euro."""
    return rng.choice([0.0, 0.01, 1.0], size, p=[0.5, 0.15, 0.35])
