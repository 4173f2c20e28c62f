"""Bodies of requests as records: validated as a worker does, with the wrong field named.

A gateway accepts exactly what a worker scores. It runs the worker's own decoder on the record that
it is about to produce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from model.checkpoint import Checkpoint
from model.transaction import Transaction
from pipeline.errors import RejectedError
from pipeline.gateway.problems import INVALID_FIELDS, NOT_JSON, FieldError, Problem, field_error
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.polls import Chunk
from pipeline.messages.decoding import NOT_JSON as DECODE_ERRORS
from pipeline.messages.decoding import VALUE_MAX_BYTES
from pipeline.messages.labels import decode_label
from pipeline.messages.replies import content_hash
from pipeline.scoring.decoder import BatchDecoder
from pipeline.settings import Settings

FIELD_OF_REASON = {
    "amount": "amount",
    "currency": "currency",
    "timestamp": "timestamp",
    "timestamp_unit": "timestamp",
    "old_timestamp": "timestamp",
    "future_timestamp": "timestamp",
    "label": "label",
    "labelled_at": "labelled_at",
    "merchant_weight": "merchant_weight",
}
"""Field that a reason of rejection is about, where the decoder's text names none."""

TIMES = ("timestamp", "labelled_at")

EXACT_BELOW = 2.0**53
"""Floats below this hold each whole number."""

decode_any = msgspec.json.Decoder().decode
encode_sorted = msgspec.json.Encoder(order="deterministic").encode


@dataclass(frozen=True)
class Incoming:
    """A valid transaction on its way to the log.

    Attributes:
        transaction: as the worker reads it.
        sent_ms: its event time as sent, epoch milliseconds.
        timestamp_ms: its event time for the account's features.
        partition: its partition.
        value: the record's value: the body's fields in a fixed order, also those that the
            checkpoint does not read. So equal bodies have equal values, however written.
        content: hash of the value.
    """

    transaction: Transaction
    sent_ms: int
    timestamp_ms: int
    partition: int
    value: bytes
    content: bytes

    @property
    def transaction_id(self) -> str:
        """Its id."""
        return self.transaction.transaction_id

    @property
    def key(self) -> bytes:
        """The record's key."""
        return self.transaction.account_id.encode()


@dataclass
class _Record:
    """A record as the decoder sees it."""

    key: bytes | None
    value: bytes | None
    timestamp: int
    offset: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


class TransactionReader:
    """Reader of transactions in requests.

    Args:
        settings: limits of time.
        checkpoint: its currency and extra fields.
        partitions: number of partitions of the transactions topic.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        partitions: int,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._decoder = BatchDecoder(settings, checkpoint, clock_ms)
        self.extra_fields = self._decoder.extra_fields
        self._partitions = partitions
        self._clock_ms = clock_ms

    def read(self, body: bytes, pointer: str = "") -> Incoming:
        """Read a transaction.

        Args:
            body: JSON.
            pointer: JSON pointer of the transaction in the request's body.

        Raises:
            Problem: a worker would reject it; the problem names the field.
        """
        return self.read_fields(read_object(body, pointer), pointer)

    def read_fields(self, fields: dict[str, Any], pointer: str = "") -> Incoming:
        """Read a transaction that is an object already; see :meth:`read`."""
        value = encode_sorted(_with_whole_times(fields))
        account = fields.get("account_id")
        try:
            key = account.encode() if isinstance(account, str) else b""
        except UnicodeEncodeError:  # half of a surrogate pair
            key = b""
        record = _Record(key, value, self._clock_ms())
        part = self._decoder.decode(0, Chunk(0, 1, [record]))
        if part.rejected:
            _, reason, text = part.rejected[0]
            raise rejected_field(reason, text, pointer)
        partition = key_partition(key, self._partitions)
        return Incoming(
            part.transactions[0],
            part.sent_ms[0],
            part.timestamps_ms[0],
            partition,
            value,
            content_hash(value),
        )


def _with_whole_times(fields: dict[str, Any]) -> dict[str, Any]:
    """Write times such as 1700000000000.0 without the fraction: JSON has one kind of number."""
    whole = {
        name: int(value)
        for name in TIMES
        if isinstance(value := fields.get(name), float)
        and value.is_integer()
        and abs(value) < EXACT_BELOW
    }
    return fields | whole if whole else fields


def read_object(
    body: bytes, pointer: str = "", size_max: int | None = VALUE_MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        body: JSON.
        pointer: JSON pointer of the object in the request's body.
        size_max: most bytes; None: the request's limit is enough.

    Raises:
        Problem: it is no JSON (400), no object (422), or too large for a record (422).
    """
    try:
        fields = decode_any(body)
    except DECODE_ERRORS as error:
        detail = str(error)[:200]
        raise Problem(NOT_JSON, detail, errors=[FieldError(detail, pointer=pointer)]) from None
    if not isinstance(fields, dict):
        detail = "must be an object"
        raise Problem(INVALID_FIELDS, errors=[FieldError(detail, pointer=pointer)])
    if size_max is not None and len(body) > size_max:
        detail = f"has over {size_max} bytes"
        raise Problem(INVALID_FIELDS, errors=[FieldError(detail, pointer=pointer)])
    return fields


def read_label(body: bytes, now_ms: int) -> tuple[str, str, bytes, bytes]:
    """Read a label. Without ``labelled_at`` it became known now.

    Returns:
        its transaction id and account id, and the record's key and value.

    Raises:
        Problem: a worker would reject it; the problem names the field.
    """
    fields = read_object(body)
    if fields.get("labelled_at") is None:
        fields["labelled_at"] = now_ms
    merchant = fields.get("merchant_id")
    key = merchant.encode(errors="replace") if isinstance(merchant, str) else b""
    value = encode_sorted(_with_whole_times(fields))
    try:
        label, _, _ = decode_label(key, value)
    except RejectedError as error:
        raise rejected_field(error.reason, str(error)) from None
    return label.transaction_id, label.account_id, key, value


def rejected_field(reason: str, text: str, pointer: str = "") -> Problem:
    """Make the problem for a record that a worker would reject."""
    error = field_error(msgspec.ValidationError(text))
    place = error.pointer or ""
    if not place and reason in FIELD_OF_REASON:
        place = "/" + FIELD_OF_REASON[reason]
    named = FieldError(error.detail, pointer=pointer + place)
    return Problem(INVALID_FIELDS, errors=[named], extensions={"reason": reason})
