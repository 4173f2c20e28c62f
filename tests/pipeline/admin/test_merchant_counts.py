"""Profiles computed from the log, and corrections that lose no addition of a worker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.features.merchant import BUCKET_MS, BUCKETS, COUNT_MAX
from pipeline.admin import merchant_counts as merchant_counts_module
from pipeline.admin.merchant_counts import (
    FirstScores,
    LoggedLabel,
    MerchantCounts,
    MerchantWeights,
    correction,
    frauds_of,
)
from pipeline.messages.scores import CountedScore
from pipeline.storage.merchant_profile import Fraud, Profile
from pipeline.storage.merchant_store import MerchantLabel

NOW = 100_000


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(NOW - 2 * BUCKETS, NOW)), max_size=60),
    st.integers(1, 7),
)
def test_counts_from_the_log_equal_those_in_profiles(
    drawn: list[tuple[int, int]], length: int
) -> None:
    """Holds in any order of the log, and where old buckets fall out of the ring."""
    before = merchant_counts_module.COMPACT_LENGTH
    merchant_counts_module.COMPACT_LENGTH = length
    try:
        counts = MerchantCounts()
        for start in range(0, len(drawn), 5):
            part = drawn[start : start + 5]
            piece = MerchantCounts() if start % 2 else counts
            piece.add([f"M{m}" for m, _ in part], [b * BUCKET_MS + 7 for _, b in part])
            if piece is not counts:
                counts.merge(piece)
    finally:
        merchant_counts_module.COMPACT_LENGTH = before
    names = [f"M{i}" for i in range(5)]
    profiles = [Profile() for _ in names]
    for merchant, bucket in sorted(drawn, key=lambda item: item[1]):
        profiles[merchant].count(bucket, 1)

    heads = counts.newest(names)

    assert heads.tolist() == [profile.head for profile in profiles]
    tables = counts.tables(names, heads)
    assert tables.tolist() == [profile.counts.tolist() for profile in profiles]


def test_counts_have_the_bound_of_a_profile() -> None:
    counts = MerchantCounts()
    counts.add(["M"] * (COUNT_MAX + 5), [NOW * BUCKET_MS] * (COUNT_MAX + 5))

    assert counts.tables(["M"], np.array([NOW])).max() == COUNT_MAX


def test_only_the_first_score_of_a_transaction_counts() -> None:
    firsts = FirstScores("transactions:3:")
    sources = [500_000, 500_001, 500_000, 400_001, 400_001, 3, 900_000, 900_000]

    found = [firsts.source(CountedScore(f"transactions:3:{s}", "M", 0)) for s in sources]

    assert found == [500_000, 500_001, None, 400_001, None, 3, 900_000, None]
    assert firsts.source(CountedScore("transactions:4:1", "M", 0)) is None


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(5, 0), (6, 0), (8, 0), (4, 3), (9, -2), (0, 7), (COUNT_MAX, 7 - COUNT_MAX)],
)
def test_a_count_that_may_be_right_is_not_corrected(stored: int, expected: int) -> None:
    """Transactions that workers applied during the read may be counted or not."""
    least, due, most = np.array([5]), np.array([7]), np.array([8])

    assert correction(np.array([stored]), least, due, most).tolist() == [expected]


def test_a_count_at_its_maximum_is_right() -> None:
    many = np.array([COUNT_MAX + 10])

    assert correction(np.array([COUNT_MAX]), many, many, many).tolist() == [0]


def test_known_frauds_equal_those_of_labels_recorded_in_order() -> None:
    def label(offset: int, number: int, is_fraud: bool, known: int) -> LoggedLabel:
        return LoggedLabel(0, MerchantLabel(offset, "M", is_fraud, Fraud(number, 10, known)))

    labels = [
        label(0, 1, True, 11),
        label(1, 2, True, 12),
        label(2, 1, False, 13),
        label(3, 2, True, 14),
        label(9, 3, True, 15),
    ]

    weights = MerchantWeights({})
    assert frauds_of(labels, [9], weights) == [Fraud(2, 10, 12)]
    assert frauds_of(labels, [10], weights, retained=[Fraud(7, 9, 9)]) == [
        Fraud(7, 9, 9),
        Fraud(2, 10, 12),
        Fraud(3, 10, 15),
    ]
    assert frauds_of(labels, [1], weights) == [Fraud(1, 10, 11)]


def test_weights_come_from_labels_else_scores_else_the_profile() -> None:
    def label(offset: int, number: int, at: int, told: int | None = None, **other: Any) -> Any:
        fields = {"is_fraud": True, "bucket": 10} | other
        entry = Fraud(number, fields["bucket"], 20, 255 if told is None else told)
        booking = MerchantLabel(
            offset, "M", fields["is_fraud"], entry, at, has_weight=told is not None
        )
        return LoggedLabel(0, booking)

    labels = [
        label(0, 1, at=5),
        label(1, 2, at=5, told=60),
        label(2, 2, at=6),
        label(3, 3, at=5),
        label(4, 4, at=5, bucket=8),
        label(5, 1, at=4, is_fraud=False),  # older than the one before
        label(6, 5, at=7, is_fraud=False),
        label(7, 5, at=6),
    ]
    weights = MerchantWeights({1: 40, 2: 50}, from_bucket=9)
    stored = [Fraud(3, 10, 20, 70), Fraud(4, 8, 20, 80)]

    found = frauds_of(labels, [9], weights, stored)

    expected = {1: 40, 2: 60, 3: 255, 4: 80}
    assert {fraud.id_hash: fraud.weight for fraud in found} == expected
