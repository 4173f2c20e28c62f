"""Rejected records on their way to the dead-letter topic."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from pipeline.kafka.decompression_limit import records_in
from pipeline.kafka.polls import Record
from pipeline.kafka.producer import Outgoing
from pipeline.scoring.metrics import Metrics

KEY_MAX_BYTES = 65_536
"""With it the longest rejected value stays under the broker's limit of 1 MiB."""

TELL_EVERY_MS = 60_000
"""Between two lines of the log about the same reason."""

log = logging.getLogger(__name__)


class Notices:
    """Lines of the log about one thing that comes often: the first, and then one a minute.

    Args:
        message: what each line says.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._untold: Counter[str] = Counter()
        self._told_ms: dict[str, int] = {}

    def tell(
        self,
        topic: str,
        partition: int,
        offset: int,
        now_ms: int,
        records: int = 1,
        reason: str = "",
    ) -> None:
        """Count records, and say how many there were since the last line of this reason."""
        self._untold[reason] += records
        told_ms = self._told_ms.get(reason)
        if told_ms is not None and now_ms - told_ms < TELL_EVERY_MS:
            return
        self._told_ms[reason] = now_ms
        log.warning(
            self._message,
            extra={
                **({"reason": reason} if reason else {}),
                "records": self._untold.pop(reason),
                "topic": topic,
                "partition": partition,
                "offset": offset,
            },
        )


class DeadLetters:
    """Makes dead letters of a topic's records, counts them, and tells of them in the log.

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
        self._notices = Notices(
            "rejected: the dead-letter topic has what, and what is wrong with it"
        )

    def letter(self, partition: int, record: Record, reason: str, error: str) -> Outgoing:
        """The original key and bytes; where from and why in headers.

        Where there is no key, its coordinates are: a compacted topic takes none without.
        """
        now_ms = self._clock_ms()
        self._metrics.rejected.labels(reason).inc(records_in(record.value))
        self._notices.tell(self._topic, partition, record.offset, now_ms, reason=reason)
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
