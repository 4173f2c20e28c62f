"""Decision about a chunk of records: whether it continues the states of its partition."""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

import msgspec


class ChunkDecision(Enum):
    """Treatment of a chunk."""

    TAKE_OVER = auto()
    """Take the partition over from the watermark in the store, and decide again."""

    FETCH_AGAIN = auto()
    """Drop the chunk and seek to the states' end: it may be of an earlier log."""

    DROP = auto()
    """Drop the chunk: records from the seek on will come."""

    SEEK_BACK = auto()
    """Drop the chunk and read the log back to the states' end, unless this is under way."""

    SKIP_DELETED = auto()
    """Take the chunk; retention deleted the records between the states' end and its first one."""

    CONTINUE = auto()
    """Take the chunk."""


class ChunkFacts(msgspec.Struct, frozen=True, gc=False):
    """Facts about a chunk and its partition.

    Attributes:
        watermark: the loaded watermark is the expected one, another one, or the partition is not
            owned yet.
        is_other_log: the topic is another one than that of the states.
        is_fetched_of_other_log: the topic was another one when fetching started.
        is_fetched_before_seek: the chunk was fetched before the last seek to another log.
        begins_past_states: the log between the states' end and the chunk was not read.
        first_past_states: the chunk's first record is past the states' end.
    """

    watermark: Literal["expected", "other", "not owned"]
    is_other_log: bool = False
    is_fetched_of_other_log: bool = False
    is_fetched_before_seek: bool = False
    begins_past_states: bool = False
    first_past_states: bool = False


def decide_chunk(facts: ChunkFacts) -> ChunkDecision:
    """Decide what to do with a chunk; each rule goes before those below it."""
    if facts.watermark != "expected" or facts.is_other_log:
        return ChunkDecision.TAKE_OVER
    if facts.is_fetched_of_other_log:
        return ChunkDecision.FETCH_AGAIN
    if facts.is_fetched_before_seek:
        return ChunkDecision.DROP
    if facts.begins_past_states:
        return ChunkDecision.SEEK_BACK
    if facts.first_past_states:
        return ChunkDecision.SKIP_DELETED
    return ChunkDecision.CONTINUE
