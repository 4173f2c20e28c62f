"""Episodes of fraud on an account: how many frauds each has, decided when it begins.

A thief spends until he is stopped, so frauds come in episodes. If each fraud decided by itself
whether one more follows, many episodes would end after one or two. So the number is drawn at the
first fraud, and the network is told how many are left.

In real histories the number is known afterwards. It is a power of the account's rate of payments,
times a factor that is drawn.

Frauds come beside the owner's payments, or among them. The rhythm tells: it has the payments by
which an account in an episode exceeds its own rate, by the half hour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.generator.grids import SLOT_MS, SLOTS, weekday_of
from model.generator.times_by_code import TimesByCode
from model.units import DAY_MS

Floats = NDArray[np.float64]
Int64 = NDArray[np.int64]

EPISODE_DAYS = 30.0
"""Days without a fraud after which the next one begins another episode."""

EPISODE_QUANTILES = 17
EPISODE_FRAUDS_MAX = 1000
"""Most frauds that are drawn for an episode."""

_PRIOR_EPISODES = 10.0
"""Episodes as which a number of frauds that does not depend on the rate counts."""
_SLOPE_MAX = 1.0
_EXTREME_SHARE = 0.02
EXCESS_LEAST = 0.25
"""Least excess of payments, for each fraud that follows another one. Below, there is no rhythm."""
_EXCESS_DEVIATIONS = 3.0
_RHYTHM_LEAST = 0.02
"""Least rate of a half hour, relative to the mean."""
_SMOOTHINGS = 2


@dataclass(frozen=True)
class Episodes:
    """Episodes of a log.

    Attributes:
        left: [N] frauds that follow in the episode of each fraud on an account; 0 elsewhere.
        slope: [1] exponent of the rate.
        sizes: [EPISODE_QUANTILES] quantiles of the log of the number of frauds at a rate of 1.
        rhythm: [SLOTS] payments a day beside the owner's, by half hour; 0 if frauds are among his.
    """

    left: Int64
    slope: Floats
    sizes: Floats
    rhythm: Floats


def find_episodes(
    log: Dataset,
    on_account: NDArray[np.bool_],
    rate: Floats,
    usual: Floats,
    rng: np.random.Generator,
) -> Episodes:
    """Find the episodes of frauds on accounts.

    Args:
        log: the transactions.
        on_account: [N] which transactions are frauds on the account itself.
        rate: [accounts] log of transactions a day.
        usual: [7 * SLOTS + 1] integral of the weekly rhythm of all payments.
        rng: spreads numbers within one, as the quantiles are of a continuous quantity.
    """
    left = np.zeros(len(log), np.int64)
    fraud = np.flatnonzero(on_account)
    order = fraud[np.lexsort((log.timestamp_ms[fraud], log.account[fraud]))]
    if not len(order):
        return Episodes(left, np.zeros(1), np.zeros(EPISODE_QUANTILES), np.zeros(SLOTS))
    time, account = log.timestamp_ms[order], log.account[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (np.diff(account) != 0) | (np.diff(time) >= EPISODE_DAYS * DAY_MS)
    number = np.cumsum(first) - 1
    size = np.bincount(number)
    begin = np.flatnonzero(first)
    left[order] = size[number] - 1 - (np.arange(len(order)) - begin[number])
    rates = rate[account[begin]]
    logs = np.log(size - 0.5 + rng.random(len(size)))
    off = rates - rates.mean()
    prior = _PRIOR_EPISODES * max(float(rates.var()), 1e-6)
    slope = float(np.clip((off * logs).sum() / ((off**2).sum() + prior), 0.0, _SLOPE_MAX))
    shares = np.linspace(_EXTREME_SHARE, 1 - _EXTREME_SHARE, EPISODE_QUANTILES)
    end = np.append(begin[1:], len(order)) - 1
    spans = _Spans(account[begin], time[begin], time[end])
    sizes = np.quantile(logs - slope * rates, shares)
    rhythm = _rhythm(log, spans, len(order) - len(size), rate, usual)
    return Episodes(left, np.array([slope]), sizes, rhythm)


@dataclass(frozen=True)
class _Spans:
    """Spans [E] of time of accounts, from the first fraud of an episode to its last one."""

    account: NDArray[np.int32]
    begin_ms: Int64
    end_ms: Int64


def _rhythm(log: Dataset, spans: _Spans, followed: int, rate: Floats, usual: Floats) -> Floats:
    """Return the payments a day beside the owner's while an episode lasts, by half hour [SLOTS].

    Args:
        log: the transactions.
        spans: the episodes.
        followed: number of frauds that follow another one of their episode.
        rate, usual: see :func:`find_episodes`.
    """
    times = TimesByCode(log.account, log.timestamp_ms)
    low, high = (times.place(spans.account, at, "right") for at in (spans.begin_ms, spans.end_ms))
    mass = np.diff(usual).reshape(7, SLOTS)
    paid, expected, days = np.zeros(SLOTS), np.zeros(SLOTS), np.zeros(SLOTS)
    for place, account in enumerate(spans.account.tolist()):
        time = log.timestamp_ms[times.row[low[place] : high[place]]]
        np.add.at(paid, time // SLOT_MS % SLOTS, 1)
        first, last = spans.begin_ms[place] // SLOT_MS, spans.end_ms[place] // SLOT_MS
        slot = np.arange(first, last + 1)
        part = np.minimum((slot + 1) * SLOT_MS, spans.end_ms[place])
        part = (part - np.maximum(slot * SLOT_MS, spans.begin_ms[place])) / SLOT_MS
        at = slot % SLOTS
        np.add.at(days, at, part / SLOTS)
        own = mass[weekday_of(slot * SLOT_MS), at] * np.exp(rate[account])
        np.add.at(expected, at, own * part)
    excess = paid - expected
    noise = _EXCESS_DEVIATIONS * np.sqrt(expected.sum())
    if excess.sum() < max(EXCESS_LEAST * followed, noise):
        return np.zeros(SLOTS)
    for _ in range(_SMOOTHINGS):
        excess, days = (
            (np.roll(part, 1) + 2 * part + np.roll(part, -1)) / 4 for part in (excess, days)
        )
    found = np.maximum(excess, 0) / np.maximum(days, days.mean() / SLOTS)
    return np.asarray(np.maximum(found, _RHYTHM_LEAST * found.mean()))


def draw_size(slope: Floats, sizes: Floats, rate: Floats, share: Floats) -> Int64:
    """Draw the numbers of frauds [n] of episodes that begin.

    Args:
        slope, sizes: see :class:`Episodes`.
        rate: [n] log of transactions a day.
        share: [n] uniform numbers.
    """
    logs = slope[0] * rate + np.interp(share, np.linspace(0, 1, len(sizes)), sizes)
    most = np.log(EPISODE_FRAUDS_MAX)
    return np.asarray(np.maximum(np.round(np.exp(np.minimum(logs, most))), 1), np.int64)
