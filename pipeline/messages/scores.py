"""Scores and alerts in JSON, the numbers encoded for a whole micro-batch at once.

orjson prints the shortest decimal that is the same float32. So a reader of a score can compute
its decision again exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES, WEIGHT_MAX, WITHOUT_KNOWN_FRAUDS
from model.reasons import Reason
from model.transaction import Transaction
from pipeline.messages.decision import Decision, DecisionThresholds
from pipeline.messages.decoding import NOT_JSON, Share, encode_json

WEIGHT_DIGITS = 3
"""Decimals of a merchant weight in JSON: enough to tell all stored weights apart."""

STATE_INVALID: Literal["invalid"] = "invalid"
"""Mark of a score whose account state was damaged or of another version, and counted as absent."""

SECONDS_SINCE_LAST = "seconds_since_last"
_KNOWN_FRAUDS = "merchant_known_frauds"

OFFSET_MAX_DIGITS = 18

_SHARES = (*(round(weight / WEIGHT_MAX, WEIGHT_DIGITS) for weight in range(WEIGHT_MAX)), None)
"""Merchant weight in JSON by stored weight; a full one is left out."""


class Score(msgspec.Struct, frozen=True, gc=False):
    """A record of the scores topic.

    ``source`` is ``topic:partition:offset`` of the transaction and is the score's id.
    ``features`` are the model's raw inputs by name; null means a missing value. Inputs of a
    merchant without known frauds are left out; :meth:`raw` fills them in.

    The other fields are only there where they say something. ``thresholds`` led to the decision;
    an approval leaves them out. ``state`` is set if the account's state could not be used
    (:data:`STATE_INVALID`). ``merchant_weight`` is how far a fraud of the transaction would count
    at its merchant, if not in full. ``out_of_range`` names inputs beyond the range of training.
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
    state: Literal["invalid", "refused"] | None = None  # refused: of version 0.1
    merchant_weight: float | None = None
    out_of_range: list[str] | None = None

    def raw(self, names: Sequence[str]) -> list[float]:
        """Return the raw inputs of these names to compute the score again; NaN is missing."""
        known = {**WITHOUT_KNOWN_FRAUDS, **self.features}
        values = [known[name] for name in names]
        return [math.nan if value is None else value for value in values]


