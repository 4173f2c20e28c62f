"""Extra fields of a transaction that a checkpoint reads: decoded, then as raw columns.

The checkpoint names them (:class:`model.features.account.Field`). So the type that a record's JSON
is decoded into is made at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.features.account import Field, field_column
from model.transaction import Transaction

NUMBER_MAX = 1e12
"""Largest absolute number in an extra field. It keeps infinities out."""

TEXT_MAX_CHARACTERS = 256
"""Longest text in an extra field."""

Number = Annotated[float, msgspec.Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX_CHARACTERS)] | int | bool
"""A category. It may be a number, as merchant category codes are; its digits become its text."""

ALWAYS_THERE = frozenset(
    field.name for field in msgspec.structs.fields(Transaction) if field.required
)
"""Fields that every transaction has. None of them can be an extra field."""


class ExtraFields:
    """Decoder of transactions with extra fields, which turns the fields into columns.

    A missing or null field is a missing value. A record with a field of the wrong type cannot be
    scored.

    Args:
        fields: the checkpoint's extra fields, in the order of the columns.

    Attributes:
        decode_json: turns a record's value into a :class:`Transaction` with these fields.

    >>> extra = ExtraFields([Field("age", "numeric"), Field("category", "categorical", ("a",))])
    >>> text = (b'{"transaction_id":"t","account_id":"a","merchant_id":"m","amount":1,'
    ...         b'"currency":"EUR","timestamp":0,"category":"a"}')
    >>> extra.columns([extra.decode_json(text)])
    array([[nan,  1.]], dtype=float32)
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = tuple(fields)
        # A field's name may be no identifier, so its attribute gets another name. A field that
        # Transaction has keeps its name and takes the checkpoint's type.
        known = {field.name for field in msgspec.structs.fields(Transaction)}
        self._attributes = [
            field.name if field.name in known else f"extra_{i}"
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
        """Make raw columns float32[n, K] with :func:`model.features.account.field_column`."""
        table = np.empty((len(transactions), len(self._columns)), np.float32)
        for i, (value_of, column) in enumerate(self._columns):
            table[:, i] = column(map(value_of, transactions))
        return table


NO_EXTRA_FIELDS = ExtraFields(())
