"""CloudEvents 1.0 headers of scores and alerts: Kafka's binary mode, values as they are.

Each header follows from the transaction's record alone. So a score or an alert that is published
again, by any worker and at any time, has the same headers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.messages.scores import source_prefix
from pipeline.settings import Settings
from pipeline.topic_id import NO_ID, shown

SPEC_VERSION = "1.0"

SCORE_TYPE = "recur.score.v1"
"""Type of a score's event. A change that breaks readers raises its number."""

ALERT_TYPE = "recur.alert.v1"
"""Type of an alert's event. A change that breaks readers raises its number."""

CONTENT_TYPE = "application/json"

Headers = tuple[tuple[str, bytes], ...]


def event_source(topic: str, log_id: bytes, output: str) -> str:
    """Name the source of events: the log of transactions, and the topic that they go to.

    Args:
        topic: full name of the transactions topic.
        log_id: the topic's id, [16] bytes. A topic made again has another.
        output: full name of the scores or alerts topic.

    >>> event_source("transactions", bytes(range(16)), "alerts")
    '/recur/transactions/AAECAwQFBgcICQoLDA0ODw/alerts'
    """
    log = topic if log_id == NO_ID else f"{topic}/{shown(log_id)}"
    return f"/recur/{log}/{output}"


class EventHeaders:
    """Headers of the events in one topic, for all records of a micro-batch's part at once.

    Args:
        event_type: :data:`SCORE_TYPE` or :data:`ALERT_TYPE`.
        topic: full name of the transactions topic.
        output: full name of the topic that the events go to.

    >>> headers = EventHeaders(ALERT_TYPE, "transactions", "alerts")
    >>> for name, value in headers.of(3, bytes(16), [17], [1_534_327_200_000], ["t1"])[0]:
    ...     print(name, value.decode())
    ce_specversion 1.0
    ce_type recur.alert.v1
    ce_source /recur/transactions/alerts
    content-type application/json
    ce_id transactions:3:17
    ce_time 2018-08-15T10:00:00.000Z
    ce_subject t1
    """

    def __init__(self, event_type: str, topic: str, output: str) -> None:
        self._type = event_type
        self._topic = topic
        self._output = output

    def of(
        self,
        partition: int,
        log_id: bytes,
        offsets: Sequence[int],
        times_ms: Sequence[int],
        transaction_ids: Sequence[str],
    ) -> list[Headers]:
        """Build the headers of n events.

        Args:
            partition: partition of the transactions.
            log_id: id of their topic, [16] bytes.
            offsets: offset of each transaction.
            times_ms: event time of each transaction, epoch milliseconds up to the year 9999.
            transaction_ids: id of each transaction. One that is not printable is left out.
        """
        source = event_source(self._topic, log_id, self._output)
        same: Headers = (
            ("ce_specversion", SPEC_VERSION.encode()),
            ("ce_type", self._type.encode()),
            ("ce_source", source.encode()),
            ("content-type", CONTENT_TYPE.encode()),
        )
        prefix = source_prefix(self._topic, partition)
        headers: list[Headers] = []
        for offset, time, subject in zip(offsets, _rfc3339(times_ms), transaction_ids, strict=True):
            own = ("ce_id", f"{prefix}{offset}".encode()), ("ce_time", time)
            if subject.isprintable():
                headers.append((*same, *own, ("ce_subject", subject.encode())))
            else:
                headers.append((*same, *own))
        return headers


def score_events(settings: Settings) -> EventHeaders | None:
    """Make the headers of scores; None if the settings ask for none."""
    if not settings.cloudevents_scores:
        return None
    return EventHeaders(SCORE_TYPE, settings.topic("transactions"), settings.topic("scores"))


def alert_events(settings: Settings) -> EventHeaders | None:
    """Make the headers of alerts; None if the settings ask for none."""
    if not settings.cloudevents_alerts:
        return None
    return EventHeaders(ALERT_TYPE, settings.topic("transactions"), settings.topic("alerts"))


def _rfc3339(times_ms: Sequence[int]) -> list[bytes]:
    """Format times in epoch milliseconds as RFC 3339 with milliseconds, in UTC."""
    times = np.array(times_ms, "datetime64[ms]")
    formatted: list[bytes] = np.datetime_as_string(times, timezone="UTC").astype(bytes).tolist()
    return formatted
