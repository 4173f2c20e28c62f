"""The further fields of a transaction that a checkpoint looks at: decoded, then as raw columns.

Which they are stands in the checkpoint (:class:`model.features.spec.Field`), so the type that a
record's JSON is decoded into is made at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.features.spec import Field, field_column
from model.transaction import Transaction

NUMBER_MAX = 1e12
"""Largest size of a number in a further field; keeps infinities out."""

TEXT_MAX_CHARACTERS = 256
"""Longest text in a further field."""

Number = Annotated[float, msgspec.Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX_CHARACTERS)] | int | bool
"""A category may be a number, as merchant category codes are; its digits are then its text."""

ALWAYS_THERE = frozenset(
    field.name for field in msgspec.structs.fields(Transaction) if field.required
)
"""Fields that every transaction has: no further ones."""


class FurtherFields:
    """Decodes transactions with these fields, and turns them into columns.

    A missing or null field is a missing value. A field of the wrong type makes the record
    one that cannot be scored.

    Args:
        fields: of the checkpoint, in the order of the columns.

    Attributes:
        decode_json: a record's value to a :class:`Transaction` with these fields.

    >>> further = FurtherFields([Field("age", "numeric"), Field("category", "categorical", ("a",))])
    >>> text = (b'{"transaction_id":"t","account_id":"a","merchant_id":"m","amount":1,'
    ...         b'"currency":"EUR","timestamp":0,"category":"a"}')
    >>> further.columns([further.decode_json(text)])
    array([[nan,  1.]], dtype=float32)
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = tuple(fields)
        # The attribute has another name than the field, which may be no identifier; a field that
        # Transaction has keeps its name, and takes the type that the checkpoint says.
        known = {field.name for field in msgspec.structs.fields(Transaction)}
        self._attributes = [
            field.name if field.name in known else f"further_{i}"
            for i, field in enumerate(self._fields)
        ]
        self._columns = [
            (attrgetter(attribute), field_column(field))
            for attribute, field in zip(self._attributes, self._fields, strict=True)
        ]
        self.decode_json: Callable[[bytes], Transaction] = msgspec.json.Decoder(self._type()).decode

    def _type(self) -> type[Transaction]:
        if not self._fields:
            return Transaction
        members: list[tuple[str, Any, Any]] = [
            (
                attribute,
                (Number if field.kind == "numeric" else Text) | None,
                msgspec.field(default=None, name=field.name),
            )
            for attribute, field in zip(self._attributes, self._fields, strict=True)
        ]
        made = msgspec.defstruct(
            "TransactionWithFields", members, bases=(Transaction,), frozen=True, gc=False
        )
        return cast("type[Transaction]", made)

    def columns(self, transactions: Sequence[Transaction]) -> NDArray[np.float32]:
        """Raw columns float32[n, K], as :func:`model.features.spec.field_column` makes them."""
        table = np.empty((len(transactions), len(self._columns)), np.float32)
        for i, (value_of, column) in enumerate(self._columns):
            table[:, i] = column(map(value_of, transactions))
        return table


NO_FURTHER_FIELDS = FurtherFields(())
