"""Checks that a watermark in Redis fits this version and the log."""

from __future__ import annotations

from pipeline.errors import StartupError
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, is_other, other_log


def read_watermark(topic: str, partition: int, value: bytes) -> Watermark:
    """Decode a watermark from the store.

    Raises:
        StartupError: this version cannot read it; the message says what to do.
    """
    try:
        return Watermark.from_bytes(value)
    except ValueError as error:
        raise StartupError(
            f"the watermark of {topic}-{partition} is {error}, perhaps of a newer version: set "
            "RECUR_REDIS_KEY_PREFIX to a new prefix"
        ) from error


def check_watermark(
    topic: str,
    partition: int,
    mark: Watermark,
    partitions: int,
    log_end: int,
    log_id: bytes = NO_ID,
) -> None:
    """Check that states and log belong together.

    Args:
        log_id: current id of the topic.

    Raises:
        StartupError: they do not belong together; the message says what to do.
    """
    if is_other(mark.log_id, log_id):
        raise other_log(topic, mark.log_id, log_id)
    if mark.partitions != partitions:
        raise StartupError(
            f"the states in Redis were written when {topic} had {mark.partitions} partitions; it "
            f"has {partitions}, so accounts lie elsewhere: run `recur state repartition`, which "
            "moves their states. Or set RECUR_REDIS_KEY_PREFIX to a new prefix, to start without"
            " states"
        )
    if mark.next_offset > log_end:
        raise StartupError(
            f"the states in Redis are past the end of {topic}-{partition} (offset "
            f"{mark.next_offset}, the log ends at {log_end}): the topic was recreated or "
            "truncated. Run `recur state rebuild --all` to compute the states from the log as it "
            "is, or set RECUR_REDIS_KEY_PREFIX to a new prefix, to start without states"
        )
