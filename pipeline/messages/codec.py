"""Records to transactions, and scores to records: everything that is JSON.

Decoding refuses what cannot be scored with a :class:`RejectedError` whose reason is one of
:data:`REASONS`. Encoding writes a micro-batch's numbers in one call: orjson prints the
shortest decimal that is the same float32, so that a decision can be recomputed exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES, WEIGHT_MAX, WITHOUT_KNOWN_FRAUDS
from model.reasons import Reason
from model.transaction import (
    ID_MAX_CHARACTERS,
    Id,
    ShortText,
    Timestamp,
    Transaction,
    epoch_ms,
)
from pipeline.errors import RejectedError
from pipeline.messages.decision import DECISIONS, Thresholds
from pipeline.messages.extra_fields import NO_FURTHER_FIELDS, FurtherFields
from pipeline.timestamps import DAY_MS, labelled_time, other_unit

T = TypeVar("T")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
WEIGHT_DIGITS = 3
"""Decimals of a merchant weight in JSON: enough to tell all that are stored."""

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
"""Why a record is rejected: a closed set, fit for a metric label."""

VALUE_MAX_BYTES = 65_536
"""A transaction's JSON is a few hundred bytes; a value over this is not looked at."""

CONTROL_HEADER = "recur-control"
"""Marks a record of the transactions topic that is an instruction, not a transaction; the header
names the instruction, and the record has no value."""

FORGET = b"forget"
"""The instruction to forget the account that is the record's key: it begins anew."""

LOOK = b"look"
"""The instruction to look at the partition's watermark, which each poll does: it wakes a worker."""

WARM_HEADER = "recur-warm"
"""Marks a transaction that builds state and raises no alert; it may be of any age."""

HISTORY_HEADER = "recur-history"
"""Marks a transaction of the past, as a replay sends it: it may be of any age."""

STATE_REFUSED = "refused"
"""Of a score: the account's state was damaged or of another version, and counted as absent."""

KNOWN_FRAUDS = "merchant_known_frauds"
PAUSE = "seconds_since_last"

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
_TIMES = ("timestamp", "labelled_at")
_NUMBER = re.compile(rb"\d{1,20}(\.\d{1,20})?([eE]\+?\d\d?)?")
_DATE = re.compile(rb'"(\d{4}-\d\d-\d\d)"')
_DAY_END_MS = DAY_MS + 12 * 3_600_000
"""Where it is still the day of a date that begins at midnight UTC, counted from there."""
_DAY_BEGIN_MS = 14 * 3_600_000
"""Where it is the day of a date already, before midnight UTC."""

