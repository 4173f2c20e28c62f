"""The event that an endpoint gets: an alert in the envelope of Standard Webhooks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import orjson

from pipeline.messages.decoding import NOT_JSON

EVENT_TYPE = "alert.created"
TEST_TYPE = "webhook.test"

ID_BYTES = 16
"""Length of the hash in a webhook's id, bytes."""


class _AlertView(msgspec.Struct, frozen=True, gc=False):
    """The part of an alert that delivery needs."""

    source: str
    transaction_id: str
    score: float
    decision: str
    created_at: int
    category: str | int | None = None


class _CategoryView(msgspec.Struct, frozen=True, gc=False):
    category: str | int | None = None


_decode_alert = msgspec.json.Decoder(_AlertView).decode
_decode_category = msgspec.json.Decoder(_CategoryView).decode


@dataclass(frozen=True)
class AlertEvent:
    """An alert, ready to be delivered.

    Attributes:
        message_id: the webhook's id; the same for each delivery of the alert.
        body: the request's body.
        score, decision: what filters ask for.
        category: the category, if the alert has it.
        source: coordinates of the transaction, ``topic:partition:offset``.
    """

    message_id: str
    body: bytes
    score: float
    decision: str
    category: str | None
    source: str


def message_id(source: str, transaction_id: str) -> str:
    """Derive a webhook's id from the alert's source and transaction.

    An alert that is published again has both again, so its id stays. The hash keeps a
    transaction's id out of headers and logs of proxies, and holds no full stop.

    >>> message_id("transactions:3:17", "t1")
    'msg_5f6d864578a6bac16dd32081408888b6'
    """
    text = f"{source}\n{transaction_id}".encode()
    return f"msg_{hashlib.blake2b(text, digest_size=ID_BYTES).hexdigest()}"


def alert_event(value: bytes | None) -> AlertEvent | None:
    """Make the event of a record of the alerts topic; None for a record that is no alert."""
    if value is None:
        return None
    try:
        alert = _decode_alert(value)
        value.decode()
        timestamp = iso_time(alert.created_at)
    except (*NOT_JSON, UnicodeDecodeError, OverflowError, ValueError):
        return None
    return AlertEvent(
        message_id=message_id(alert.source, alert.transaction_id),
        body=_envelope(EVENT_TYPE, timestamp, value.strip()),
        score=alert.score,
        decision=alert.decision,
        category=None if alert.category is None else str(alert.category),
        source=alert.source,
    )


def sample_event(endpoint: str, now_ms: int, number: str) -> tuple[str, bytes]:
    """Make a sample event; return its id and its body.

    Args:
        endpoint: the endpoint's name.
        now_ms: wall clock, epoch milliseconds.
        number: text that tells this event from others.
    """
    data = orjson.dumps({"endpoint": endpoint, "message": "A test of this endpoint by `recur`."})
    return message_id("test", number), _envelope(TEST_TYPE, iso_time(now_ms), data)


def category_of(value: bytes | None) -> str | None:
    """Read the category of a transaction's record; None without one."""
    if value is None:
        return None
    try:
        category = _decode_category(value).category
    except NOT_JSON:
        return None
    return None if category is None else str(category)


def place_of(source: str) -> tuple[str, int, int] | None:
    """Split ``topic:partition:offset``; None for another text.

    >>> place_of("transactions:3:17")
    ('transactions', 3, 17)
    """
    topic, _, rest = source.partition(":")
    partition, _, offset = rest.partition(":")
    if not topic or not partition.isdecimal() or not offset.isdecimal() or len(rest) > 40:
        return None
    return topic, int(partition), int(offset)


def iso_time(time_ms: int) -> str:
    """Format epoch milliseconds as ISO 8601.

    >>> iso_time(1_700_000_000_123)
    '2023-11-14T22:13:20.123Z'
    """
    time = datetime.fromtimestamp(time_ms / 1000, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _envelope(event_type: str, timestamp: str, data: bytes) -> bytes:
    return b'{"type":"%b","timestamp":"%b","data":%b}' % (
        event_type.encode(), timestamp.encode(), data,
    )  # fmt: skip
