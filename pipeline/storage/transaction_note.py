"""What is remembered of a transaction until its labels come, as bytes.

    decision u8, merchant weight u8, whether a label told that weight u8        3 bytes
    once labels came, when the newest one became known, epoch milliseconds      6 bytes more

All big-endian. A decision is its first letter; 0 where nothing is remembered of the transaction
but its labels. The scripts of :mod:`pipeline.storage.merchant_store` do the same as the methods
here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from model.features.merchant import WEIGHT_MAX
from pipeline.messages.decision import DECISIONS
from pipeline.units import DAY_MS

NOTE_EXPIRY_MS = 60 * DAY_MS
"""A note goes so long after the transaction, or after its last label."""

UNKNOWN = "unknown"
"""The decision on a transaction of which nothing is remembered any more."""

STALE = "stale"
"""What became of a label that is older than one that came before it."""

NOTE_BYTES = 3
LABELLED_NOTE_BYTES = 9

_LETTERS = {decision[0].encode()[0]: decision for decision in DECISIONS}
_NONE_YET = -1


@dataclass(frozen=True)
class TransactionNote:
    """What is remembered of a transaction.

    Attributes:
        decision: on it; None where no alert was raised and its weight is full, as far as is known.
        weight: how far a fraud of it counts at its merchant, up to
            :data:`model.features.merchant.WEIGHT_MAX`.
        is_weight_told: a label told the weight, so a worker's does not count.
        labelled_ms: when its newest label became known, epoch milliseconds; -1 without labels.
    """

    decision: str | None = None
    weight: int = WEIGHT_MAX
    is_weight_told: bool = False
    labelled_ms: int = _NONE_YET

    def scored(self, decision: str, weight: int) -> TransactionNote:
        """The note after a worker has scored the transaction, for the first time or again."""
        if self.is_weight_told:
            weight = self.weight
        return replace(self, decision=decision, weight=weight)

    def labelled(self, labelled_ms: int, weight: int | None) -> TransactionNote | None:
        """The note after a label; None where the label is older than one that came before it.

        Args:
            weight: that the label tells, if it does.
        """
        if labelled_ms < self.labelled_ms:
            return None
        if weight is None:
            return replace(self, labelled_ms=labelled_ms)
        return replace(self, labelled_ms=labelled_ms, weight=weight, is_weight_told=True)

    def to_bytes(self) -> bytes:
        """The value that Redis holds."""
        letter = 0 if self.decision is None else self.decision[0].encode()[0]
        head = struct.pack(">BBB", letter, self.weight, self.is_weight_told)
        if self.labelled_ms == _NONE_YET:
            return head
        return head + self.labelled_ms.to_bytes(LABELLED_NOTE_BYTES - NOTE_BYTES, "big")

    @classmethod
    def from_bytes(cls, value: bytes | None) -> TransactionNote:
        """Inverse of :meth:`to_bytes`; nothing is remembered in a value of another size."""
        if value is None or len(value) not in (NOTE_BYTES, LABELLED_NOTE_BYTES):
            return cls()
        labelled_ms = _NONE_YET
        if len(value) == LABELLED_NOTE_BYTES:
            labelled_ms = int.from_bytes(value[NOTE_BYTES:], "big")
        return cls(_LETTERS.get(value[0]), value[1], bool(value[2]), labelled_ms)


def decision_of(note: TransactionNote, *, is_late: bool) -> str:
    """The decision on a transaction whose label comes.

    Args:
        is_late: the label comes so late that a note would have gone.
    """
    if note.decision is not None:
        return note.decision
    return UNKNOWN if is_late else DECISIONS[0]
