"""Merchants' features: a log and a stream give the same, and nothing looks ahead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.features import Float32, Int64
from model.merchants import (
    BUCKET_MS,
    BUCKETS,
    DEPTH,
    MERCHANT_FEATURES,
    SETTLE_MS,
    Labels,
    MerchantProfiles,
    bucket_of,
    observe_merchant_log,
    observe_merchants,
    present_bucket,
)

DAY_MS = 86_400_000
START_MS = 1_522_540_800_000
DELAY_MS = 2 * DAY_MS
BUCKETS_A_DAY = DAY_MS // BUCKET_MS

Truth = NDArray[np.bool_]
Log = tuple[Int64, Int64, Truth]


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Up to 80 transactions at up to 4 merchants over some weeks, many of them fraud."""
    size = draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    longest_ms = draw(st.sampled_from([BUCKET_MS // 3, DAY_MS, 12 * DAY_MS]))
    gaps = rng.integers(0, longest_ms, size)
    return rng.integers(0, 4, size), START_MS + np.cumsum(gaps), rng.random(size) < 0.4


def observed(log: Log, delay_ms: int = DELAY_MS) -> Float32:
    merchant, timestamp_ms, is_fraud = log
    labels = Labels.delayed(is_fraud, timestamp_ms, delay_ms)
    return observe_merchant_log(merchant, timestamp_ms, labels, delay_ms)


def slowly(log: Log, row: int, delay_ms: int = DELAY_MS) -> dict[str, float]:
    """What the names say, counted from the log transaction by transaction."""
    merchant, timestamp_ms, _ = log
    now = int(present_bucket(timestamp_ms[row : row + 1])[0])
    horizon = now - -(-delay_ms // BUCKET_MS)
    counts = dict.fromkeys(range(now - DEPTH, now), 0)
    frauds = dict.fromkeys(range(now - DEPTH, now), 0)
    for other, time_ms, fraud in zip(*(c.tolist() for c in log), strict=True):
        bucket = time_ms // BUCKET_MS
        if other != merchant[row] or bucket not in counts:
            continue
        counts[bucket] += 1
        frauds[bucket] += fraud and (time_ms + delay_ms) // BUCKET_MS < now

    def days(bucket: int | None) -> float:
        return -1.0 if bucket is None else (now - bucket) / BUCKETS_A_DAY

    said: dict[str, float] = {}
    for window in (1, 7, 30):
        width = window * BUCKETS_A_DAY
        said[f"merchant_count_{window}d"] = sum(counts[b] for b in range(now - width, now))
        rated = [b for b in range(horizon - width, horizon) if b in counts]
        seen = sum(counts[b] for b in rated)
        said[f"merchant_risk_{window}d"] = sum(frauds[b] for b in rated) / max(seen, 1)
    known = [b for b in frauds if frauds[b]]
    genuine = [b for b in counts if b < horizon and counts[b] > frauds[b]]
    newest_genuine = max(genuine, default=None)
    streak = [b for b in known if newest_genuine is None or b > newest_genuine]
    return said | {
        "merchant_known_frauds": sum(frauds.values()),
        "merchant_oldest_fraud_days": days(min(known, default=None)),
        "merchant_newest_fraud_days": days(max(known, default=None)),
        "merchant_genuine_days": days(newest_genuine),
        "merchant_streak_frauds": sum(frauds[b] for b in streak),
        "merchant_streak_days": days(min(streak, default=None)),
    }


@settings(max_examples=60, deadline=None)
@given(logs())
def test_features_are_what_their_names_say_by_a_slow_count_over_the_log(log: Log) -> None:
    raw = observed(log)
    for row in range(len(raw)):
        found = dict(zip(MERCHANT_FEATURES, raw[row].tolist(), strict=True))
        assert found == pytest.approx(slowly(log, row))


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(0, 80))
def test_no_feature_changes_when_later_transactions_are_removed(log: Log, end: int) -> None:
    earlier = tuple(column[:end] for column in log)
    np.testing.assert_array_equal(observed(log)[:end], observed(earlier))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(0, 79))
def test_no_feature_changes_with_labels_that_had_not_arrived(log: Log, row: int) -> None:
    merchant, timestamp_ms, is_fraud = log
    row = min(row, len(merchant) - 1)
    now = present_bucket(timestamp_ms[row : row + 1])
    late = bucket_of(timestamp_ms + DELAY_MS) >= now
    otherwise = (merchant, timestamp_ms, is_fraud ^ late)
    np.testing.assert_array_equal(observed(log)[row], observed(otherwise)[row])


@settings(max_examples=60, deadline=None)
@given(logs())
def test_a_profile_kept_transaction_by_transaction_gives_the_features_of_the_log(log: Log) -> None:
    """As a worker does: each looks at the profile as it is when it comes, and is counted then."""
    merchant, timestamp_ms, is_fraud = log
    profiles = MerchantProfiles.empty(4)
    arrivals = Labels.delayed(is_fraud, timestamp_ms, DELAY_MS)
    raw = np.empty((len(merchant), len(MERCHANT_FEATURES)), np.float32)
    for row in range(len(merchant)):
        arrived = arrivals.arrival_ms <= timestamp_ms[row]
        known = arrivals.row[arrived]
        order = np.argsort(merchant[known], kind="stable")
        profiles.fraud_row = merchant[known][order]
        profiles.fraud_bucket = bucket_of(timestamp_ms[known])[order]
        profiles.fraud_known = bucket_of(arrivals.arrival_ms[arrived])[order]
        at = slice(row, row + 1)
        raw[at] = observe_merchants(profiles, merchant[at], timestamp_ms[at], DELAY_MS)
        count(profiles, int(merchant[row]), int(bucket_of(timestamp_ms[at])[0]))
    np.testing.assert_array_equal(raw, observed(log))


def count(profiles: MerchantProfiles, merchant: int, bucket: int) -> None:
    """Adds a transaction to a ring."""
    head = int(profiles.head[merchant])
    for opened in range(max(head + 1, bucket - BUCKETS + 1), bucket + 1):
        profiles.counts[merchant, opened % BUCKETS] = 0
    profiles.head[merchant] = max(head, bucket)
    profiles.counts[merchant, bucket % BUCKETS] += 1


def test_a_bucket_is_looked_at_only_after_everybody_had_time_to_count_what_is_in_it() -> None:
    edge = START_MS // BUCKET_MS * BUCKET_MS + BUCKET_MS
    times = np.array([edge - 1, edge + SETTLE_MS - 1, edge + SETTLE_MS])
    raw = observed((np.zeros(3, np.int64), times, np.zeros(3, np.bool_)))
    assert raw[:, MERCHANT_FEATURES.index("merchant_count_1d")].tolist() == [0, 0, 1]


def test_a_profile_that_is_ahead_of_a_late_transaction_or_far_behind_it_counts_right() -> None:
    bucket = START_MS // BUCKET_MS
    profiles = MerchantProfiles.empty(3)
    for merchant, newest in enumerate((bucket + BUCKETS - DEPTH + 20, bucket - 3, bucket - 500)):
        for each in range(newest - BUCKETS + 1, newest + 1):
            count(profiles, merchant, each)
    now = np.full(3, bucket * BUCKET_MS + SETTLE_MS)
    raw = observe_merchants(profiles, np.arange(3), now, DELAY_MS)
    day = 86_400_000 // BUCKET_MS
    expected = {"merchant_count_1d": [day, day - 2, 0]}
    expected["merchant_count_30d"] = [30 * day, 30 * day - 2, 0]
    for name, counts in expected.items():
        assert raw[:, MERCHANT_FEATURES.index(name)].tolist() == counts


def test_nothing_gives_nothing() -> None:
    nothing = np.zeros(0, np.int64)
    assert observed((nothing, nothing, nothing.astype(bool))).shape == (0, len(MERCHANT_FEATURES))
    profiles = MerchantProfiles.empty(2)
    assert len(observe_merchants(profiles, nothing, nothing, 0)) == 0
