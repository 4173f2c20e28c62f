"""Offsets that tell their log, as Kafka keeps them."""

from __future__ import annotations

import pytest

from pipeline.topic_id import NO_ID, LogOffset, commit_metadata, committed_offset, log_of

LOG = bytes(range(240, 256))


def test_a_committed_offset_tells_the_log_that_it_was_committed_with() -> None:
    offset = LogOffset(7, LOG)

    found = committed_offset(7, commit_metadata(offset))

    assert found == offset == 7
    assert found.log_id == LOG


@pytest.mark.parametrize("offset", [7, LogOffset(7)])
def test_an_offset_of_which_nobody_told_the_log_is_committed_as_ever(offset: int) -> None:
    assert log_of(offset) == NO_ID
    assert commit_metadata(offset) == ""


@pytest.mark.parametrize("metadata", [None, "", "by hand", "ä", "AAEC", "A" * 23, "=" * 22])
def test_metadata_of_others_tell_no_log(metadata: str | None) -> None:
    assert committed_offset(7, metadata).log_id == NO_ID
