"""Decoding of a record's value: JSON, bounds, reasons of rejection and times.

All record kinds share these rules. A record that breaks one raises
:class:`pipeline.errors.RejectedError` with a reason from :data:`REASONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, TypeVar

import msgspec

from model.transaction import epoch_ms
from pipeline.errors import RejectedError
from pipeline.timestamps import other_unit

T = TypeVar("T")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
"""A part of a whole, from 0 to 1."""

REASONS = (
    "null_value",
    "too_large",
    "not_json",
    "missing_field",
    "wrong_type",
    "id",
    "amount",
    "currency",
    "timestamp",
    "timestamp_unit",
    "old_timestamp",
    "future_timestamp",
    "id_conflict",
    "key_mismatch",
    "control",
    "computation",
    "label",
    "labelled_at",
    "batch_too_large",
    "merchant_weight",
)
"""Reasons of rejection: a closed set, so that each may be a metric label."""

VALUE_MAX_BYTES = 65_536
"""Largest value that is decoded, bytes. A transaction's JSON has a few hundred."""

TIME_FIELDS = ("timestamp", "labelled_at")

# RecursionError: brackets in brackets, a thousand deep.
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of a decoder whose input is not the expected JSON."""

decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
encode_json = msgspec.json.Encoder().encode

_FIELD_REASONS = {
    "`$.transaction_id`": "id",
    "`$.account_id`": "id",
    "`$.merchant_id`": "id",
    "`$.amount`": "amount",
    "`$.currency`": "currency",
    "`$.timestamp`": "timestamp",
    "`$.label`": "label",
    "`$.labelled_at`": "labelled_at",
    "`$.merchant_weight`": "merchant_weight",
}
_NUMBER = re.compile(rb"\d{1,20}(\.\d{1,20})?([eE]\+?\d\d?)?")

_MILLISECONDS_FROM, _MILLISECONDS_TO = 10**10, 10**14
"""Integers in this range are milliseconds and nothing else: most times skip the unit check."""


def decode_value(value: bytes | None, decoder: Callable[[bytes], T]) -> T:
    """Decode a record's value.

    Raises:
        RejectedError: the value is null, too large, or not what the decoder expects.
    """
    if value is None:
        raise RejectedError("null_value", "the value is null")
    if len(value) > VALUE_MAX_BYTES:
        raise RejectedError("too_large", f"{len(value)} bytes; the limit is {VALUE_MAX_BYTES}")
    try:
        return decoder(value)
    except msgspec.ValidationError as error:
        _reject_other_unit_in(value, str(error))
        reason = _reason(str(error))
        text = "the label is neither fraud nor legitimate" if reason == "label" else str(error)
        raise RejectedError(reason, text) from None
    except NOT_JSON as error:
        raise RejectedError("not_json", str(error)[:200]) from None


def payment_ms(timestamp: int | datetime, name: str = "timestamp") -> int:
    """Convert a time in a record to epoch milliseconds.

    Args:
        timestamp: the time as the record has it.
        name: the field's name, for the message.

    Raises:
        RejectedError: the time is before 1970, or a plausible time in another unit.
    """
    if isinstance(timestamp, int):
        if not _MILLISECONDS_FROM <= timestamp < _MILLISECONDS_TO:
            _reject_other_unit(timestamp, name)
        return timestamp
    timestamp_ms = epoch_ms(timestamp)
    if timestamp_ms < 0:
        raise RejectedError(name, f"the {name} is before 1970")
    return timestamp_ms


def _reject_other_unit(number: float, name: str) -> None:
    unit = other_unit(number)
    if unit is not None:
        raise RejectedError("timestamp_unit", f"the {name} looks like {unit}; send milliseconds")


def _reject_other_unit_in(value: bytes, message: str) -> None:
    """Name the unit of a time that the decoder rejects.

    A time in another unit is too large for milliseconds, a fraction, or text.

    Raises:
        RejectedError: the time in the decoder's message is plausible in another unit.
    """
    name = next((name for name in TIME_FIELDS if f"`$.{name}`" in message), None)
    if name is None:
        return
    try:
        text = bytes(decode_object(value).get(name, b""))
    except NOT_JSON:  # damaged behind the time: the decoder's own message rejects the record
        return
    number = _NUMBER.fullmatch(text.strip(b'"'))
    if number is not None:
        _reject_other_unit(float(number[0]), name)


def _reason(message: str) -> str:
    """Choose the reason for a message of msgspec."""
    if "missing required field" in message:
        return "missing_field"
    if "Expected `object`" in message or "got `" in message:
        return "wrong_type"
    for field, reason in _FIELD_REASONS.items():
        if field in message:
            return reason
    return "wrong_type"
