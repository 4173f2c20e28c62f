"""The features of a merchant: recent transactions and known frauds, in time buckets.

A *profile* holds a merchant's known frauds and its number of transactions in each bucket of three
hours. A transaction sees only closed buckets, and only labels that arrived in closed buckets. So
the order of scoring within a bucket does not matter, and a log and a live stream give the same
features.

    profiles, transactions' rows and times  --observe_merchants-->  raw [m, M]

Labels come late. A transaction older than ``label_delay`` without a fraud label counts as
legitimate. Nothing is known about later ones, so the windows of risk end there.

A known fraud has a *weight* from 0 to 1: the degree to which the merchant explains it
(:mod:`model.merchant_weight`). Sums of frauds are sums of weights. Ages consider only frauds of at
least :data:`STRONG_WEIGHT`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.units import DAY_MS, HOUR_MS, MINUTE_MS

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Rows = NDArray[np.intp]

BUCKET_MS = 3 * HOUR_MS
"""Width of a time bucket, milliseconds.

On the Handbook's data average precision was .0016 lower with six hours, and another .006 lower
with a day (docs/model.md)."""

BUCKETS = 320
"""Capacity of a profile in buckets: 40 days."""

DEPTH = 304
"""Closed buckets that the features cover: 38 days.

The rest of the capacity is for the open bucket and for transactions up to 45 hours late."""

SETTLE_MS = MINUTE_MS
"""Time after a bucket's end when it closes; by then all workers have counted its transactions."""

COUNT_MAX = 65_535
"""Largest count of a bucket."""

WEIGHT_MAX = 255
"""Stored weight of a fraud that only its merchant explains."""

REMEMBERED_WEIGHT = 63
"""Largest weight that is stored as it is; a greater one becomes the full weight.

So the weights of only few transactions must be remembered."""

STRONG_WEIGHT = 128
"""Smallest stored weight of a fraud that counts for the ages of a merchant's frauds."""

MERCHANT_FEATURES: tuple[str, ...] = (
    "merchant_count_1d",  # transactions in the last day, week, 30 days
    "merchant_count_7d",
    "merchant_count_30d",
    "merchant_risk_1d",  # weights of frauds / transactions in these windows, to label_delay ago
    "merchant_risk_7d",
    "merchant_risk_30d",
    "merchant_known_frauds",  # weights of the known frauds in all closed buckets
    "merchant_oldest_fraud_days",  # since the oldest strong fraud's bucket; -1: none
    "merchant_newest_fraud_days",
    "merchant_legitimate_days",  # since the newest labelled bucket with a legitimate one; -1: none
    "merchant_streak_frauds",  # weights of strong frauds in buckets after that one
    "merchant_streak_days",  # since the oldest of them; -1: none
)
"""Names of a merchant's raw features, in the order of the columns."""

WITHOUT_KNOWN_FRAUDS: dict[str, float] = {
    "merchant_risk_1d": 0.0,
    "merchant_risk_7d": 0.0,
    "merchant_risk_30d": 0.0,
    "merchant_known_frauds": 0.0,
    "merchant_oldest_fraud_days": -1.0,
    "merchant_newest_fraud_days": -1.0,
    "merchant_streak_frauds": 0.0,
    "merchant_streak_days": -1.0,
}
"""Features of a merchant without a known fraud, as almost all merchants are."""

