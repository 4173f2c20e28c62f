"""Scores and alerts in JSON: each number comes back bit for bit."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.features.merchant import MERCHANT_FEATURES, WEIGHT_MAX, WITHOUT_KNOWN_FRAUDS
from model.features.spec import FEATURES
from model.reasons import Reason
from model.transaction import AMOUNT_MAX, Transaction
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.decision import DECISIONS, DecisionThresholds
from pipeline.messages.scores import (
    STATE_INVALID,
    ScoreEncoder,
    decode_alert,
    decode_published,
    decode_score,
    encode_alert,
    with_thresholds,
)
from tests.pipeline.messages.test_transactions import ids, texts

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


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

    encoder = ScoreEncoder(names, "0f3a")
    numbers = encoder.numbers(scores, raw_inputs)
    values = [
        encoder.encode(transaction, i, f"t:0:{i}", numbers[i], "review")
        for i, transaction in enumerate(transactions)
    ]

    assert len(numbers) == len(rows)
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


def score_of(account: str, **marks: Any) -> bytes:
    """Make an account's score with the source ``t:0:9``."""
    encoder = ScoreEncoder(["amount"], "0f3a")
    (numbers,) = encoder.numbers(np.array([0.75], np.float32), np.array([[1.5]], np.float32))
    return encoder.encode(transaction_of(account), 7, "t:0:9", numbers, "decline", **marks)


THRESHOLDS = DecisionThresholds(0.5, 0.7)
REASONS_FOUND = [Reason("amount_high", 0.75), Reason("history", 0.25)]


@given(ids)
def test_an_alert_is_its_score_with_thresholds_and_reasons(account: str) -> None:
    value = score_of(account, thresholds=THRESHOLDS)

    alert = decode_alert(encode_alert(value, REASONS_FOUND, 99))

    score = decode_score(value)
    assert {name: getattr(alert, name) for name in score.__struct_fields__} == (
        msgspec.structs.asdict(score)
    )
    assert alert.thresholds == {"review": 0.5, "decline": 0.7}
    assert (alert.reasons, alert.created_at) == (REASONS_FOUND, 99)


@given(ids)
def test_thresholds_added_to_an_older_score_give_the_same_record(account: str) -> None:
    added = with_thresholds(score_of(account), THRESHOLDS)

    assert added == score_of(account, thresholds=THRESHOLDS)


@given(ids)
def test_an_invalid_state_only_marks_the_score_and_its_alert(account: str) -> None:
    value = score_of(account)
    marked = score_of(account, state=STATE_INVALID)

    assert decode_score(value).state is None
    assert decode_score(marked) == msgspec.structs.replace(decode_score(value), state="invalid")
    both = score_of(account, state=STATE_INVALID, thresholds=THRESHOLDS)
    assert decode_alert(encode_alert(both, REASONS_FOUND, 99)).state == "invalid"
    published, plain = decode_published(marked), decode_published(value)
    assert published == plain, "recovery reads it as any other score"
    older = marked.replace(b'"invalid"', b'"refused"')
    assert decode_score(older).state == "refused", "version 0.1 wrote this word"


def test_a_merchant_weight_and_names_out_of_range_are_decoded_as_stored() -> None:
    for weight in range(WEIGHT_MAX):
        weighed = decode_published(score_of("A1", weight=weight))
        assert weighed is not None
        assert weighed.weight == weight
    plain = decode_published(score_of("A1", weight=WEIGHT_MAX))
    assert plain is not None
    assert plain.merchant_weight is None, "a full weight is left out"
    assert plain.weight == WEIGHT_MAX
    odd = decode_score(score_of("A1", out_of_range=["amount", "count_1d"]))
    assert odd.out_of_range == ["amount", "count_1d"]
    assert decode_score(score_of("A1")).out_of_range is None


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
def test_a_record_that_no_worker_wrote_is_no_score(value: bytes | None) -> None:
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
    encoder = ScoreEncoder(FEATURES, "0f3a")
    numbers = encoder.numbers(np.zeros(2, np.float32), raw)
    values = [
        encoder.encode(transaction, 1, "t:0:1", numbers[i], "approve")
        for i, transaction in enumerate(transactions)
    ]
    first, second = (decode_score(value).features for value in values)
    assert FEATURES == tuple(name for name in FEATURES if name in second)
    assert set(first) == set(FEATURES) - set(WITHOUT_KNOWN_FRAUDS)
    assert second["merchant_oldest_fraud_days"] == 20.25
    columns = [FEATURES.index(name) for name in MERCHANT_FEATURES]
    for value, expected in zip(values, raw[:, columns].tolist(), strict=True):
        published = decode_published(value)
        assert published is not None
        assert LoggedScore(value, published, 0).merchant_raw() == tuple(expected)
