"""Further fields of a transaction: what a checkpoint asks for is decoded, checked and encoded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.features.account import Field, field_column
from pipeline.errors import RejectedError
from pipeline.messages.extra_fields import NUMBER_MAX, TEXT_MAX_CHARACTERS, ExtraFields
from pipeline.messages.transactions import decode_transaction

FIELDS = (
    Field("category", "categorical", ("food", "5411")),
    Field("card age", "numeric"),
    Field("online", "categorical", ("true",)),
)
FURTHER = ExtraFields(FIELDS)


def value(**more: Any) -> bytes:
    fields = {
        "transaction_id": "t1",
        "account_id": "a1",
        "merchant_id": "m1",
        "amount": 12.5,
        "currency": "EUR",
        "timestamp": 0,
    }
    return json.dumps(fields | more).encode()


def columns(*more: dict[str, Any]) -> NDArray[np.float32]:
    found = FURTHER.columns([decode_transaction(b"a1", value(**m), "EUR", FURTHER) for m in more])
    assert found.dtype == np.float32
    return found


def test_fields_become_columns_whatever_is_missing() -> None:
    found = columns(
        {"category": "food", "card age": 3.5, "online": True},
        {"category": 5411, "card age": 2, "online": False},
        {"category": None, "card age": None},
        {},
    )
    nan = float("nan")
    expected = np.array([[1, 3.5, 1], [2, 2, 0], [0, nan, 0], [0, nan, 0]])
    assert np.array_equal(found, expected, equal_nan=True)


def test_columns_are_those_of_training() -> None:
    rows: list[dict[str, Any]] = [
        {"category": "food", "card age": 1},
        {"category": "x", "card age": None},
        {"category": None, "card age": 2.5},
    ]
    transactions = [decode_transaction(b"a1", value(**row), "EUR", FURTHER) for row in rows]

    expected = [
        field_column(FIELDS[0])([row["category"] for row in rows]),
        field_column(FIELDS[1])([row["card age"] for row in rows]),
    ]

    found = FURTHER.columns(transactions)[:, :2].T
    assert np.array_equal(found, np.array(expected), equal_nan=True)


@pytest.mark.parametrize(
    "more",
    [
        {"card age": "old"},
        {"card age": True},
        {"card age": [1]},
        {"card age": 2 * NUMBER_MAX},
        {"category": ["food"]},
        {"category": {"a": 1}},
        {"category": "x" * (TEXT_MAX_CHARACTERS + 1)},
        {"online": 1.5},
    ],
)
def test_a_field_of_the_wrong_type_is_rejected_as_such(more: dict[str, Any]) -> None:
    with pytest.raises(RejectedError) as caught:
        decode_transaction(b"a1", value(**more), "EUR", FURTHER)

    assert caught.value.reason == "wrong_type"


def test_infinity_is_no_number() -> None:
    text = value(**{"card age": 1.0}).replace(b'"card age": 1.0', b'"card age": 1e999')

    with pytest.raises(RejectedError):
        decode_transaction(b"a1", text, "EUR", FURTHER)


def test_what_no_checkpoint_asks_for_is_ignored() -> None:
    transaction = decode_transaction(b"a1", value(**{"card age": "old", "online": []}), "EUR")

    assert transaction.account_id == "a1"


def test_required_fields_stay_required() -> None:
    with pytest.raises(RejectedError) as caught:
        decode_transaction(b"a1", b'{"category":"food"}', "EUR", FURTHER)

    assert caught.value.reason == "missing_field"


def test_without_fields_there_are_no_columns() -> None:
    none = ExtraFields(())

    assert none.columns([decode_transaction(b"a1", value(), "EUR", none)]).shape == (1, 0)
    assert FURTHER.columns([]).shape == (0, 3)
