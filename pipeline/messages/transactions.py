"""Transactions in JSON: decoded from the transactions topic, and encoded as producers do."""

from __future__ import annotations

import msgspec

from model.transaction import Transaction
from pipeline.errors import RejectedError
from pipeline.messages.decoding import (
    NOT_JSON,
    VALUE_MAX_BYTES,
    decode_object,
    decode_value,
    encode_json,
)
from pipeline.messages.extra_fields import NO_EXTRA_FIELDS, ExtraFields

WARM_HEADER = "recur-warm"
"""Header of a transaction that builds state and raises no alert. It may be of any age."""

HISTORY_HEADER = "recur-history"
"""Header of a transaction of the past, as a replay sends it. It may be of any age."""


def decode_transaction(
    key: bytes | None,
    value: bytes | None,
    currency: str,
    extra_fields: ExtraFields = NO_EXTRA_FIELDS,
) -> Transaction:
    """Decode the transaction in a record.

    Args:
        key: the account id in UTF-8.
        value: JSON.
        currency: the checkpoint's. It cannot score amounts in another currency.
        extra_fields: fields that the checkpoint reads besides the usual ones.

    Raises:
        RejectedError: the record cannot be scored. The message shows none of its content.
    """
    transaction = decode_value(value, extra_fields.decode_json)
    if key != transaction.account_id.encode():
        raise RejectedError("key_mismatch", "the record's key is not its account_id")
    if transaction.currency != currency:
        raise RejectedError("currency", f"the checkpoint was trained on amounts in {currency}")
    return transaction


def encode_transaction(transaction: Transaction) -> bytes:
    """Encode a transaction as producers do."""
    return encode_json(transaction)


class _Id(msgspec.Struct, frozen=True, gc=False):
    transaction_id: str = ""


_decode_id = msgspec.json.Decoder(_Id).decode


def decode_transaction_id(value: bytes | None) -> str:
    """Read the id of a transaction; an empty text if the value is no transaction's JSON."""
    try:
        return _decode_id(value or b"").transaction_id
    except NOT_JSON:
        return ""


def field_names(value: bytes | None) -> set[str]:
    """Name the fields of a transaction; an empty set if the value is no transaction's JSON."""
    if value is None or len(value) > VALUE_MAX_BYTES:
        return set()
    try:
        fields = decode_object(value)
    except NOT_JSON:
        return set()
    return set(fields) if "account_id" in fields else set()
