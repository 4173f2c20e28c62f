"""The codec refuses what cannot be scored, by a reason, and writes numbers exactly."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.features.merchant import MERCHANT_FEATURES, WEIGHT_MAX, WITHOUT_KNOWN_FRAUDS
from model.features.spec import FEATURES
from model.reasons import Reason
from model.transaction import AMOUNT_MAX, Transaction, epoch_ms
from pipeline.errors import RejectedError
from pipeline.kafka.score_log import Kept
from pipeline.messages.codec import (
    REASONS,
    VALUE_MAX_BYTES,
    ScoreEncoder,
    decode,
    decode_alert,
    decode_published,
    decode_score,
    encode_alert,
    encode_transaction,
    with_merchant_weight,
    with_out_of_range,
    with_refused_state,
    with_thresholds,
)
from pipeline.messages.decision import DECISIONS, Thresholds

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
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def record(**changes: Any) -> bytes:
    """A good transaction's JSON with other fields; None leaves a field out."""
    return json.dumps({k: v for k, v in (GOOD | changes).items() if v is not None}).encode()


def raw(field: str, json_text: str) -> bytes:
    """A good transaction's JSON with this text as a field's value."""
    return record(**{field: "@"}).replace(b'"@"', json_text.encode())


def reason_of(value: bytes | None, key: bytes | None = SECRET.encode()) -> str:
    with pytest.raises(RejectedError) as caught:
        decode(key, value, "EUR")
    assert caught.value.reason in REASONS
    assert SECRET not in str(caught.value), "a message shows what the record holds"
    return caught.value.reason


def test_a_good_record_is_a_transaction_with_all_its_fields() -> None:
    value = record(category="5411", channel="online", country="DE", something="else")

    transaction = decode(SECRET.encode(), value, "EUR")

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

    decode(SECRET.encode(), value + b" " * (VALUE_MAX_BYTES - len(value)), "EUR")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def decode_or_reject(key: bytes | None, value: bytes | None) -> None:
    """Anything but a transaction or a RejectedError fails the test."""
    reason = ""
    try:
        transaction = decode(key, value, "EUR")
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

    assert decode(transaction.account_id.encode(), value, "EUR") == transaction


def transaction_of(account: str, amount: float = 1.5) -> Transaction:
    return Transaction(
        transaction_id=account,
        account_id=account,
        merchant_id=account,
        amount=amount,
        currency="EUR",
        timestamp=1,
    )


@given(
    st.lists(texts.filter(bool), min_size=1, max_size=4, unique=True)
    | st.just(["100%", '"quoted"', "%b%s"]),
    st.lists(
        st.tuples(ids, st.floats(0, AMOUNT_MAX), st.floats(0, 1, width=32)), min_size=1, max_size=5
    ),
    st.data(),
)
def test_a_score_keeps_ids_amounts_and_every_bit_of_its_numbers(
    names: list[str], rows: list[tuple[str, float, float]], data: st.DataObject
) -> None:
    transactions = [transaction_of(account, amount) for account, amount, _ in rows]
    scores = np.array([score for *_, score in rows], np.float32)
    raw_inputs = np.array(
        [[data.draw(float32s) for _ in names] for _ in rows], np.float32
    )  # [n, features]

    values = ScoreEncoder(names, "0f3a").encode(
        transactions,
        list(range(len(rows))),
        [f"t:0:{i}" for i in range(len(rows))],
        scores,
        ["review"] * len(rows),
        raw_inputs,
    )

    assert len(values) == len(rows)
    for i, (value, transaction) in enumerate(zip(values, transactions, strict=True)):
        score = decode_score(value)
        assert score.transaction_id == score.account_id == transaction.account_id
        assert score.merchant_id == transaction.merchant_id
        assert (score.amount, score.timestamp) == (transaction.amount, i)
        assert (score.decision, score.model, score.source) == ("review", "0f3a", f"t:0:{i}")
        assert np.float32(score.score).tobytes() == scores[i].tobytes()
        assert list(score.features) == names
        read = np.array(list(score.features.values()), np.float32)
        assert read.tobytes() == raw_inputs[i].tobytes()


def test_no_transactions_are_no_scores() -> None:
    empty = np.empty((0, 2), np.float32)

    assert ScoreEncoder(["a", "b"], "m").encode([], [], [], empty[:, 0], [], empty) == []


def score_of(account: str) -> bytes:
    """A score's record of an account with the source ``t:0:9``."""
    (value,) = ScoreEncoder(["amount"], "0f3a").encode(
        [transaction_of(account)],
        [7],
        ["t:0:9"],
        np.array([0.75], np.float32),
        ["decline"],
        np.array([[1.5]], np.float32),
    )
    return value