# RecursionError: brackets in brackets, a thousand deep.
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class Label(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The truth about a transaction, as the labels topic carries it; its key is merchant_id.

    ``timestamp`` is the transaction's; ``labelled_at`` is when the truth became known, and
    ``source`` who said so. ``merchant_weight`` is how far the merchant explains a fraud, from 0
    to 1, where the sender knows; else what the worker knew of the transaction decides.
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


LABELS = ("fraud", "legitimate")

_decode_label = msgspec.json.Decoder(Label).decode


def decode(
    key: bytes | None,
    value: bytes | None,
    currency: str,
    further: FurtherFields = NO_FURTHER_FIELDS,
) -> Transaction:
    """The transaction in a record.

    Args:
        key: must be the account id in UTF-8.
        value: JSON.
        currency: the checkpoint's; amounts in another one mean something else.
        further: fields that the checkpoint looks at.

    Raises:
        RejectedError: the record cannot be scored; the message holds none of its content.
    """
    transaction = _decoded(value, further.decode_json)
    if key != transaction.account_id.encode():
        raise RejectedError("key_mismatch", "the record's key is not its account_id")
    if transaction.currency != currency:
        raise RejectedError("currency", f"the checkpoint was trained on amounts in {currency}")
    return transaction


def decode_instruction(
    key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
) -> str | None:
    """What a record with a control header instructs.

    Returns:
        the account to forget; None where there is nothing to do.

    Raises:
        RejectedError: it is no instruction that this version knows.
    """
    instructions = [text for name, text in headers if name == CONTROL_HEADER]
    if instructions not in ([FORGET], [LOOK]):
        raise RejectedError("control", "an instruction that this version does not know")
    if value:
        raise RejectedError("control", "an instruction has no value")
    if instructions == [LOOK]:
        return None
    try:
        account_id = (key or b"").decode()
    except UnicodeDecodeError:
        account_id = ""
    if not 0 < len(account_id) <= ID_MAX_CHARACTERS:
        raise RejectedError("control", "the key of this instruction is no account id")
    return account_id


def names_in(value: bytes | None) -> set[str]:
    """The names of a transaction's fields; none of what is no JSON object with an account."""
    if value is None or len(value) > VALUE_MAX_BYTES:
        return set()
    try:
        fields = _decode_object(value)
    except _NOT_JSON:
        return set()
    return set(fields) if "account_id" in fields else set()


def decode_label(key: bytes | None, value: bytes | None) -> tuple[Label, int, int]:
    """The label in a record, its transaction's time and its own, epoch milliseconds.

    Args:
        key: must be the merchant id in UTF-8.
        value: JSON.

    Raises:
        RejectedError: the record cannot be booked; the message holds none of its content.
    """
    label, dates = _decoded(value, _decode_dated_label)
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


def payment_ms(timestamp: int | datetime, name: str = "timestamp") -> int:
    """Epoch milliseconds of a time in a record.

    Args:
        name: of its field.

    Raises:
        RejectedError: it is a plausible time in another unit, or before 1970.
    """
    if isinstance(timestamp, int):
        if not _NO_OTHER_UNIT_FROM <= timestamp < _NO_OTHER_UNIT_TO:
            _refuse_other_unit(timestamp, name)
        return timestamp
    timestamp_ms = epoch_ms(timestamp)
    if timestamp_ms < 0:
        raise RejectedError(name, f"the {name} is before 1970")
    return timestamp_ms


_NO_OTHER_UNIT_FROM, _NO_OTHER_UNIT_TO = 10**10, 10**14


def _refuse_other_unit(number: float, name: str) -> None:
    unit = other_unit(number)
    if unit is not None:
        raise RejectedError("timestamp_unit", f"the {name} looks like {unit}; send milliseconds")


def _is_midnight(timestamp: int | datetime) -> bool:
    """Whether a time is how a date without a time is written as one."""
    if isinstance(timestamp, int):
        return timestamp % DAY_MS == 0
    return timestamp.time() == datetime.min.time()


def _decode_dated_label(value: bytes) -> tuple[Label, set[str]]:
    """Decode a label; a date without a time is taken as its midnight UTC.

    Returns:
        the label, and which fields are dates.
    """
    try:
        return _decode_label(value), set()
    except msgspec.ValidationError:
        fields = _decode_object(value)
        dates: dict[str, int] = {}
        for name in _TIMES:
            found = _DATE.fullmatch(bytes(fields.get(name, b"")))
            if found is not None:
                dates[name] = _midnight_ms(found[1].decode())
        if not dates:
            raise
    return _decode_label(_encode({**fields, **dates})), set(dates)


def _midnight_ms(date: str) -> int:
    try:
        return epoch_ms(datetime.fromisoformat(date).replace(tzinfo=UTC))
    except ValueError:  # no such day
        return -1


def _decoded(value: bytes | None, decoder: Callable[[bytes], T]) -> T:
    if value is None:
        raise RejectedError("null_value", "the value is null")
    if len(value) > VALUE_MAX_BYTES:
        raise RejectedError("too_large", f"{len(value)} bytes; the limit is {VALUE_MAX_BYTES}")
    try:
        return decoder(value)
    except msgspec.ValidationError as error:
        _refuse_other_units(value, str(error))
        reason = _reason(str(error))
        said = "the label is neither fraud nor legitimate" if reason == "label" else str(error)
        raise RejectedError(reason, said) from None
    except _NOT_JSON as error:
        raise RejectedError("not_json", str(error)[:200]) from None


def _refuse_other_units(value: bytes, message: str) -> None:
    """Name the unit of a time that is refused: too large for milliseconds, a fraction, or text.

    Raises:
        RejectedError: the time that the message is about is a plausible one in another unit.
    """
    name = next((name for name in _TIMES if f"`$.{name}`" in message), None)
    if name is None:
        return
    try:
        text = bytes(_decode_object(value).get(name, b""))
    except _NOT_JSON:  # what the message is about stands before it, and is refused all the same
        return
    number = _NUMBER.fullmatch(text.strip(b'"'))
    if number is not None:
        _refuse_other_unit(float(number[0]), name)


def _reason(message: str) -> str:
    if "missing required field" in message:
        return "missing_field"
    if "Expected `object`" in message or "got `" in message:
        return "wrong_type"
    for field, reason in _FIELD_REASONS.items():
        if field in message:
            return reason
    return "wrong_type"


class Score(msgspec.Struct, frozen=True, gc=False):
    """One record of the scores topic.

    ``source`` is ``topic:partition:offset`` of the transaction and is the score's id.
    ``features`` are the model's raw named inputs, null where a value is missing, without what
    every merchant has of which no fraud is known (:meth:`raw` knows it). ``thresholds`` are those
    that decided; where they approved, they are left out. ``state`` is left out, too, but where the
    account's state could not be used (:data:`STATE_REFUSED`). ``merchant_weight`` is how far a
    fraud of the transaction would count at its merchant, where that is less than in full.
    ``out_of_range`` names inputs that are beyond what training saw, where there are any.
    """

    transaction_id: str
    account_id: str
    merchant_id: str
    amount: float
    timestamp: int
    score: float
    decision: str
    model: str
    source: str
    features: dict[str, float | None]
    thresholds: dict[str, float] | None = None
    state: Literal["refused"] | None = None
    merchant_weight: float | None = None
    out_of_range: list[str] | None = None

    def raw(self, names: Sequence[str]) -> list[float]:
        """Values of the raw columns of these names, to compute the score again; NaN is missing."""
        known = {**WITHOUT_KNOWN_FRAUDS, **self.features}
        values = [known[name] for name in names]
        return [math.nan if value is None else value for value in values]


class _ScoreToWrite(msgspec.Struct, frozen=True, gc=False):
    """:class:`Score` with the numbers in JSON already."""

    transaction_id: str
    account_id: str
    merchant_id: str
    amount: float
    timestamp: int
    score: msgspec.Raw
    decision: str
    model: str
    source: str
    features: msgspec.Raw


class Alert(Score, frozen=True, gc=False, kw_only=True):
    """One record of the alerts topic: a score with what led to it.

    ``reasons`` are one to three, the weightiest first; ``created_at`` is epoch milliseconds.
    """

    thresholds: dict[str, float]
    reasons: list[Reason]
    created_at: int


MerchantRecord = msgspec.defstruct(
    "MerchantRecord",
    [(name, float | None, WITHOUT_KNOWN_FRAUDS.get(name)) for name in MERCHANT_FEATURES],
    frozen=True,
    gc=False,
)
"""Of a score's features those of the merchant: what else there is, the account's state gives.
A score leaves out what every merchant without known frauds has."""


class PublishedScore(msgspec.Struct, frozen=True, gc=False):
    """What recovery needs of a score: which transaction it is of, what was said, from what."""

    source: str
    score: float
    decision: str
    thresholds: dict[str, float] | None = None
    features: MerchantRecord | None = None  # type: ignore[valid-type]
    merchant_weight: Share | None = None
    transaction_id: str | None = None

    @property
    def weight(self) -> int:
        """How far a fraud of the transaction counts at its merchant, as it is stored."""
        return WEIGHT_MAX if self.merchant_weight is None else stored_weight(self.merchant_weight)


_RecordedFeatures = msgspec.defstruct(
    "_RecordedFeatures",
    [
        (PAUSE, float | None, None),
        *((name, float | None, WITHOUT_KNOWN_FRAUDS.get(name)) for name in MERCHANT_FEATURES),
    ],
    frozen=True,
    gc=False,
)


class RecordedScore(msgspec.Struct, frozen=True, gc=False):
    """What whoever computes a score again needs of its record."""

    source: str
    score: float
    decision: str
    model: str = ""
    features: _RecordedFeatures | None = None  # type: ignore[valid-type]

    @property
    def begins(self) -> bool:
        """Whether the account had no state before it, by what the score's writer saw."""
        return self.features is not None and getattr(self.features, PAUSE) == -1.0

    def merchant_raw(self) -> tuple[float, ...] | None:
        """The merchant's features that it was computed from, if it records them all."""
        if self.features is None:
            return None
        found = msgspec.structs.astuple(self.features)[1:]
        return None if None in found else found


class CountedScore(msgspec.Struct, frozen=True, gc=False):
    """What whoever counts merchants' transactions again needs of a score's record."""

    source: str
    merchant_id: str
    timestamp: int
    transaction_id: str = ""
    merchant_weight: Share | None = None


decode_score = msgspec.json.Decoder(Score).decode
decode_alert = msgspec.json.Decoder(Alert).decode
_decode_published = msgspec.json.Decoder(PublishedScore).decode
_decode_recorded = msgspec.json.Decoder(RecordedScore).decode
_decode_counted = msgspec.json.Decoder(CountedScore).decode


def decode_published(value: bytes | None) -> PublishedScore | None:
    """What recovery needs of a score's record; None for what no worker wrote."""
    if value is None:
        return None
    try:
        score = _decode_published(value)
    except _NOT_JSON:
        return None
    return score if score.decision in DECISIONS else None


def decode_counted(value: bytes | None) -> CountedScore | None:
    """What counting it again needs of a score's record; None for what no worker wrote."""
    if value is None:
        return None
    try:
        return _decode_counted(value)
    except _NOT_JSON:
        return None


def decode_recorded(value: bytes | None) -> RecordedScore | None:
    """What computing it again needs of a score's record; None for what no worker wrote."""
    if value is None:
        return None
    try:
        score = _decode_recorded(value)
    except _NOT_JSON:
        return None
    return score if score.decision in DECISIONS else None


class ScoreEncoder:
    """Encodes the scores of a micro-batch.

    Args:
        feature_names: of the columns of the raw inputs.
        model: the checkpoint's digest.
    """

    def __init__(self, feature_names: Sequence[str], model: str) -> None:
        self._model = model
        self._template = _template(feature_names)
        # Of a merchant without known frauds a score leaves out what they all have.
        left_out = WITHOUT_KNOWN_FRAUDS if KNOWN_FRAUDS in feature_names else {}
        self._known_frauds = feature_names.index(KNOWN_FRAUDS) if left_out else None
        short = [name for name in feature_names if name not in left_out]
        self._short_template = _template(short)
        self._short_columns = [0, *(1 + feature_names.index(name) for name in short)]

    def encode(
        self,
        transactions: Sequence[Transaction],
        timestamps_ms: Sequence[int],
        sources: Sequence[str],
        scores: NDArray[np.float32],
        decisions: Sequence[str],
        raw: NDArray[np.float32],
    ) -> list[bytes]:
        """JSON of n scores.

        Args:
            transactions, timestamps_ms, sources, decisions: n of each.
            scores: float32[n].
            raw: float32[n, features], the raw inputs.
        """
        if not transactions:
            return []
        raw_json = msgspec.Raw
        model = self._model
        values = []
        for transaction, timestamp, source, decision, (score, features) in zip(
            transactions,
            timestamps_ms,
            sources,
            decisions,
            self._numbers(np.column_stack((scores, raw))),
            strict=True,
        ):
            values.append(
                _encode(
                    _ScoreToWrite(
                        transaction.transaction_id,
                        transaction.account_id,
                        transaction.merchant_id,
                        transaction.amount,
                        timestamp,
                        raw_json(score),
                        decision,
                        model,
                        source,
                        raw_json(features),
                    )
                )
            )
        return values

    def _numbers(self, table: NDArray[np.float32]) -> list[tuple[bytes, bytes]]:
        """JSON of each row's score and of its features."""
        if self._known_frauds is None:
            return _numbers(table, self._template)
        short = np.ascontiguousarray(table[:, self._short_columns])
        numbers = _numbers(short, self._short_template)
        rated = np.flatnonzero(table[:, 1 + self._known_frauds])
        if len(rated):
            full = _numbers(table[rated], self._template)
            for row, text in zip(rated.tolist(), full, strict=True):
                numbers[row] = text
        return numbers


def with_thresholds(score: bytes, thresholds: Thresholds) -> bytes:
    """JSON of a score that raises an alert: it says what decided, whenever that is asked."""
    more = _encode({"thresholds": {"review": thresholds.review, "decline": thresholds.decline}})
    return score[:-1] + b"," + more[1:]


def with_refused_state(score: bytes) -> bytes:
    """JSON of a score that was computed as if the account had no state, for it was refused."""
    return score[:-1] + b"," + _encode({"state": STATE_REFUSED})[1:]


def with_merchant_weight(score: bytes, weight: int) -> bytes:
    """JSON of a score of a transaction that its merchant does not fully explain.

    Args:
        weight: as it is stored.
    """
    share = round(weight / WEIGHT_MAX, WEIGHT_DIGITS)
    return score[:-1] + b"," + _encode({"merchant_weight": share})[1:]


def with_out_of_range(score: bytes, names: Sequence[str]) -> bytes:
    """JSON of a score with inputs that are beyond what training saw."""
    return score[:-1] + b"," + _encode({"out_of_range": names})[1:]


def stored_weight(share: float) -> int:
    """A merchant weight from 0 to 1 as the whole number that is stored."""
    return round(share * WEIGHT_MAX)


def _template(names: Sequence[str]) -> bytes:
    """A JSON object with a place for the number of each name."""
    fields = [_encode(name).replace(b"%", b"%%") + b":%b" for name in names]
    return b"{" + b",".join(fields) + b"}"


def _numbers(table: NDArray[np.float32], template: bytes) -> list[tuple[bytes, bytes]]:
    """JSON of each row's first number, and of the others by the template."""
    text = orjson.dumps(table, option=orjson.OPT_SERIALIZE_NUMPY)  # [[score,input,...],...]
    numbers = []
    for row in text[2:-2].split(b"],["):
        score, *features = row.split(b",")
        numbers.append((score, template % tuple(features)))
    return numbers


def encode_alert(score: bytes, reasons: Sequence[Reason], created_at: int) -> bytes:
    """JSON of an alert: the record of its score, thresholds in it, with more at its end."""
    more = _encode({"reasons": reasons, "created_at": created_at})
    return score[:-1] + b"," + more[1:]


def encode_transaction(transaction: Transaction) -> bytes:
    """JSON of a transaction, as producers write it."""
    return _encode(transaction)


def encode_label(label: Label) -> bytes:
    """JSON of a label, as producers write it."""
    return _encode(label)
