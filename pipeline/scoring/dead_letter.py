"""Dead letters of rejected records, and throttled warnings about them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from pipeline.kafka.decompression_limit import records_in
from pipeline.kafka.polls import Record
from pipeline.kafka.producer import Outgoing
from pipeline.scoring.metrics import Metrics

KEY_MAX_BYTES = 65_536
"""Limit of a key, so that the longest dead letter stays under the broker's limit of 1 MiB."""

LOG_EVERY_MS = 60_000
"""Time between two log lines about the same reason."""

log = logging.getLogger(__name__)


class ThrottledWarning:
    """A warning about a frequent event: the first event is logged, then one line a minute.

    Args:
        message: text of each line.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._unlogged: Counter[str] = Counter()
        self._logged_ms: dict[str, int] = {}

    def log(
        self,
        topic: str,
        partition: int,
        offset: int,
        now_ms: int,
        records: int = 1,
        reason: str = "",
    ) -> None:
        """Count records, and log their number since the last line of this reason."""
        self._unlogged[reason] += records
        logged_ms = self._logged_ms.get(reason)
        if logged_ms is not None and now_ms - logged_ms < LOG_EVERY_MS:
            return
        self._logged_ms[reason] = now_ms
        log.warning(
            self._message,
            extra={
                **({"reason": reason} if reason else {}),
                "records": self._unlogged.pop(reason),
                "topic": topic,
                "partition": partition,
                "offset": offset,
            },
        )


class DeadLetters:
    """Encoder of dead letters of a topic; it counts them and logs a throttled warning.

    Args:
        topic: full name of the rejected records' topic.
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
        self._warning = ThrottledWarning(
            "record rejected: the dead-letter topic holds it, with the reason and the error"
        )

    def encode(self, partition: int, record: Record, reason: str, error: str) -> Outgoing:
        """Encode a record as a dead letter: original key and value, origin and reason in headers.

        Without a key, the record's coordinates become the key: a compacted topic needs one.
        """
        now_ms = self._clock_ms()
        self._metrics.rejected.labels(reason).inc(records_in(record.value))
        self._warning.log(self._topic, partition, record.offset, now_ms, reason=reason)
        limit = self._value_max_bytes
        headers = {
            "topic": self._topic,
            "partition": str(partition),
            "offset": str(record.offset),
            "reason": reason,
            "error": error[:300],
            "time": str(now_ms),
        }
        key, value = record.key, record.value
        key_limit = min(limit, KEY_MAX_BYTES)
        if len(value or b"") > limit or len(key or b"") > key_limit:
            headers["truncated"] = str(len(value or b""))
            key, value = key and key[:key_limit], value and value[:limit]
        if key is None:
            key = f"{self._topic}:{partition}:{record.offset}".encode()
        return Outgoing(key, value, tuple((name, text.encode()) for name, text in headers.items()))
