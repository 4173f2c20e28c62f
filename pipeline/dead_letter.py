"""Rejected records on their way to the dead-letter topic."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.metrics import Metrics
from pipeline.ownership import Record
from pipeline.publisher import Outgoing

KEY_MAX_BYTES = 65_536
"""With it the longest rejected value stays under the broker's limit of 1 MiB."""


class DeadLetters:
    """Makes dead letters of a topic's records, and counts them.

    Args:
        topic: full name of the topic that the records came from.
        value_max_bytes: longer values are truncated.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self, topic: str, value_max_bytes: int, metrics: Metrics, clock_ms: Callable[[], int]
    ) -> None:
        self._topic = topic
        self._value_max_bytes = value_max_bytes
        self._metrics = metrics
        self._clock_ms = clock_ms

    def letter(self, partition: int, record: Record, reason: str, error: str) -> Outgoing:
        """The original key and bytes; where from and why in headers."""
        self._metrics.rejected.labels(reason).inc()
        limit = self._value_max_bytes
        headers = {
            "topic": self._topic,
            "partition": str(partition),
            "offset": str(record.offset),
            "reason": reason,
            "error": error[:300],
            "time": str(self._clock_ms()),
        }
        key, value = record.key, record.value
        key_limit = min(limit, KEY_MAX_BYTES)
        if len(value or b"") > limit or len(key or b"") > key_limit:
            headers["truncated"] = str(len(value or b""))
            key, value = key and key[:key_limit], value and value[:limit]
        return Outgoing(key, value, tuple((name, text.encode()) for name, text in headers.items()))
