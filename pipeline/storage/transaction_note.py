"""Notes of transactions for their labels, as bytes.

    decision u8, merchant weight u8, whether a label gave that weight u8        3 bytes
    after the first label: time of the newest label, epoch milliseconds         6 bytes more

All numbers are big-endian. A decision is its first letter, or 0 if only labels are known. The
scripts of :mod:`pipeline.storage.merchant_store` do the same as the methods here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from model.features.merchant import WEIGHT_MAX
from model.units import DAY_MS
from pipeline.messages.decision import DECISIONS
from pipeline.storage.merchant_profile import FIXED_BYTES, FRAUD_BYTES, PROFILE_FORMAT

NOTE_EXPIRY_MS = 60 * DAY_MS
"""Time to live of a note after the transaction or its last label: 60 days."""

UNKNOWN = "unknown"
"""Decision on a transaction whose note expired."""

STALE = "stale"
"""Result of a label that is older than one recorded before it."""

NOTE_BYTES = 3
LABELLED_NOTE_BYTES = 9

NOTE_CONSTANTS = {
    "LABELLED_NOTE_BYTES": LABELLED_NOTE_BYTES,
    "FIXED_BYTES": FIXED_BYTES,
    "PROFILE_FORMAT": PROFILE_FORMAT,
    "FRAUD_BYTES": FRAUD_BYTES,
}
"""Constants of the scripts that write notes."""

_SCORED = struct.Struct(">QBBB")
_DECISION_OF = {decision[0].encode()[0]: decision for decision in DECISIONS}
_NO_LABEL = -1


@dataclass(frozen=True)
class TransactionNote:
    """A note of a transaction.

    Attributes:
        decision: decision on it; None if no worker wrote one: no alert and full weight.
        weight: merchant weight of the transaction if it is a fraud, up to
            :data:`model.features.merchant.WEIGHT_MAX`.
        has_label_weight: a label gave the weight, so a worker's weight does not count.
        labelled_ms: time of its newest label, epoch milliseconds; -1 without labels.
    """

    decision: str | None = None
    weight: int = WEIGHT_MAX
    has_label_weight: bool = False
    labelled_ms: int = _NO_LABEL

    def with_score(self, decision: str, weight: int) -> TransactionNote:
        """Return the note after a worker scored the transaction, for the first time or again."""
        if self.has_label_weight:
            weight = self.weight
        return replace(self, decision=decision, weight=weight)

    def with_label(self, labelled_ms: int, weight: int | None) -> TransactionNote | None:
        """Return the note after a label, or None if the label is older than an earlier one.

        Args:
            weight: the label's own weight, or None.
        """
        if labelled_ms < self.labelled_ms:
            return None
        if weight is None:
            return replace(self, labelled_ms=labelled_ms)
        return replace(self, labelled_ms=labelled_ms, weight=weight, has_label_weight=True)

    def to_bytes(self) -> bytes:
        """Return the value that Redis holds."""
        letter = 0 if self.decision is None else self.decision[0].encode()[0]
        head = struct.pack(">BBB", letter, self.weight, self.has_label_weight)
        if self.labelled_ms == _NO_LABEL:
            return head
        return head + self.labelled_ms.to_bytes(LABELLED_NOTE_BYTES - NOTE_BYTES, "big")

    @classmethod
    def from_bytes(cls, value: bytes | None) -> TransactionNote:
        """Read what :meth:`to_bytes` wrote; a value of another size counts as an empty note."""
        if value is None or len(value) not in (NOTE_BYTES, LABELLED_NOTE_BYTES):
            return cls()
        labelled_ms = _NO_LABEL
        if len(value) == LABELLED_NOTE_BYTES:
            labelled_ms = int.from_bytes(value[NOTE_BYTES:], "big")
        return cls(_DECISION_OF.get(value[0]), value[1], bool(value[2]), labelled_ms)


@dataclass(frozen=True)
class ScoredNote:
    """A worker's note of a transaction that it scored.

    Attributes:
        decision: decision on the transaction.
        weight: merchant weight of the transaction if it is a fraud.
    """

    merchant_id: str
    transaction_hash: int
    decision: str
    weight: int = WEIGHT_MAX

    def to_bytes(self) -> bytes:
        """Return the transaction's hash and its note without a label, 11 bytes."""
        return _SCORED.pack(self.transaction_hash, ord(self.decision[0]), self.weight, 0)


def decision_of(note: TransactionNote, *, is_late: bool) -> str:
    """Return the decision on the transaction of a label.

    Args:
        is_late: the label came after the time to live of a note.
    """
    if note.decision is not None:
        return note.decision
    return UNKNOWN if is_late else DECISIONS[0]