class _ScoreToWrite(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
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
    thresholds: DecisionThresholds | None = None
    merchant_weight: float | None = None
    out_of_range: Sequence[str] | None = None
    state: str | None = None


class Alert(Score, frozen=True, gc=False, kw_only=True):
    """A record of the alerts topic: a score with the reasons for it.

    ``reasons`` are one to three, in descending order of weight. ``created_at`` is in epoch
    milliseconds.
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
"""The merchant's features in a score; the account's state gives all others.

A score leaves out the values that every merchant without known frauds has."""


class PublishedScore(msgspec.Struct, frozen=True, gc=False):
    """The part of a score that recovery needs: its transaction, its decision and its inputs."""

    source: str
    score: float
    decision: Decision
    thresholds: dict[str, float] | None = None
    features: MerchantRecord | None = None  # type: ignore[valid-type]
    merchant_weight: Share | None = None
    transaction_id: str | None = None

    @property
    def weight(self) -> int:
        """Stored weight of a fraud of the transaction at its merchant."""
        return WEIGHT_MAX if self.merchant_weight is None else stored_weight(self.merchant_weight)


_RecordedFeatures = msgspec.defstruct(
    "_RecordedFeatures",
    [
        (SECONDS_SINCE_LAST, float | None, None),
        *((name, float | None, WITHOUT_KNOWN_FRAUDS.get(name)) for name in MERCHANT_FEATURES),
    ],
    frozen=True,
    gc=False,
)


class RecordedScore(msgspec.Struct, frozen=True, gc=False):
    """The part of a score that is needed to compute it again."""

    source: str
    score: float
    decision: Decision
    model: str = ""
    features: _RecordedFeatures | None = None  # type: ignore[valid-type]

    @property
    def begins(self) -> bool:
        """Whether the worker found no state of the account before the transaction."""
        return self.features is not None and getattr(self.features, SECONDS_SINCE_LAST) == -1.0

    def merchant_raw(self) -> tuple[float, ...] | None:
        """Return the merchant's features of the score, if its record has them all."""
        if self.features is None:
            return None
        found = msgspec.structs.astuple(self.features)[1:]
        return None if None in found else found


class CountedScore(msgspec.Struct, frozen=True, gc=False):
    """The part of a score that is needed to count its merchant's transactions again."""

    source: str
    merchant_id: str
    timestamp: int
    transaction_id: str = ""
    merchant_weight: Share | None = None


decode_score = msgspec.json.Decoder(Score).decode
decode_alert = msgspec.json.Decoder(Alert).decode

ScoreView = TypeVar("ScoreView", PublishedScore, RecordedScore, CountedScore)


def _score_decoder(view: type[ScoreView]) -> Callable[[bytes | None], ScoreView | None]:
    """Make a decoder of one view of a score's record; None for a record no worker wrote."""
    decode_json = msgspec.json.Decoder(view).decode

    def decode(value: bytes | None) -> ScoreView | None:
        if value is None:
            return None
        try:
            return decode_json(value)
        except NOT_JSON:
            return None

    return decode


decode_published = _score_decoder(PublishedScore)
decode_recorded = _score_decoder(RecordedScore)
decode_counted = _score_decoder(CountedScore)


def source_prefix(topic: str, partition: int) -> str:
    """Begin of the ``source`` of each score of a transactions partition."""
    return f"{topic}:{partition}:"


def source_offset(source: str, prefix: str) -> int | None:
    """Read the offset in a score's source; None if it does not begin with the prefix."""
    if not source.startswith(prefix):
        return None
    offset = source[len(prefix) :]
    if not (offset.isascii() and offset.isdigit() and len(offset) <= OFFSET_MAX_DIGITS):
        return None
    return int(offset)


class ScoreEncoder:
    """Encoder of scores: the numbers of a micro-batch at once, then each score once.

    Args:
        feature_names: names of the raw inputs, a column each.
        model: the checkpoint's digest.
    """

    def __init__(self, feature_names: Sequence[str], model: str) -> None:
        self._model = model
        self._template = _template(feature_names)
        # A score leaves out the values that every merchant without known frauds has.
        left_out = WITHOUT_KNOWN_FRAUDS if _KNOWN_FRAUDS in feature_names else {}
        self._known_frauds = feature_names.index(_KNOWN_FRAUDS) if left_out else None
        short = [name for name in feature_names if name not in left_out]
        self._short_template = _template(short)
        self._short_columns = np.array([feature_names.index(name) for name in short], np.intp)

    def numbers(
        self, scores: NDArray[np.float32], raw: NDArray[np.float32]
    ) -> list[tuple[bytes, bytes]]:
        """Encode n scores, and the features of each as an object.

        Args:
            scores: float32[n].
            raw: float32[n, features], the raw inputs.
        """
        if self._known_frauds is None:
            return _numbers(scores, raw, self._template)
        short = raw.take(self._short_columns, axis=1)
        numbers = _numbers(scores, short, self._short_template)
        rated = raw[:, self._known_frauds].nonzero()[0]
        if len(rated):
            full = _numbers(scores[rated], raw[rated], self._template)
            for row, text in zip(rated.tolist(), full, strict=True):
                numbers[row] = text
        return numbers

    def encode(
        self,
        transaction: Transaction,
        timestamp_ms: int,
        source: str,
        numbers: tuple[bytes, bytes],
        decision: str,
        thresholds: DecisionThresholds | None = None,
        weight: int = WEIGHT_MAX,
        out_of_range: Sequence[str] | None = None,
        state: Literal["invalid"] | None = None,
    ) -> bytes:
        """Encode a score as JSON.

        Args:
            numbers: what :meth:`numbers` returns for the transaction.
            thresholds: what led to the decision; None for an approval.
            weight: the stored merchant weight; a full one is left out.
            out_of_range: the names of inputs beyond the range of training.
            state: :data:`STATE_INVALID` if the account's state could not be used.
        """
        score, features = numbers
        return encode_json(
            _ScoreToWrite(
                transaction.transaction_id,
                transaction.account_id,
                transaction.merchant_id,
                transaction.amount,
                timestamp_ms,
                msgspec.Raw(score),
                decision,
                self._model,
                source,
                msgspec.Raw(features),
                thresholds,
                _SHARES[weight],
                out_of_range,
                state,
            )
        )


def with_thresholds(score: bytes, thresholds: DecisionThresholds) -> bytes:
    """Add the thresholds to a score of an older version that raises an alert."""
    return score[:-1] + b"," + encode_json({"thresholds": thresholds})[1:]


def stored_weight(share: float) -> int:
    """Convert a merchant weight from 0 to 1 to the stored whole number."""
    return round(share * WEIGHT_MAX)


def _template(names: Sequence[str]) -> bytes:
    """Make a JSON object with a place for the number of each name."""
    fields = [encode_json(name).replace(b"%", b"%%") + b":%b" for name in names]
    return b"{" + b",".join(fields) + b"}"


def _numbers(
    scores: NDArray[np.float32], inputs: NDArray[np.float32], template: bytes
) -> list[tuple[bytes, bytes]]:
    """Encode n scores, and the inputs [n, names] of each by the template."""
    table = np.empty((len(scores), 1 + inputs.shape[1]), np.float32)
    table[:, 0] = scores
    table[:, 1:] = inputs
    text = orjson.dumps(table, option=orjson.OPT_SERIALIZE_NUMPY)  # [[score,input,...],...]
    numbers = []
    for row in text[2:-2].split(b"],["):
        score, *features = row.split(b",")
        numbers.append((score, template % tuple(features)))
    return numbers


def encode_alert(score: bytes, reasons: Sequence[Reason], created_at: int) -> bytes:
    """Encode an alert: extend the record of its score, which has the thresholds already."""
    more = encode_json({"reasons": reasons, "created_at": created_at})
    return score[:-1] + b"," + more[1:]
