"""Features of merchants: a log and a stream give the same, and nothing looks ahead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.features.account import Float32, Int64
from model.features.merchant import (
    BUCKET_MS,
    BUCKETS,
    DEPTH,
    MERCHANT_FEATURES,
    SETTLE_MS,
    STRONG_WEIGHT,
    WEIGHT_MAX,
    Labels,
    MerchantProfiles,
    bucket_of,
    observe_merchant_log,
    observe_merchants,
    present_bucket,
)
from model.features.spec import FRAUD_FEATURES
from model.units import DAY_MS

START_MS = 1_522_540_800_000
DELAY_MS = 2 * DAY_MS
BUCKETS_A_DAY = DAY_MS // BUCKET_MS

Truth = NDArray[np.bool_]
Weights = NDArray[np.uint8]
Log = tuple[Int64, Int64, Truth, Weights]


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Draw up to 80 transactions at up to 4 merchants over some weeks, many of them fraud.

    The merchants explain some frauds wholly, some in part, and some not at all.
    """
    size = draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    longest_ms = draw(st.sampled_from([BUCKET_MS // 3, DAY_MS, 12 * DAY_MS]))
    gaps = rng.integers(0, longest_ms, size)
    weight = rng.choice([0, 1, 60, STRONG_WEIGHT - 1, STRONG_WEIGHT, 200, WEIGHT_MAX], size)
    is_fraud = rng.random(size) < 0.4
    return rng.integers(0, 4, size), START_MS + np.cumsum(gaps), is_fraud, weight.astype(np.uint8)


def observed(log: Log, delay_ms: int = DELAY_MS) -> Float32:
    merchant, timestamp_ms, is_fraud, weight = log
    labels = Labels.delayed(is_fraud, timestamp_ms, delay_ms, weight)
    return observe_merchant_log(merchant, timestamp_ms, labels, delay_ms)


def slowly(log: Log, row: int, delay_ms: int = DELAY_MS) -> dict[str, float]:
    """Compute the features by their names, counting the log transaction by transaction."""
    merchant, timestamp_ms, _, _ = log
    now = int(present_bucket(timestamp_ms[row : row + 1])[0])
    horizon = now - -(-delay_ms // BUCKET_MS)
    counts = dict.fromkeys(range(now - DEPTH, now), 0)
    frauds = dict.fromkeys(counts, 0)
    weights = dict.fromkeys(counts, 0.0)
    strong = dict.fromkeys(counts, 0.0)
    for other, time_ms, fraud, weight in zip(*(c.tolist() for c in log), strict=True):
        bucket = time_ms // BUCKET_MS
        if other != merchant[row] or bucket not in counts:
            continue
        counts[bucket] += 1
        if fraud and (time_ms + delay_ms) // BUCKET_MS < now:
            frauds[bucket] += 1
            weights[bucket] += weight / 255
            strong[bucket] += weight / 255 if weight >= 128 else 0.0

    def days(bucket: int | None) -> float:
        return -1.0 if bucket is None else (now - bucket) / BUCKETS_A_DAY

    said: dict[str, float] = {}
    for window in (1, 7, 30):
        width = window * BUCKETS_A_DAY
        said[f"merchant_count_{window}d"] = sum(counts[b] for b in range(now - width, now))
        rated = [b for b in range(horizon - width, horizon) if b in counts]
        seen = sum(counts[b] for b in rated)
        said[f"merchant_risk_{window}d"] = sum(weights[b] for b in rated) / max(seen, 1)
    known = [b for b in strong if strong[b]]
    legitimate = [b for b in counts if b < horizon and counts[b] > frauds[b]]
    newest_legitimate = max(legitimate, default=None)
    streak = [b for b in known if newest_legitimate is None or b > newest_legitimate]
    return said | {
        "merchant_known_frauds": sum(weights.values()),
        "merchant_oldest_fraud_days": days(min(known, default=None)),
        "merchant_newest_fraud_days": days(max(known, default=None)),
        "merchant_legitimate_days": days(newest_legitimate),
        "merchant_streak_frauds": sum(strong[b] for b in streak),
        "merchant_streak_days": days(min(streak, default=None)),
    }


@settings(max_examples=60, deadline=None)
@given(logs())
def test_features_are_what_their_names_say_by_a_slow_count_over_the_log(log: Log) -> None:
    raw = observed(log)
    for row in range(len(raw)):
        found = dict(zip(MERCHANT_FEATURES, raw[row].tolist(), strict=True))
        assert found == pytest.approx(slowly(log, row), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(0, 80))
def test_no_feature_changes_when_later_transactions_are_removed(log: Log, end: int) -> None:
    earlier = tuple(column[:end] for column in log)
    np.testing.assert_array_equal(observed(log)[:end], observed(earlier))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(0, 79))
def test_no_feature_changes_with_labels_that_had_not_arrived(log: Log, row: int) -> None:
    merchant, timestamp_ms, is_fraud, weight = log
    row = min(row, len(merchant) - 1)
    now = present_bucket(timestamp_ms[row : row + 1])
    late = bucket_of(timestamp_ms + DELAY_MS) >= now
    otherwise = (merchant, timestamp_ms, is_fraud ^ late, np.where(late, ~weight, weight))
    np.testing.assert_array_equal(observed(log)[row], observed(otherwise)[row])


@settings(max_examples=60, deadline=None)
@given(logs())
def test_a_profile_kept_transaction_by_transaction_gives_the_features_of_the_log(log: Log) -> None:
    """A worker reads the profile at each transaction and then counts the transaction."""
    merchant, timestamp_ms, is_fraud, weight = log
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
        profiles.fraud_weight = weight[known][order]
        at = slice(row, row + 1)
        raw[at] = observe_merchants(profiles, merchant[at], timestamp_ms[at], DELAY_MS)
        count(profiles, int(merchant[row]), int(bucket_of(timestamp_ms[at])[0]))
    np.testing.assert_array_equal(raw, observed(log))


def count(profiles: MerchantProfiles, merchant: int, bucket: int) -> None:
    """Add a transaction to a ring."""
    head = int(profiles.head[merchant])
    for opened in range(max(head + 1, bucket - BUCKETS + 1), bucket + 1):
        profiles.counts[merchant, opened % BUCKETS] = 0
    profiles.head[merchant] = max(head, bucket)
    profiles.counts[merchant, bucket % BUCKETS] += 1


def profile_of(counts: dict[int, int], frauds: list[tuple[int, int]]) -> MerchantProfiles:
    """Make the profile of one merchant.

    Args:
        counts: number of transactions by age in days.
        frauds: age in days and weight of each known fraud.
    """
    today = START_MS // BUCKET_MS
    profiles = MerchantProfiles.empty(1)
    profiles.head[:] = today
    for days, many in counts.items():
        profiles.counts[0, (today - days * BUCKETS_A_DAY) % BUCKETS] = many
    n = len(frauds)
    profiles.fraud_row = np.zeros(n, np.intp)
    profiles.fraud_bucket = np.array([today - d * BUCKETS_A_DAY for d, _ in frauds], np.int64)
    profiles.fraud_known = np.full(n, today - 1)
    profiles.fraud_weight = np.array([weight for _, weight in frauds], np.uint8)
    return profiles


def seen_today(profiles: MerchantProfiles) -> dict[str, float]:
    """Compute the features now, without a label delay."""
    now = np.array([START_MS // BUCKET_MS * BUCKET_MS + SETTLE_MS])
    raw = observe_merchants(profiles, np.zeros(1, np.intp), now, 0)
    return dict(zip(MERCHANT_FEATURES, raw[0].tolist(), strict=True))


def test_weights_of_frauds_add_up() -> None:
    seen = seen_today(profile_of({3: 10, 5: 10}, [(3, 255), (3, 51), (5, 204)]))
    assert seen["merchant_known_frauds"] == pytest.approx(2.0)
    assert seen["merchant_risk_7d"] == pytest.approx(0.1)
    assert (seen["merchant_oldest_fraud_days"], seen["merchant_newest_fraud_days"]) == (5.0, 3.0)


def test_a_fraud_that_its_payment_explains_has_no_age_and_no_streak_but_is_not_legitimate() -> None:
    weak = seen_today(profile_of({9: 4, 3: 2}, [(3, 127), (3, 127)]))
    assert weak["merchant_known_frauds"] == pytest.approx(2 * 127 / 255)
    assert weak["merchant_oldest_fraud_days"] == weak["merchant_newest_fraud_days"] == -1.0
    assert (weak["merchant_streak_frauds"], weak["merchant_streak_days"]) == (0.0, -1.0)
    assert weak["merchant_legitimate_days"] == 9.0, "both of the third day's payments are frauds"

    # A strong fraud followed by weak ones is a streak, without a legitimate one between them.
    both = seen_today(profile_of({9: 4, 5: 1, 3: 2}, [(5, 128), (3, 127), (3, 127)]))
    assert both["merchant_legitimate_days"] == 9.0
    assert both["merchant_streak_frauds"] == pytest.approx(128 / 255)
    assert both["merchant_streak_days"] == both["merchant_oldest_fraud_days"] == 5.0


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(1, 37), st.integers(0, 5), max_size=8),
    st.lists(st.tuples(st.integers(1, 37), st.integers(0, WEIGHT_MAX)), max_size=8),
    st.tuples(st.integers(1, 37), st.integers(0, WEIGHT_MAX)),
)
def test_one_more_known_fraud_never_lowers_a_feature_of_frauds(
    counts: dict[int, int], frauds: list[tuple[int, int]], one_more: tuple[int, int]
) -> None:
    """The counts of transactions are fixed; the fraud may be in any bucket."""
    before = seen_today(profile_of(counts, frauds))
    after = seen_today(profile_of(counts, [*frauds, one_more]))
    for name in FRAUD_FEATURES:
        assert after[name] >= before[name] - 1e-6, name
    assert after["merchant_known_frauds"] == pytest.approx(
        before["merchant_known_frauds"] + one_more[1] / WEIGHT_MAX, abs=1e-5
    )


def test_a_bucket_is_seen_only_after_all_workers_had_time_to_count_it() -> None:
    edge = START_MS // BUCKET_MS * BUCKET_MS + BUCKET_MS
    times = np.array([edge - 1, edge + SETTLE_MS - 1, edge + SETTLE_MS])
    nobody = np.zeros(3, np.int64)
    raw = observed((nobody, times, nobody.astype(np.bool_), nobody.astype(np.uint8)))
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


def test_no_transactions_give_no_rows() -> None:
    nothing = np.zeros(0, np.int64)
    log = nothing, nothing, nothing.astype(bool), nothing.astype(np.uint8)
    assert observed(log).shape == (0, len(MERCHANT_FEATURES))
    profiles = MerchantProfiles.empty(2)
    assert len(observe_merchants(profiles, nothing, nothing, 0)) == 0
