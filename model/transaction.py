"""A decoded card payment, the type that training, simulator and pipeline share."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec

ID_MAX_CHARACTERS = 256
"""Longest transaction, account or merchant id."""

AMOUNT_MAX = 1e12
"""Largest amount. It excludes infinity, which JSON can write as 1e999."""

TIMESTAMP_MAX_MS = 253_402_300_799_999
"""Last millisecond of the year 9999."""

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_MAX_CHARACTERS)]
Timestamp = (
    Annotated[int, msgspec.Meta(ge=0, le=TIMESTAMP_MAX_MS)]
    | Annotated[datetime, msgspec.Meta(tz=True)]
)
ShortText = Annotated[str, msgspec.Meta(max_length=64)]


class Transaction(msgspec.Struct, frozen=True, gc=False):
    """One payment, as in the transactions topic (JSON, UTF-8).

    ``timestamp`` is RFC 3339 text with a zone, or integer epoch milliseconds; :func:`epoch_ms`
    converts both. Unknown fields are ignored.

    >>> payment = msgspec.json.decode(
    ...     b'{"transaction_id":"t1","account_id":"a1","merchant_id":"m1",'
    ...     b'"amount":12.5,"currency":"EUR","timestamp":"2018-08-15T10:00:00Z"}',
    ...     type=Transaction,
    ... )
    >>> epoch_ms(payment.timestamp)
    1534327200000
    """

    transaction_id: Id
    account_id: Id
    merchant_id: Id
    amount: Annotated[float, msgspec.Meta(ge=0, le=AMOUNT_MAX)]
    currency: Annotated[str, msgspec.Meta(min_length=3, max_length=3)]
    timestamp: Timestamp
    category: ShortText | None = None
    channel: ShortText | None = None
    country: ShortText | None = None


def epoch_ms(timestamp: int | datetime) -> int:
    """Return the milliseconds since 1970-01-01 UTC."""
    if isinstance(timestamp, int):
        return timestamp
    return round(timestamp.timestamp() * 1000)
