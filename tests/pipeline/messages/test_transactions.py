"""Transactions in JSON: a record that cannot be scored is rejected with its reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.transaction import AMOUNT_MAX, Transaction, epoch_ms
from pipeline.errors import RejectedError
from pipeline.messages.decoding import REASONS, VALUE_MAX_BYTES
from pipeline.messages.transactions import decode_transaction, encode_transaction

SECRET = "4111-1111-1111-1111"
"""An account number that must not come back in a message."""

GOOD: dict[str, Any] = {
    "transaction_id": "t-1",
    "account_id": SECRET,
    "merchant_id": "m-1",
    "amount": 12.5,
    "currency": "EUR",
    "timestamp": "2018-08-15T10:00:00Z",
}

texts = st.text(st.characters(codec="utf-8"), max_size=20)
ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256) | st.sampled_from(
    [
        "%s",
        "100%",
        "%(a)s",
        '"',
        '\\"',
        "\\",
        "\0",
        "{}",
        "],[",
        "é",
        "日本語",
        "🙂",
        "a\nb",
        "\u2028",
    ]
)


def record(**changes: Any) -> bytes:
    """A good transaction's JSON with other fields; None leaves a field out."""
    return json.dumps({k: v for k, v in (GOOD | changes).items() if v is not None}).encode()


def raw(field: str, json_text: str) -> bytes:
    """A good transaction's JSON with this text as a field's value."""
    return record(**{field: "@"}).replace(b'"@"', json_text.encode())


def reason_of(value: bytes | None, key: bytes | None = SECRET.encode()) -> str:
    with pytest.raises(RejectedError) as caught:
        decode_transaction(key, value, "EUR")
    assert caught.value.reason in REASONS
    assert SECRET not in str(caught.value), "a message shows what the record holds"
    return caught.value.reason


def test_a_good_record_is_a_transaction_with_all_its_fields() -> None:
    value = record(category="5411", channel="online", country="DE", something="else")

    transaction = decode_transaction(SECRET.encode(), value, "EUR")

    assert transaction == Transaction(
        transaction_id="t-1",
        account_id=SECRET,
        merchant_id="m-1",
        amount=12.5,
        currency="EUR",
        timestamp=datetime(2018, 8, 15, 10, tzinfo=UTC),
        category="5411",
        channel="online",
        country="DE",
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null_value"),
        (b"", "not_json"),
        (b"hello", "not_json"),
        (record()[:-1], "not_json"),
        (record() + b" and more", "not_json"),
        (record().decode().encode("utf-16"), "not_json"),
        (raw("merchant_id", '"@"').replace(b"@", b"\xff"), "not_json"),
        (raw("merchant_id", r'"\ud800"'), "not_json"),
        (b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "not_json"),
        (b'{"x":' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}", "not_json"),
        (b" " * 1_000_000 + record(), "too_large"),
        (b"x" * (VALUE_MAX_BYTES + 1), "too_large"),
        (b"[]", "wrong_type"),
        (b'"text"', "wrong_type"),
        (b"null", "wrong_type"),
        (b"{}", "missing_field"),
        *((record(**{field: None}), "missing_field") for field in GOOD),
        *((raw(field, "null"), "wrong_type") for field in GOOD),
        *((raw(field, "{}"), "wrong_type") for field in GOOD),
        *((raw(field, "7"), "wrong_type") for field in GOOD if field.endswith("_id")),
        *((record(**{field: ""}), "id") for field in GOOD if field.endswith("_id")),
        *((record(**{field: "x" * 10_000}), "id") for field in GOOD if field.endswith("_id")),
        (raw("amount", "NaN"), "not_json"),
        (raw("amount", "Infinity"), "not_json"),
        (raw("amount", "-Infinity"), "not_json"),
        (raw("amount", "1e999"), "amount"),
        (raw("amount", "9" * 400), "amount"),
        (record(amount=-0.01), "amount"),
        (record(amount=AMOUNT_MAX * 1.01), "amount"),
        (record(amount="12.50"), "wrong_type"),
        (record(amount=True), "wrong_type"),
        (record(currency="USD"), "currency"),
        (record(currency="eur"), "currency"),
        (record(currency="EURO"), "currency"),
        (record(currency=""), "currency"),
        (record(timestamp="yesterday"), "timestamp"),
        (record(timestamp="2018-08-15T10:00:00"), "timestamp"),
        (record(timestamp="2018-02-30T10:00:00Z"), "timestamp"),
        (record(timestamp=-1), "timestamp"),
        (raw("timestamp", "9" * 30), "timestamp"),
        (record(timestamp=1.5), "wrong_type"),
        (record(category="x" * 65), "wrong_type"),
        (record(country=49), "wrong_type"),
    ],
)
def test_each_kind_of_bad_record_is_rejected_with_its_reason(
    value: bytes | None, reason: str
) -> None:
    assert reason_of(value) == reason


@pytest.mark.parametrize("key", [None, b"", b"another", SECRET.encode() + b" ", b"\xff"])
def test_a_key_that_is_not_the_account_is_rejected(key: bytes | None) -> None:
    assert reason_of(record(), key) == "key_mismatch"


def test_a_record_of_exactly_the_largest_size_is_looked_at() -> None:
    value = record()

    decode_transaction(SECRET.encode(), value + b" " * (VALUE_MAX_BYTES - len(value)), "EUR")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def decode_or_reject(key: bytes | None, value: bytes | None) -> None:
    """Anything but a transaction or a RejectedError fails the test."""
    reason = ""
    try:
        transaction = decode_transaction(key, value, "EUR")
    except RejectedError as error:
        reason = error.reason
    assert reason in REASONS if reason else isinstance(epoch_ms(transaction.timestamp), int)


@given(st.none() | st.binary(max_size=40), st.none() | st.binary(max_size=400))
def test_random_bytes_never_raise_anything_but_rejected(
    key: bytes | None, value: bytes | None
) -> None:
    decode_or_reject(key, value)


@given(st.sampled_from(sorted(GOOD)), json_values)
def test_random_json_in_a_field_never_raises_anything_but_rejected(field: str, value: Any) -> None:
    decode_or_reject(SECRET.encode(), json.dumps(GOOD | {field: value}).encode())


@given(st.data())
def test_a_damaged_record_never_raises_anything_but_rejected(data: st.DataObject) -> None:
    value = bytearray(record())
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))

    decode_or_reject(SECRET.encode(), bytes(value))


@given(st.text("0123456789-+:.TZ", max_size=35) | st.datetimes(timezones=st.timezones()).map(str))
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59.999999-23:59")
def test_a_timestamp_at_the_edge_of_the_calendar_never_overflows(timestamp: str) -> None:
    decode_or_reject(SECRET.encode(), record(timestamp=timestamp))


@given(
    transaction=st.builds(
        Transaction,
        transaction_id=ids,
        account_id=ids,
        merchant_id=ids,
        amount=st.floats(0, AMOUNT_MAX),
        currency=st.just("EUR"),
        timestamp=st.integers(0, 253_402_300_799_999),
        category=st.none() | texts,
    )
)
def test_what_a_producer_encodes_is_decoded_as_the_same_transaction(
    transaction: Transaction,
) -> None:
    value = encode_transaction(transaction)

    assert decode_transaction(transaction.account_id.encode(), value, "EUR") == transaction
