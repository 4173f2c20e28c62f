"""The progress of an endpoint: no alert is lost between its position and its retries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.topic_id import NO_ID
from pipeline.webhooks.partition_progress import (
    CONCURRENCY_MAX,
    METADATA_MAX_BYTES,
    WAITING_MAX,
    CommittedProgress,
    PartitionProgress,
    Retry,
    decode_commit,
)

LOG = bytes(range(16))
NOW = 1_700_000_000.0


def test_the_position_waits_for_a_first_attempt_that_is_under_way() -> None:
    progress = PartitionProgress(5)
    for offset in (5, 6, 8):  # 7 is a transaction's marker
        assert progress.begin(offset, 0.0)
    progress.settle(6)
    progress.settle(8)
    assert progress.position == 5

    progress.wait(Retry(5, 1, NOW))

    assert progress.position == 9
    assert not progress.begin(8, 0.0)


@given(st.lists(st.tuples(st.sampled_from("bsfdx"), st.integers(0, 30)), max_size=120))
def test_each_alert_is_settled_waits_or_lies_past_the_position(
    acts: list[tuple[str, int]],
) -> None:
    """Whatever happened before a commit, a successor makes up for all that is not settled."""
    progress, begun, settled, open_offsets = PartitionProgress(0), 0, set[int](), set[int]()
    for act, number in acts:
        if act == "b" and not progress.is_full:
            progress.begin(begun, 0.0)
            open_offsets.add(begun)
            begun += 1
        elif act == "d":
            open_offsets.update(r.offset for r in progress.take_due(NOW, number))
        elif open_offsets:
            offset = sorted(open_offsets)[number % len(open_offsets)]
            open_offsets.discard(offset)
            if act == "s":
                progress.settle(offset)
                settled.add(offset)
            else:
                progress.wait(Retry(offset, 1, NOW + number - 15))

        found = decode_commit(progress.position, progress.metadata())

        waiting = {retry.offset for retry in found.retries}
        assert set(range(found.position)) - settled <= waiting
        assert not waiting & settled


def test_the_fullest_progress_fits_into_a_commit() -> None:
    most = WAITING_MAX + CONCURRENCY_MAX
    retries = [Retry(offset, 9, NOW + offset) for offset in range(most)]
    progress = PartitionProgress(2**31, retries, LOG)

    metadata = progress.metadata()

    assert len(metadata) <= METADATA_MAX_BYTES
    assert decode_commit(2**31, metadata) == CommittedProgress(2**31, tuple(retries), LOG)


@pytest.mark.parametrize("metadata", [None, "", "AAECAwQFBgcICQoLDA0ODw", "é", "AQ==", "//8="])
def test_metadata_of_another_program_are_left_out(metadata: str | None) -> None:
    assert decode_commit(7, metadata) == CommittedProgress(7, (), NO_ID)


@given(st.integers(0, 2**62), st.text(max_size=60))
def test_no_metadata_raise(position: int, metadata: str) -> None:
    assert decode_commit(position, metadata).position == position


def test_a_retry_is_taken_once_and_the_oldest_first() -> None:
    progress = PartitionProgress(9, [Retry(3, 1, NOW), Retry(1, 2, NOW - 5), Retry(2, 1, NOW + 5)])

    assert [r.offset for r in progress.take_due(NOW, 1)] == [1]
    assert [r.offset for r in progress.take_due(NOW, 9)] == [3]
    assert progress.take_due(NOW, 9) == []
    assert progress.next_due() == NOW + 5
    assert progress.waiting == 3


def test_a_full_partition_catches_up_as_soon_as_the_endpoint_works() -> None:
    retries = [Retry(offset, 3, NOW + 7200) for offset in range(WAITING_MAX)]
    progress = PartitionProgress(WAITING_MAX, retries)
    assert progress.is_full

    progress.hasten(NOW)

    (first,) = progress.take_due(NOW, 9)
    progress.settle(first.offset)
    assert not progress.is_full
