"""Labels in JSON: whether a transaction was fraud, and when that became known."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal

import msgspec

from model.transaction import Id, ShortText, Timestamp, epoch_ms
from model.units import DAY_MS, HOUR_MS
from pipeline.errors import RejectedError
from pipeline.messages.decoding import (
    TIME_FIELDS,
    Share,
    decode_object,
    decode_value,
    encode_json,
    payment_ms,
)
from pipeline.timestamps import labelled_time

LABELS = ("fraud", "legitimate")

_DATE = re.compile(rb'"(\d{4}-\d\d-\d\d)"')
_DAY_END_MS = DAY_MS + 12 * HOUR_MS
"""End of a date in the last time zone, counted from the date's midnight UTC."""
_DAY_BEGIN_MS = 14 * HOUR_MS
"""Begin of a date in the first time zone, counted back from the date's midnight UTC."""


class Label(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The truth about a transaction, as a record of the labels topic; its key is merchant_id.

    ``timestamp`` is the transaction's. ``labelled_at`` is when the truth became known, and
    ``source`` names who reported it. ``merchant_weight`` says how far the merchant explains a
    fraud, from 0 to 1. Without it the worker takes the weight that it noted with the score.
    """

    transaction_id: Id
    account_id: Id
    merchant_id: Id
    label: Literal["fraud", "legitimate", "genuine"]
    timestamp: Timestamp
    labelled_at: Timestamp
    source: ShortText | None = None
    merchant_weight: Share | None = None

    def __post_init__(self) -> None:
        """Read ``genuine`` as ``legitimate``: logs hold the word from before version 0.2.0."""
        if self.label == "genuine":
            msgspec.structs.force_setattr(self, "label", "legitimate")


_decode_label = msgspec.json.Decoder(Label).decode


def decode_label(key: bytes | None, value: bytes | None) -> tuple[Label, int, int]:
    """Decode the label in a record.

    Args:
        key: the merchant id in UTF-8.
        value: JSON.

    Returns:
        the label, its transaction's time and its own time, both in epoch milliseconds.

    Raises:
        RejectedError: the label cannot be counted. The message shows none of its content.
    """
    label, dates = decode_value(value, _decode_dated_label)
    if key != label.merchant_id.encode():
        raise RejectedError("key_mismatch", "the record's key is not its merchant_id")
    timestamp_ms = payment_ms(label.timestamp)
    labelled_ms = payment_ms(label.labelled_at, "labelled_at")
    if "labelled_at" in dates:
        if "timestamp" not in dates:
            labelled_ms = labelled_time(timestamp_ms, labelled_ms, _DAY_END_MS)
    elif _is_midnight(label.labelled_at):
        labelled_ms = labelled_time(timestamp_ms, labelled_ms)
    if dates == {"timestamp"} and timestamp_ms - _DAY_BEGIN_MS <= labelled_ms < timestamp_ms:
        timestamp_ms = labelled_ms
    if labelled_ms < timestamp_ms:
        raise RejectedError("labelled_at", "labelled_at is before the transaction's timestamp")
    return label, timestamp_ms, labelled_ms


def encode_label(label: Label) -> bytes:
    """Encode a label as producers do."""
    return encode_json(label)


def _is_midnight(timestamp: int | datetime) -> bool:
    """Tell whether a time may stand for a date without a time."""
    if isinstance(timestamp, int):
        return timestamp % DAY_MS == 0
    return timestamp.time() == datetime.min.time()


def _decode_dated_label(value: bytes) -> tuple[Label, set[str]]:
    """Decode a label; read a date without a time as its midnight UTC.

    Returns:
        the label, and the names of the fields that hold dates.
    """
    try:
        return _decode_label(value), set()
    except msgspec.ValidationError:
        fields = decode_object(value)
        dates: dict[str, int] = {}
        for name in TIME_FIELDS:
            found = _DATE.fullmatch(bytes(fields.get(name, b"")))
            if found is not None:
                dates[name] = _midnight_ms(found[1].decode())
        if not dates:
            raise
    return _decode_label(encode_json({**fields, **dates})), set(dates)


def _midnight_ms(date: str) -> int:
    try:
        return epoch_ms(datetime.fromisoformat(date).replace(tzinfo=UTC))
    except ValueError:  # no such day
        return -1
