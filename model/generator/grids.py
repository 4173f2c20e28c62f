"""Classes into which a step's time and merchant are divided, and tables of amounts.

    time      ten short gaps up to an hour, later today, seven single days, seven spans of days
    merchant  eight spans of ranks in the list of recent merchants, a new local one, and a hub of
              each group, seen or not

A density is a share for each class, and a simple form within it. So samples have the tails.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.units import DAY_MS

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

SHORT_EDGES_MS = np.array([0, 2, 10, 30, 60, 120, 240, 480, 900, 1800, 3600], np.int64) * 1000
"""Edges of the short gaps."""

DAY_EDGES = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 14, 21, 31, 61, 121, 401], np.int64)
"""Edges of the classes of whole days after the day of the last transaction."""

SHORT_CLASSES = len(SHORT_EDGES_MS) - 1
TODAY = SHORT_CLASSES
"""Class of a gap over an hour that ends on the same day."""
TIME_CLASSES = SHORT_CLASSES + len(DAY_EDGES)

SLOTS = 48
"""Half hours of a day."""
SLOT_MS = DAY_MS // SLOTS
WEEK_MS = 7 * DAY_MS
MONDAY_MS = 4 * DAY_MS
"""The first Monday after 1970-01-01, a Thursday."""

RANK_EDGES = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128], np.int64)
RANKS = int(RANK_EDGES[-1])
"""Merchants that an account's list of recent ones remembers."""
RANK_CLASSES = len(RANK_EDGES) - 1
NEW_LOCAL = RANK_CLASSES
HUB = RANK_CLASSES + 1
"""First of the classes of hubs, one for each group of merchants."""

IMPOSSIBLE = -1e4
"""Logit of a class that cannot be."""
OFFSET_LEAST = -25.0
"""Least logit that a baseline gives a possible class: the network can still raise it."""

HUB_RANK_WEIGHT = 0.02
"""Weight with which the baseline lets an account choose a hub because it was there before."""
LEFT_LEAST = 1e-3
"""Weight of a new local merchant where none is left."""

_MONDAY_SLOTS = 7 * SLOTS


def weekday_of(time_ms: Int64) -> Int64:
    """Return the weekdays; 0 is Monday."""
    return np.asarray((time_ms - MONDAY_MS) // DAY_MS % 7)


def time_edges(now_ms: Int64) -> Int64:
    """Return the edges [n, TIME_CLASSES + 1] of the classes after the times [n]."""
    midnight = now_ms - now_ms % DAY_MS
    short = now_ms[:, None] + SHORT_EDGES_MS
    days = np.maximum(midnight[:, None] + DAY_EDGES * DAY_MS, short[:, -1:])
    return np.concatenate((short, days), 1)


def expected_visits(cumulative: Floats, time_ms: Int64) -> Floats:
    """Return the integral of the weekly rhythm up to the times, in average days.

    Args:
        cumulative: [7 * SLOTS + 1] integral since Monday; it ends with 7.
        time_ms: any shape.
    """
    since = time_ms - MONDAY_MS
    week = since // WEEK_MS
    within = since - week * WEEK_MS
    slot = within // SLOT_MS
    part = (within - slot * SLOT_MS) / SLOT_MS
    low = cumulative[slot]
    return np.asarray(week * 7.0 + low + part * (cumulative[slot + 1] - low))


def time_baseline(
    cumulative: Floats, rate: Floats, edges_ms: Int64, beside: Floats | float = 0.0
) -> Float32:
    """Return the logits [n, TIME_CLASSES] of a Poisson process with the weekly rhythm.

    Args:
        cumulative: see :func:`expected_visits`.
        rate: [n] transactions a day.
        edges_ms: [n, TIME_CLASSES + 1].
        beside: [n, TIME_CLASSES + 1] expected payments of a thief up to the edges.
    """
    passed = expected_visits(cumulative, edges_ms)
    hazard = rate[:, None] * (passed - passed[:, :1]) + beside
    width = np.maximum(np.diff(hazard, axis=1), 1e-12)
    logits = np.maximum(np.log(-np.expm1(-width)) - hazard[:, :-1], OFFSET_LEAST)
    logits[np.diff(edges_ms, axis=1) <= 0] = IMPOSSIBLE
    return logits.astype(np.float32)


def slot_bounds(first_ms: Int64, day_ms: Int64) -> tuple[Int64, Int64]:
    """Return begin and end [n, SLOTS] of a day's half hours, as far as they lie after a time.

    Args:
        first_ms: [n] first time that is allowed.
        day_ms: [n] midnight of the day.
    """
    begin = day_ms[:, None] + np.arange(SLOTS) * SLOT_MS
    end = begin + SLOT_MS
    return np.minimum(np.maximum(begin, first_ms[:, None]), end), end


def slot_baseline(
    cumulative: Floats,
    rate: Floats,
    begin_ms: Int64,
    end_ms: Int64,
    beside: Floats | float = 0.0,
) -> Float32:
    """Return the logits [n, SLOTS] of the half hours, by a Poisson process with the rhythm.

    Args:
        cumulative: see :func:`expected_visits`.
        rate: [n] transactions a day.
        begin_ms, end_ms: [n, SLOTS] see :func:`slot_bounds`.
        beside: [n, SLOTS] expected payments of a thief in whole half hours.
    """
    weekday = weekday_of(end_ms[:, 0] - 1)
    mass = np.diff(cumulative).reshape(7, SLOTS)[weekday]
    width = (mass * rate[:, None] + beside) * ((end_ms - begin_ms) / SLOT_MS)
    width = np.maximum(width, 1e-12)
    logits: Floats = np.log(-np.expm1(-width)) - (np.cumsum(width, 1) - width)
    logits = np.maximum(logits - logits.max(1, keepdims=True), OFFSET_LEAST)
    logits[end_ms <= begin_ms] = IMPOSSIBLE
    return np.asarray(logits, np.float32)


def day_range(time_class: Int64) -> tuple[Int64, Int64]:
    """Return the first day, and the first day after, of classes of whole days (0 is today)."""
    place = np.maximum(time_class - TODAY, 0)
    edges = np.concatenate(([0], DAY_EDGES))
    return edges[place], edges[place + 1]


def merchant_baseline(visited: Int64, local: Floats, left: Floats, hubs: Floats) -> Float32:
    """Return the logits [n, HUB + G] of a choice at random among an account's merchants.

    Args:
        visited: [n] merchants in the list of recent ones.
        local: [n] share of local ones among them. A hub is mostly chosen as a hub, not by its rank.
        left: [n] local merchants in reach that are not in the list.
        hubs: [n, G] weights of the groups of hubs, where a local merchant has 1.
    """
    low, high = RANK_EDGES[:-1], RANK_EDGES[1:]
    ranks = np.maximum(np.minimum(visited[:, None], high) - low, 0).astype(np.float64)
    ranks *= (HUB_RANK_WEIGHT + (1 - HUB_RANK_WEIGHT) * local)[:, None]
    logits = np.empty((len(visited), HUB + hubs.shape[1]))
    with np.errstate(divide="ignore"):
        logits[:, :RANK_CLASSES] = np.maximum(np.log(ranks), IMPOSSIBLE)
        logits[:, HUB:] = np.maximum(np.log(hubs), IMPOSSIBLE)
    logits[:, NEW_LOCAL] = np.log(np.maximum(left, LEFT_LEAST))
    return logits.astype(np.float32)


def rank_class_of(rank: Int64) -> Int64:
    """Return the classes of ranks from 0."""
    return np.searchsorted(RANK_EDGES, rank, side="right") - 1
