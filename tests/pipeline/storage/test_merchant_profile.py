"""Profiles as bytes: exact, checked and bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.features.merchant import BUCKETS
from pipeline.storage.merchant_profile import (
    FIXED_BYTES,
    FRAUD_BUCKETS_MAX,
    FRAUDS_MAX,
    KNOWN_MAX,
    Fraud,
    Profile,
    decode_profiles,
    encode_frauds,
)

buckets = st.integers(0, 11_000_000)
frauds = st.builds(Fraud, st.integers(0, 2**64 - 1), buckets, buckets, st.integers(0, 255))
profiles = st.builds(
    Profile,
    st.one_of(st.just(-1), buckets),
    st.lists(st.integers(0, 65_535), min_size=BUCKETS, max_size=BUCKETS).map(
        lambda counts: np.array(counts, np.uint16)
    ),
    st.lists(frauds, max_size=5),
)


@given(profiles)
def test_a_profile_survives_the_round_trip(profile: Profile) -> None:
    again = Profile.from_bytes(profile.to_bytes())

    assert again.head == profile.head
    np.testing.assert_array_equal(again.counts, profile.counts)
    assert again.frauds == profile.frauds


@pytest.mark.slow
@given(st.lists(st.one_of(st.none(), profiles), max_size=6))
def test_many_profiles_are_decoded_as_one_by_one(some: list[Profile | None]) -> None:
    columns, refused = decode_profiles([None if p is None else p.to_bytes() for p in some])

    assert refused == 0
    expected = [p or Profile() for p in some]
    assert columns.head.tolist() == [p.head for p in expected]
    for counts, profile in zip(columns.counts, expected, strict=True):
        np.testing.assert_array_equal(counts, profile.counts)
    found = list(
        zip(
            columns.fraud_row.tolist(),
            columns.fraud_bucket.tolist(),
            columns.fraud_known.tolist(),
            columns.fraud_weight.tolist(),
            strict=True,
        )
    )
    assert found == [
        (row, f.bucket, f.known, f.weight) for row, p in enumerate(expected) for f in p.frauds
    ]


@pytest.mark.parametrize("cut", [0, 1, 8, FIXED_BYTES - 1, FIXED_BYTES + 1, FIXED_BYTES + 15])
def test_a_value_of_another_size_or_format_counts_as_absent_and_is_counted(cut: int) -> None:
    profile = Profile(frauds=[Fraud(1, 2, 3)])
    profile.count(100, 7)
    sound = profile.to_bytes()
    other_format = b"\xff" + sound[1:]

    columns, refused = decode_profiles([sound, sound[:cut], other_format])

    assert refused == 2
    assert columns.head.tolist() == [100, -1, -1]
    assert columns.counts.sum(axis=1).tolist() == [7, 0, 0]
    assert columns.fraud_row.tolist() == [0]
    for value in (sound[:cut], other_format):
        with pytest.raises(ValueError, match="format"):
            Profile.from_bytes(value)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 70_000)), max_size=40))
def test_the_ring_has_the_newest_buckets_saturated_and_no_others(
    added: list[tuple[int, int]],
) -> None:
    profile = Profile()
    expected: dict[int, int] = {}
    head = -1
    for bucket, n in added:
        profile.count(bucket, n)
        head = max(head, bucket)
        expected = {b: c for b, c in expected.items() if b > head - BUCKETS}
        if bucket > head - BUCKETS:
            expected[bucket] = min(65_535, expected.get(bucket, 0) + n)

    assert profile.head == head
    held = {b: int(profile.counts[b % BUCKETS]) for b in range(head - BUCKETS + 1, head + 1)}
    assert {b: n for b, n in held.items() if n} == expected


def test_the_last_label_of_a_transaction_wins_and_keeps_the_first_time() -> None:
    profile = Profile()

    assert profile.record(Fraud(1, 100, 128), is_fraud=True)
    assert profile.record(Fraud(1, 101, 130), is_fraud=True)
    assert profile.frauds == [Fraud(1, 101, 128)]
    assert profile.record(Fraud(1, 101, 131), is_fraud=False)
    assert profile.frauds == []
    assert not profile.record(Fraud(1, 101, 131), is_fraud=False)


def test_a_repeated_fraud_label_changes_the_weight() -> None:
    profile = Profile()
    profile.record(Fraud(1, 100, 128, 40), is_fraud=True)
    profile.record(Fraud(1, 100, 130, 50), is_fraud=True)
    assert profile.frauds == [Fraud(1, 100, 128, 50)]
    assert profile.set_weight(1, 60)
    assert not profile.set_weight(2, 60)
    assert profile.frauds == [Fraud(1, 100, 128, 60)]


def test_a_label_of_the_far_future_does_not_change_the_weight() -> None:
    profile = Profile(frauds=[Fraud(1, 100, KNOWN_MAX + 7, 40)])
    assert Profile.from_bytes(profile.to_bytes()).frauds == [Fraud(1, 100, KNOWN_MAX, 40)]


def test_known_frauds_are_bounded_by_number_and_age() -> None:
    profile = Profile()
    for i in range(FRAUDS_MAX + 10):
        profile.record(Fraud(i, 1000, 1000), is_fraud=True)
    assert [f.id_hash for f in profile.frauds] == list(range(10, FRAUDS_MAX + 10))

    profile.record(Fraud(1, 1100, 1000 + FRAUD_BUCKETS_MAX), is_fraud=True)
    assert profile.frauds == [Fraud(1, 1100, 1000 + FRAUD_BUCKETS_MAX)]


def test_fraud_entries_are_the_tail_of_a_value() -> None:
    some = [Fraud(2**64 - 1, 5, 6), Fraud(1, 2, 3)]

    assert b"".join(encode_frauds(some)) == Profile(frauds=some).to_bytes()[FIXED_BYTES:]
    assert encode_frauds([]) == []
