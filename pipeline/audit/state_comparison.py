"""Account states in Redis against the same states computed from the log: pure comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from model.features.account import HISTORY_COLUMNS
from pipeline.storage.account_state import AccountStates, StateCodec

_BOOKKEEPING = ("last_record_ms", "recent_ids")


class Verdict(Enum):
    """What a comparison of one account's states says; the value is for a person."""

    RIGHT = "as the log says"
    NONE = "no state, and none is due"
    EXPIRED = "silent for so long that Redis let it go"
    MISSING = "no state in Redis"
    DAMAGED = "of another format or damaged"
    WITHOUT_LOG = "a state without transactions in the log"
    EARLIER = "began before the log does"
    MOVED = "began in another partition, before `recur state rekey`"
    UNKNOWN = "a score is missing, and with it what was known of the merchant"
    ANEW = "began at another offset"
    OTHER_END = "its last transaction is another"
    BOOKKEEPING = "aggregates or ids differ"
    HIDDEN = "the hidden differs"


UNVERIFIABLE = frozenset({Verdict.EARLIER, Verdict.MOVED, Verdict.UNKNOWN})
FINE = frozenset({Verdict.RIGHT, Verdict.NONE, Verdict.EXPIRED})


@dataclass(frozen=True)
class StateComparison:
    """The comparison of n accounts.

    Attributes:
        verdicts: n of them.
        hidden: float32[n], largest difference of a hidden; NaN where it cannot be compared.
        began_at: int64[n], first offset of the state in Redis; -1 where there is none.
    """

    verdicts: Sequence[Verdict]
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
        computed: from the log; None or an empty state (count 0) for an account without one.
        found: in Redis.
        next_offset: the watermark; a state that lies past it counts as absent.
        log_begin: a state that began before this offset cannot be computed.
        lacks_features: bool[n], a computed state lacks what was known of a merchant.
        expired_before_ms: Redis lets a state go whose last record is older, epoch milliseconds.
        tolerance: largest difference of a hidden that is none.
    """
    ours, due, _ = codec.decode(computed)
    theirs, sound, _ = codec.decode(found)
    there = np.array([value is not None for value in found], bool)
    there &= ~(sound & (theirs.last_offset >= next_offset))
    hidden = np.abs(ours.hidden.astype(np.float32) - theirs.hidden.astype(np.float32))
    hidden = hidden.reshape(len(hidden), -1).max(axis=1, initial=0.0)
    same_begin = ours.first_offset == theirs.first_offset
    same_end = ours.last_offset == theirs.last_offset
    same_books = _same_bookkeeping(ours, theirs)
    # A state that is too old to be kept was saved when its record was at least that old.
    gone = ours.last_record_ms < expired_before_ms
    began_early = theirs.first_offset < log_begin
    # Of what applies to an account the first one is said.
    rules: list[tuple[Verdict, NDArray[np.bool_]]] = [
        (Verdict.NONE, ~due & ~there),
        (Verdict.EXPIRED, ~there & gone),
        (Verdict.MISSING, ~there),
        (Verdict.DAMAGED, ~sound),
        (Verdict.MOVED, theirs.first_offset < 0),
        (Verdict.EARLIER, began_early),
        (Verdict.WITHOUT_LOG, ~due),
        (Verdict.UNKNOWN, lacks_features),
        (Verdict.ANEW, ~same_begin),
        (Verdict.OTHER_END, ~same_end),
        (Verdict.BOOKKEEPING, ~same_books),
        (Verdict.HIDDEN, ~(hidden <= tolerance)),
    ]
    chosen = np.select([rule for _, rule in rules], list(range(len(rules))), len(rules))
    names = [*(verdict for verdict, _ in rules), Verdict.RIGHT]
    verdicts = [names[i] for i in chosen.tolist()]
    comparable = due & sound & ~began_early & ~lacks_features
    return StateComparison(
        verdicts,
        np.where(comparable, hidden, np.nan).astype(np.float32),
        np.where(sound, theirs.first_offset, -1),
    )


def _same_bookkeeping(ours: AccountStates, theirs: AccountStates) -> NDArray[np.bool_]:
    """bool[n]: everything but the hidden and its offsets is the same, to the bit."""
    same = np.ones(len(ours), bool)
    columns = [(getattr(ours, name), getattr(theirs, name)) for name in _BOOKKEEPING]
    columns += [
        (getattr(ours.history, name), getattr(theirs.history, name)) for name in HISTORY_COLUMNS
    ]
    for mine, other in columns:
        same &= (mine == other).reshape(len(same), -1).all(axis=1)
    return same