REASONS_FOUND = [Reason("amount_high", 0.75), Reason("history", 0.25)]


@given(ids)
def test_an_alert_is_its_score_and_what_led_to_it(account: str) -> None:
    value = score_of(account)

    alert = decode_alert(
        encode_alert(with_thresholds(value, Thresholds(0.5, 0.7)), REASONS_FOUND, 99)
    )

    score = decode_score(value)
    assert {name: getattr(alert, name) for name in score.__struct_fields__} == (
        msgspec.structs.asdict(score) | {"thresholds": alert.thresholds}
    )
    assert alert.thresholds == {"review": 0.5, "decline": 0.7}
    assert (alert.reasons, alert.created_at) == (REASONS_FOUND, 99)


@given(ids)
def test_the_mark_of_a_refused_state_changes_nothing_else_and_reaches_the_alert(
    account: str,
) -> None:
    value = score_of(account)
    marked = with_refused_state(value)

    assert decode_score(value).state is None
    assert decode_score(marked) == msgspec.structs.replace(decode_score(value), state="refused")
    said = encode_alert(with_thresholds(marked, Thresholds(0.5, 0.7)), REASONS_FOUND, 99)
    assert decode_alert(said).state == "refused"
    published, plain = decode_published(marked), decode_published(value)
    assert published == plain, "recovery reads it as any other"


def test_a_merchant_weight_comes_back_as_it_is_stored_and_odd_inputs_by_name() -> None:
    value = score_of("A1")
    for weight in range(WEIGHT_MAX):  # each comes back as it is stored
        weighed = decode_published(with_merchant_weight(value, weight))
        assert weighed is not None
        assert weighed.weight == weight
    plain = decode_published(value)
    assert plain is not None
    assert plain.weight == WEIGHT_MAX
    odd = decode_score(with_out_of_range(value, ["amount", "count_1d"]))
    assert odd.out_of_range == ["amount", "count_1d"]
    assert decode_score(value).out_of_range is None


def test_recovery_reads_what_a_worker_published() -> None:
    published = decode_published(score_of("A1"))

    assert published is not None
    assert (published.source, published.score, published.decision) == ("t:0:9", 0.75, "decline")


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"junk",
        b"[]",
        b'{"source":"t:0:9"}',
        b'{"source":"\xff","score":1,"decision":"approve"}',
        b'{"source":"t:0:9","score":"high","decision":"approve"}',
        b'{"source":"t:0:9","score":1,"decision":"perhaps"}',
        b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    ],
)
def test_what_no_worker_wrote_is_nobodys_score(value: bytes | None) -> None:
    assert decode_published(value) is None


@given(st.binary(max_size=200))
def test_random_bytes_in_the_scores_topic_never_raise(value: bytes) -> None:
    decode_published(value)


@pytest.mark.parametrize("decision", DECISIONS)
def test_recovery_knows_every_decision(decision: str) -> None:
    value = b'{"source":"t:0:9","score":0.5,"decision":"%b"}' % decision.encode()

    assert decode_published(value) is not None


def test_a_score_leaves_out_what_every_merchant_without_known_frauds_has() -> None:
    raw = np.zeros((2, len(FEATURES)), np.float32)
    for name, number in WITHOUT_KNOWN_FRAUDS.items():
        raw[:, FEATURES.index(name)] = number
    raw[:, FEATURES.index("merchant_count_7d")] = 12
    raw[1, FEATURES.index("merchant_known_frauds")] = 3
    raw[1, FEATURES.index("merchant_oldest_fraud_days")] = 20.25
    transactions = [Transaction(f"t{i}", "a", "m", 1.0, "EUR", i) for i in range(2)]
    values = ScoreEncoder(FEATURES, "0f3a").encode(
        transactions, [1, 2], ["t:0:1", "t:0:2"], np.zeros(2, np.float32), ["approve"] * 2, raw
    )
    first, second = (decode_score(value).features for value in values)
    assert FEATURES == tuple(name for name in FEATURES if name in second)
    assert set(first) == set(FEATURES) - set(WITHOUT_KNOWN_FRAUDS)
    assert second["merchant_oldest_fraud_days"] == 20.25
    columns = [FEATURES.index(name) for name in MERCHANT_FEATURES]
    for value, expected in zip(values, raw[:, columns].tolist(), strict=True):
        published = decode_published(value)
        assert published is not None
        assert Kept(value, published).merchant_raw() == tuple(expected)