_WINDOW_BUCKETS = tuple(days * DAY_MS // BUCKET_MS for days in (1, 7, 30))
_IN_WINDOW = (np.arange(DEPTH)[:, None] >= DEPTH - np.array(_WINDOW_BUCKETS)).astype(np.float32)
"""[DEPTH, 3] closed buckets in each window that ends now.

A float32 holds counts of 30 days exactly, so a product with it is exact, and fast."""

_BUCKET_DAYS = np.float32(BUCKET_MS / DAY_MS)
_NONE = np.float32(-1.0)


def bucket_of(timestamp_ms: Int64) -> Int64:
    """Return the bucket of each transaction or label arrival."""
    return timestamp_ms // BUCKET_MS


def present_bucket(timestamp_ms: Int64) -> Int64:
    """Return the first bucket that each transaction does not see."""
    return (timestamp_ms - SETTLE_MS) // BUCKET_MS


@dataclass
class MerchantProfiles:
    """Profiles of n merchants, as columns.

    Attributes:
        head: int64[n], newest bucket in ``counts``; -1 for a merchant never seen.
        counts: uint16[n, BUCKETS], number of transactions of bucket j at j % BUCKETS, for j in
            (head - BUCKETS, head].
        fraud_row: intp[k], the row of each known fraud, ascending.
        fraud_bucket: int64[k], the bucket of its transaction.
        fraud_known: int64[k], the bucket in which its label arrived.
        fraud_weight: uint8[k], degree to which the merchant explains it, up to
            :data:`WEIGHT_MAX`.
    """

    head: Int64
    counts: NDArray[np.uint16]
    fraud_row: Rows
    fraud_bucket: Int64
    fraud_known: Int64
    fraud_weight: NDArray[np.uint8]

    @classmethod
    def empty(cls, n: int) -> MerchantProfiles:
        """Return the profiles of n merchants never seen."""
        nothing = np.zeros(0, np.int64)
        return cls(
            np.full(n, -1, np.int64),
            np.zeros((n, BUCKETS), np.uint16),
            np.zeros(0, np.intp),
            nothing,
            nothing,
            np.zeros(0, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.head)


@dataclass(frozen=True)
class Labels:
    """Frauds of a log with the arrival of their labels.

    Attributes:
        row: intp[k], row of the transaction.
        arrival_ms: int64[k], arrival of its label, epoch milliseconds.
        weight: uint8[k], degree to which the merchant explains it. None: each has full weight.
    """

    row: Rows
    arrival_ms: Int64
    weight: NDArray[np.uint8] | None = None

    @classmethod
    def delayed(
        cls,
        is_fraud: NDArray[np.bool_],
        timestamp_ms: Int64,
        delay_ms: int,
        weight: NDArray[np.uint8] | None = None,
    ) -> Labels:
        """Return every fraud of a log, known ``delay_ms`` after its transaction.

        Args:
            is_fraud: [N].
            timestamp_ms: [N].
            delay_ms: time until a label arrives.
            weight: uint8[N] weights of the transactions.
        """
        row = np.flatnonzero(is_fraud)
        return cls(row, timestamp_ms[row] + delay_ms, None if weight is None else weight[row])


def observe_merchants(
    profiles: MerchantProfiles, row: Rows, timestamp_ms: Int64, label_delay_ms: int
) -> Float32:
    """Compute the features of m transactions from the profiles of their merchants.

    Args:
        profiles: in, or after, the present buckets of the transactions; not changed.
        row: [m] row of the transaction's merchant in ``profiles``.
        timestamp_ms: [m] event time, epoch milliseconds.
        label_delay_ms: age at which a transaction without a label counts as legitimate.

    Returns:
        raw: [m, M] the columns of :data:`MERCHANT_FEATURES`.
    """
    present = present_bucket(timestamp_ms)
    if len(row) == 0:
        return np.empty((0, len(MERCHANT_FEATURES)), np.float32)
    if len(row) == len(profiles) and np.array_equal(row, np.arange(len(row))):
        return _features(profiles, row, present, label_delay_ms)  # small polls: each merchant once
    # Each merchant is computed once for each bucket, whatever its number of transactions.
    first = int(present.min())
    key = row * (int(present.max()) - first + 1) + (present - first)
    _, where, place = np.unique(key, return_index=True, return_inverse=True)
    return _features(profiles, row[where], present[where], label_delay_ms)[place]


def _features(
    profiles: MerchantProfiles, row: Rows, present: Int64, label_delay_ms: int
) -> Float32:
    """Compute the features [n, M] of profiles ``row`` [n] in their present buckets [n].

    Array columns are closed buckets: column i is bucket present - DEPTH + i.
    """
    # Labels of the columns before it have arrived.
    labelled = DEPTH - -(-label_delay_ms // BUCKET_MS)
    counts = _closed_counts(profiles, row, present)  # [n, DEPTH]
    raw = np.empty((len(MERCHANT_FEATURES), len(row)), np.float32)
    raw[:3] = (counts.astype(np.float32) @ _IN_WINDOW).T
    raw[3:7] = 0.0
    raw[7:9] = _NONE
    raw[9] = _days_since_last(counts[:, :labelled] > 0)
    raw[10] = 0.0
    raw[11] = _NONE
    rated, frauds = _known_frauds(profiles, row, present)
    if len(rated):
        raw[3:, rated] = _fraud_features(counts[rated], frauds, labelled)
    return np.ascontiguousarray(raw.T)


@dataclass(frozen=True)
class _KnownFrauds:
    """Known frauds of r merchants in each closed bucket.

    Attributes:
        number: int32[r, DEPTH] number of frauds.
        weight: float32[r, DEPTH] sum of their weights.
        strong: float32[r, DEPTH] sum of the weights of the strong ones.
    """

    number: NDArray[np.int32]
    weight: Float32
    strong: Float32


def _closed_counts(profiles: MerchantProfiles, row: Rows, present: Int64) -> NDArray[np.uint16]:
    """Return the number of transactions [n, DEPTH] in each closed bucket."""
    counts = np.empty((len(row), DEPTH), np.uint16)
    for bucket in set(present.tolist()):  # almost always one or two
        chosen = (present == bucket).nonzero()[0]
        start = (bucket - DEPTH) % BUCKETS
        before_end = min(DEPTH, BUCKETS - start)
        ring = profiles.counts[row[chosen]]
        counts[chosen, :before_end] = ring[:, start : start + before_end]
        counts[chosen, before_end:] = ring[:, : DEPTH - before_end]
    # The ring holds buckets (head - BUCKETS, head]; its other entries are older ones.
    ahead = profiles.head[row] - present
    if (ahead < -1).any() or (ahead >= BUCKETS - DEPTH).any():
        column = np.arange(DEPTH)
        held = column <= (ahead + DEPTH)[:, None]
        held &= column > (ahead + DEPTH - BUCKETS)[:, None]
        counts[~held] = 0
    return counts


def _known_frauds(
    profiles: MerchantProfiles, row: Rows, present: Int64
) -> tuple[Rows, _KnownFrauds]:
    """Return the merchants with known frauds, [r] of n, and these frauds."""
    zeros = np.zeros((0, DEPTH), np.float32)
    nothing = np.zeros(0, np.intp), _KnownFrauds(zeros.astype(np.int32), zeros, zeros)
    if len(profiles.fraud_row) == 0:
        return nothing
    begin = np.searchsorted(profiles.fraud_row, row, side="left")
    many = np.searchsorted(profiles.fraud_row, row, side="right") - begin
    of = np.repeat(np.arange(len(row)), many)  # [pairs] of a row and a fraud of its merchant
    fraud = np.arange(len(of)) + np.repeat(begin - (np.cumsum(many) - many), many)
    column = profiles.fraud_bucket[fraud] - present[of] + DEPTH
    seen = (profiles.fraud_known[fraud] < present[of]) & (column >= 0) & (column < DEPTH)
    if not seen.any():
        return nothing
    rated, place = np.unique(of[seen], return_inverse=True)
    stored = profiles.fraud_weight[fraud][seen].astype(np.int64)
    cell = place * DEPTH + column[seen]

    def summed(values: NDArray[np.int64]) -> NDArray[np.float64]:
        sums = np.bincount(cell, values.astype(np.float64), len(rated) * DEPTH)
        return np.asarray(sums.reshape(-1, DEPTH), np.float64)

    return rated, _KnownFrauds(
        summed(np.ones_like(stored)).astype(np.int32),
        (summed(stored) / WEIGHT_MAX).astype(np.float32),
        (summed(np.where(stored >= STRONG_WEIGHT, stored, 0)) / WEIGHT_MAX).astype(np.float32),
    )


def _fraud_features(counts: NDArray[np.uint16], frauds: _KnownFrauds, labelled: int) -> Float32:
    """Compute the features from the third on, [M - 3, r], of r merchants with known frauds.

    Args:
        counts: [r, DEPTH] transactions.
        frauds: their known frauds.
        labelled: the labels of the columns before it have arrived.
    """
    raw = np.empty((len(MERCHANT_FEATURES) - 3, len(counts)), np.float32)
    for i, window in enumerate(_WINDOW_BUCKETS):
        inside = slice(max(labelled - window, 0), labelled)
        known = frauds.weight[:, inside].sum(axis=1, dtype=np.float32)
        # A crash can lose or repeat counts, so the rate is limited to 1.
        seen = counts[:, inside].sum(axis=1, dtype=np.float32)
        raw[i] = known / np.maximum(np.maximum(seen, known), 1)
    raw[3] = frauds.weight.sum(axis=1)
    there = frauds.strong > 0
    oldest = (DEPTH - there.argmax(axis=1)) * _BUCKET_DAYS
    raw[4] = np.where(there.any(axis=1), oldest, _NONE)
    raw[5] = _days_since_last(there)
    legitimate = counts[:, :labelled] > frauds.number[:, :labelled]
    raw[6] = _days_since_last(legitimate)
    last = labelled - 1 - legitimate[:, ::-1].argmax(axis=1)
    last_legitimate = np.where(legitimate.any(axis=1), last, -1)
    streak = there & (np.arange(DEPTH) > last_legitimate[:, None])
    raw[7] = np.where(streak, frauds.strong, 0.0).sum(axis=1)
    raw[8] = np.where(streak.any(axis=1), (DEPTH - streak.argmax(axis=1)) * _BUCKET_DAYS, _NONE)
    return raw


def _days_since_last(there: NDArray[np.bool_]) -> Float32:
    """Return the days [n] since the bucket of each row's last True column; -1 without one.

    Args:
        there: [n, columns], the first columns of the closed buckets.
    """
    if there.shape[1] == 0:
        return np.full(len(there), _NONE)
    last = there.shape[1] - 1 - there[:, ::-1].argmax(axis=1)
    return np.where(there.any(axis=1), (DEPTH - last) * _BUCKET_DAYS, _NONE)


def observe_merchant_log(
    merchant: Int64, timestamp_ms: Int64, labels: Labels, label_delay_ms: int
) -> Float32:
    """Compute the features of merchants for a whole log, from empty profiles.

    Memory: 640 bytes for each merchant.

    Args:
        merchant: [N] any whole numbers.
        timestamp_ms: [N] ascending.
        labels: the frauds of the log and the arrival of their labels.
        label_delay_ms: see :func:`observe_merchants`.

    Returns:
        raw: [N, M] in the order of the log.
    """
    raw = np.empty((len(merchant), len(MERCHANT_FEATURES)), np.float32)
    if len(merchant) == 0:
        return raw
    names, code = np.unique(merchant, return_inverse=True)
    ring = np.zeros((len(names), BUCKETS), np.uint16)
    head = bucket_of(timestamp_ms[:1])[0]  # newest bucket in the ring
    arrived = _ArrivedLabels(code, timestamp_ms, labels)
    present = present_bucket(timestamp_ms)
    counted = 0
    starts = np.flatnonzero(np.diff(present, prepend=present[0] - 1))
    for start, stop in zip(starts, np.append(starts[1:], len(merchant)), strict=True):
        bucket = int(present[start])
        closed = int(np.searchsorted(timestamp_ms, bucket * BUCKET_MS))
        head = _count(ring, head, code[counted:closed], bucket_of(timestamp_ms[counted:closed]))
        counted = max(counted, closed)
        there, place = np.unique(code[start:stop], return_inverse=True)
        profiles = MerchantProfiles(
            np.full(len(there), head), ring[there], *arrived.before(bucket, there)
        )
        raw[start:stop] = observe_merchants(
            profiles, place, timestamp_ms[start:stop], label_delay_ms
        )
    return raw


def _count(ring: NDArray[np.uint16], head: int, code: Rows, bucket: Int64) -> int:
    """Count transactions in the ring of all merchants, and return its newest bucket."""
    if len(code) == 0:
        return head
    newest = int(bucket[-1])
    opened = np.arange(max(head + 1, newest - BUCKETS + 1), newest + 1) % BUCKETS
    ring[:, opened] = 0
    column = bucket % BUCKETS
    kept = bucket > newest - BUCKETS
    pair, many = np.unique(code[kept] * BUCKETS + column[kept], return_counts=True)
    flat = ring.reshape(-1)
    flat[pair] = np.minimum(flat[pair].astype(np.int64) + many, COUNT_MAX)
    return max(head, newest)


class _ArrivedLabels:
    """The frauds of a log in the order in which their labels arrive."""

    def __init__(self, code: Rows, timestamp_ms: Int64, labels: Labels) -> None:
        order = np.argsort(labels.arrival_ms, kind="stable")
        row = labels.row[order]
        self._code = code[row]
        self._bucket = bucket_of(timestamp_ms[row])
        self._known = bucket_of(labels.arrival_ms[order])
        self._weight = np.full(len(row), WEIGHT_MAX, np.uint8)
        if labels.weight is not None:
            self._weight = labels.weight[order]

    def before(self, bucket: int, there: Rows) -> tuple[Rows, Int64, Int64, NDArray[np.uint8]]:
        """Return the frauds of merchants ``there`` (ascending) known before a bucket."""
        end = np.searchsorted(self._known, bucket)
        recent = np.flatnonzero(self._bucket[:end] >= bucket - DEPTH)
        place = np.searchsorted(there, self._code[recent])
        found = there[np.minimum(place, len(there) - 1)] == self._code[recent]
        recent, place = recent[found], place[found]
        order = np.argsort(place, kind="stable")
        recent = recent[order]
        return place[order], self._bucket[recent], self._known[recent], self._weight[recent]
