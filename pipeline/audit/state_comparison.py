"""Comparison of account states in Redis with the same states recomputed from the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from model.features.account import HISTORY_COLUMNS
from pipeline.storage.account_state import AccountStates, StateCodec

_BOOKKEEPING = ("last_record_ms", "recent_ids")


class StateStatus(Enum):
    """Outcome of comparing one account's states; the value is a text for a person."""

    RIGHT = "as the log says"
    NONE = "no state, and none is due"
    EXPIRED = "expired in Redis after a long silence"
    MISSING = "no state in Redis"
    DAMAGED = "of another format or damaged"
    WITHOUT_LOG = "a state without transactions in the log"
    EARLIER = "began before the log does"
    MOVED = "began in another partition, before `recur state repartition`"
    UNKNOWN = "a score is missing, and with it the merchant's features"
    OTHER_BEGIN = "began at another offset"
    OTHER_END = "its last transaction is another"
    BOOKKEEPING = "aggregates or ids differ"
    HIDDEN = "the hidden state differs"


UNVERIFIABLE = frozenset({StateStatus.EARLIER, StateStatus.MOVED, StateStatus.UNKNOWN})
"""The log does not hold all that the state depends on."""

CONSISTENT = frozenset({StateStatus.RIGHT, StateStatus.NONE, StateStatus.EXPIRED})
"""The state does not contradict the log."""


@dataclass(frozen=True)
class StateComparison:
    """Comparison of n accounts' states.

    Attributes:
        statuses: n outcomes.
        hidden: float32[n], largest difference of the hidden states; NaN if not comparable.
        began_at: int64[n], first offset of the state in Redis; -1 without a state.
    """

    statuses: Sequence[StateStatus]
    hidden: NDArray[np.float32]
    began_at: NDArray[np.int64]


def compare_states(
    codec: StateCodec,
    computed: Sequence[bytes | None],
    found: Sequence[bytes | None],
    *,
    next_offset: int,
    log_begin: int,
    lacks_features: NDArray[np.bool_],
    expired_before_ms: int,
    tolerance: float,
) -> StateComparison:
    """Compare n accounts' states at one watermark.

    Args:
        computed: states from the log; None or an empty state (count 0) for an account without.
        found: states in Redis.
        next_offset: the watermark; a state past it counts as absent.
        log_begin: first offset of the log; a state that began before it cannot be computed.
        lacks_features: bool[n], whether a computed state lacks a merchant's features.
        expired_before_ms: states with an older last record may have expired, epoch milliseconds.
        tolerance: hidden states that differ by at most this count as equal.
    """
    expected, is_due, _ = codec.decode(computed)
    stored, sound, _ = codec.decode(found)
    exists = np.array([value is not None for value in found], bool)
    exists &= ~(sound & (stored.last_offset >= next_offset))
    hidden = np.abs(expected.hidden.astype(np.float32) - stored.hidden.astype(np.float32))
    hidden = hidden.reshape(len(hidden), -1).max(axis=1, initial=0.0)
    same_begin = expected.first_offset == stored.first_offset
    same_end = expected.last_offset == stored.last_offset
    same_books = _same_bookkeeping(expected, stored)
    # Redis lets a state expire only after its last record has reached this age.
    gone = expected.last_record_ms < expired_before_ms
    began_early = stored.first_offset < log_begin
    # The first rule that holds for an account decides.
    rules: list[tuple[StateStatus, NDArray[np.bool_]]] = [
        (StateStatus.NONE, ~is_due & ~exists),
        (StateStatus.EXPIRED, ~exists & gone),
        (StateStatus.MISSING, ~exists),
        (StateStatus.DAMAGED, ~sound),
        (StateStatus.MOVED, stored.first_offset < 0),
        (StateStatus.EARLIER, began_early),
        (StateStatus.WITHOUT_LOG, ~is_due),
        (StateStatus.UNKNOWN, lacks_features),
        (StateStatus.OTHER_BEGIN, ~same_begin),
        (StateStatus.OTHER_END, ~same_end),
        (StateStatus.BOOKKEEPING, ~same_books),
        (StateStatus.HIDDEN, ~(hidden <= tolerance)),
    ]
    chosen = np.select([rule for _, rule in rules], list(range(len(rules))), len(rules))
    names = [*(status for status, _ in rules), StateStatus.RIGHT]
    statuses = [names[i] for i in chosen.tolist()]
    comparable = is_due & sound & ~began_early & ~lacks_features
    return StateComparison(
        statuses,
        np.where(comparable, hidden, np.nan).astype(np.float32),
        np.where(sound, stored.first_offset, -1),
    )


def _same_bookkeeping(expected: AccountStates, stored: AccountStates) -> NDArray[np.bool_]:
    """Return bool[n]: whether all but hidden state and offsets is equal, to the bit."""
    same = np.ones(len(expected), bool)
    columns = [(getattr(expected, name), getattr(stored, name)) for name in _BOOKKEEPING]
    columns += [
        (getattr(expected.history, name), getattr(stored.history, name)) for name in HISTORY_COLUMNS
    ]
    for one, other in columns:
        same &= (one == other).reshape(len(same), -1).all(axis=1)
    return same
