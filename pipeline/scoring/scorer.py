"""Rounds → features → GRU: advance account states by a micro-batch and score it.

This is pure computation on columns; the processor does the input and output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.features.account import ACCOUNT_FEATURES, Rows, observe, rounds_of
from model.features.merchant import WEIGHT_MAX
from model.features.spec import FEATURES
from model.stepper import sigmoid
from model.units import DAY_MS
from pipeline.settings import Settings
from pipeline.storage.account_state import RECENT_IDS, AccountStates, StateCodec


class MicroBatch(msgspec.Struct, frozen=True, eq=False):
    """The transactions of a poll as columns, in log order within each partition.

    Attributes:
        row: intp[n], the row of the account in the states.
        amount: float64[n], in the checkpoint's currency.
        timestamp_ms: int64[n], event time for features and state.
        record_ms: int64[n], the record's CreateTime, or the event time without one.
        offset: int64[n], offset in the partition.
        id_hash: uint64[n], hash of the transaction's id and content, see :func:`id_hashes`.
        merchant_raw: float32[n, M], the merchant's raw features; zeros if the checkpoint uses none.
        fields: float32[n, K], raw columns of the checkpoint's extra fields.
        explain_from: float32[n], the lowest score that gets reasons.
    """

    row: NDArray[np.intp]
    amount: NDArray[np.float64]
    timestamp_ms: NDArray[np.int64]
    record_ms: NDArray[np.int64]
    offset: NDArray[np.int64]
    id_hash: NDArray[np.uint64]
    merchant_raw: NDArray[np.float32]
    fields: NDArray[np.float32]
    explain_from: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, transactions: Rows) -> MicroBatch:
        """Select transactions in this order: copies, or views if it is a slice."""
        return MicroBatch(
            self.row[transactions],
            self.amount[transactions],
            self.timestamp_ms[transactions],
            self.record_ms[transactions],
            self.offset[transactions],
            self.id_hash[transactions],
            self.merchant_raw[transactions],
            self.fields[transactions],
            self.explain_from[transactions],
        )


class BatchScores(msgspec.Struct, frozen=True, eq=False):
    """Results of a micro-batch's computation.

    Attributes:
        score: float32[n], probability of fraud.
        raw: float32[n, features], raw inputs.
        duplicate: bool[n], the account already has this id with this content; not applied.
        conflict: bool[n], the account already has this id with another content.
        failed: errors by index of transactions whose computation fails; not applied.
        expired: number of states that were reset because their account was silent too long.
        before: by index of a transaction with reasons: the hidden state before it,
            float16[L, H].
        merchant_weight: uint8[n], merchant weight of the transaction if it is a fraud.
        outside: bool[n, features], raw inputs beyond the training data; None without any.
    """

    score: NDArray[np.float32]
    raw: NDArray[np.float32]
    duplicate: NDArray[np.bool_]
    conflict: NDArray[np.bool_]
    failed: dict[int, str]
    expired: int
    before: dict[int, NDArray[np.float16]]
    merchant_weight: NDArray[np.uint8]
    outside: NDArray[np.bool_] | None


ID_CONFLICT = "the account had this transaction id with another content"
"""Error of a transaction that is rejected because of its id."""

_ID_HALF = np.uint64(0xFFFF_FFFF_0000_0000)
_CONTENT_HALF = np.uint64(0x0000_0000_FFFF_FFFF)


def id_hashes(
    id_hash: NDArray[np.uint64],
    merchant_hash: NDArray[np.uint64],
    amount: NDArray[np.float64],
    sent_ms: NDArray[np.int64],
) -> NDArray[np.uint64]:
    """Hash n transactions for the states: half a hash of the id, half a hash of the content.

    A duplicate agrees in both halves, a conflict in the id only. The content is the merchant,
    the amount and the event time as sent; currency and account are always equal. Among 8 ids,
    equal id halves of different ids occur once in 500 million transactions. Such a transaction
    counts as a conflict and is still scored. A dropped duplicate agrees in all 64 bits.

    Args:
        id_hash, merchant_hash: [n] 64-bit hashes of the two ids.
        amount, sent_ms: [n].

    Returns:
        [n], never 0, which marks an empty place in a state's recent ids.
    """
    content = _mixed(merchant_hash)
    content = _mixed(content ^ (amount + 0.0).view(np.uint64))  # -0.0 is 0.0
    content = _mixed(content ^ sent_ms.astype(np.uint64))
    hashes = (id_hash & _ID_HALF) | (content & _CONTENT_HALF)
    hashes[hashes == 0] = 1
    return hashes


# Arrays without dimensions: NumPy takes twice as long with its scalars.
_SHIFT = np.array(33, np.uint64)
_FACTORS = np.array(0xFF51_AFD7_ED55_8CCD, np.uint64), np.array(0xC4CE_B9FE_1A85_EC53, np.uint64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread each bit over the word, as the finalizer of MurmurHash3 does."""
    words = words ^ (words >> _SHIFT)
    for factor in _FACTORS:
        words *= factor
        words ^= words >> _SHIFT
    return words


ACCOUNT_END = len(ACCOUNT_FEATURES)
"""Number of columns of ``raw`` of the account; those of the merchant follow."""

FEATURES_END = len(FEATURES)
"""Number of columns of ``raw`` before the extra fields, which may be missing (NaN)."""


class ComputationError(ArithmeticError):
    """The computation gave a score that is not a number."""


FAILURES_IN_A_ROW_MAX = 32
"""Consecutive failures above this number are not the transactions' fault."""


class ScorerBrokenError(RuntimeError):
    """The computation fails for everything: a defect, or a broken machine."""


class Scorer:
    """Computation with one checkpoint: it advances states and scores transactions.

    Args:
        checkpoint: network and features.
        ttl_ms: reset an account that was silent for longer, milliseconds of record time.
        reject_conflicts: reject a transaction whose account has its id with another content.
    """

    def __init__(
        self, checkpoint: Checkpoint, ttl_ms: int, *, reject_conflicts: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.codec = StateCodec.of(checkpoint)
        self._ttl_ms = ttl_ms
        self._reject_conflicts = reject_conflicts
        self._stepper = checkpoint.stepper
        self._columns = len(checkpoint.header.features.names)
        self._scale = checkpoint.header.features.scale
        self._failures_in_a_row = 0
        features = checkpoint.header.features
        self._weighs = features.uses_merchants
        used = {i.feature for i in features.inputs}
        self._is_input = np.array([name in used for name in features.names])

    def score(
        self, values: Sequence[bytes | None], batch: MicroBatch
    ) -> tuple[AccountStates, BatchScores, NDArray[np.bool_], int]:
        """Advance the states in ``values`` and score the transactions.

        If the computation fails, the micro-batch is bisected: only the failing transactions are
        left out. States with impossible numbers then count as invalid. Otherwise one account's
        transactions would end one worker after another.

        A state past its transactions counts as absent. It belongs to a watermark that was set
        back, and is computed again.

        Returns:
            the states afterwards, the scores, bool[accounts] of the valid states, and the number
            of invalid values.

        Raises:
            ScorerBrokenError: the computation fails for every transaction.
        """
        states, valid, invalid = self.codec.decode(values)
        is_past = states.last_offset[batch.row] >= batch.offset
        past = np.unique(batch.row[is_past]) if np.count_nonzero(is_past) else None
        if past is not None:
            states.reset(past)
            valid[past] = False
        try:
            scored = self._advance(states, batch)
            self._failures_in_a_row = 0
        except Exception:  # a transaction may cause any error in NumPy
            states, valid, invalid = self.codec.decode(values, check_numbers=True)
            if past is not None:
                states.reset(past)
                valid[past] = False
            scored = self._bisect(states, batch)
        return states, scored, valid, invalid

    def _bisect(self, states: AccountStates, batch: MicroBatch) -> BatchScores:
        """Advance halves in order, down to the single transactions that fail."""
        n = len(batch)
        before = self.codec.encode(states, np.arange(len(states)))
        try:
            scored = self._advance(states, batch)
        except Exception as error:
            self._restore(states, before)
            if n == 1:
                self._failures_in_a_row += 1
                if self._failures_in_a_row > FAILURES_IN_A_ROW_MAX:
                    raise ScorerBrokenError(
                        f"the computation failed for {self._failures_in_a_row} transactions in "
                        f"a row, the last time with {type(error).__name__}"
                    ) from error
                return BatchScores(
                    score=np.zeros(1, np.float32),
                    raw=np.zeros((1, self._columns), np.float32),
                    duplicate=np.zeros(1, bool),
                    conflict=np.zeros(1, bool),
                    failed={0: f"{type(error).__name__}: {error}"[:200]},
                    expired=0,
                    before={},
                    merchant_weight=np.full(1, WEIGHT_MAX, np.uint8),
                    outside=None,
                )
        else:
            self._failures_in_a_row = 0
            return scored
        first = self._bisect(states, batch.take(slice(n // 2)))
        second = self._bisect(states, batch.take(slice(n // 2, n)))
        return BatchScores(
            score=np.concatenate((first.score, second.score)),
            raw=np.concatenate((first.raw, second.raw)),
            duplicate=np.concatenate((first.duplicate, second.duplicate)),
            conflict=np.concatenate((first.conflict, second.conflict)),
            failed=first.failed | {n // 2 + i: error for i, error in second.failed.items()},
            expired=first.expired + second.expired,
            before=first.before | {n // 2 + i: hidden for i, hidden in second.before.items()},
            merchant_weight=np.concatenate((first.merchant_weight, second.merchant_weight)),
            outside=_join_outside(first, second),
        )

    def _restore(self, states: AccountStates, values: Sequence[bytes]) -> None:
        saved, _, _ = self.codec.decode(values)
        states.table[:] = saved.table

    def _advance(self, states: AccountStates, batch: MicroBatch) -> BatchScores:
        """Advance ``states`` in place, round by round."""
        n = len(batch)
        score, weight = np.zeros(n, np.float32), np.full(n, WEIGHT_MAX, np.uint8)
        raw = np.zeros((n, self._columns), np.float32)
        duplicate, conflict = np.zeros(n, bool), np.zeros(n, bool)
        failed: dict[int, str] = {}
        expired = 0
        before: dict[int, NDArray[np.float16]] = {}
        for members, part, taken in _rounds(states, batch):
            same_id = (part.recent_ids ^ taken.id_hash[:, None]) <= _CONTENT_HALF
            if np.count_nonzero(same_id):
                seen, conflicts = _repeated(part, taken)
                duplicate[members[seen]] = True
                conflict[members[conflicts]] = True
                dropped = seen
                if self._reject_conflicts:
                    dropped = seen | conflicts
                    failed |= dict.fromkeys(members[conflicts].tolist(), ID_CONFLICT)
                kept = np.flatnonzero(~dropped)
                if len(kept) == 0:
                    continue
                members, part, taken = members[kept], part.take(kept), taken.take(kept)
            stale = taken.record_ms - part.last_record_ms > self._ttl_ms
            if np.count_nonzero(stale):
                stale &= part.history.count > 0  # the others have no last record
                part.reset(np.flatnonzero(stale))
                expired += int(np.count_nonzero(stale))
            hidden = part.hidden.copy()
            score[members], weight[members], raw[members] = self._step(part, taken)
            explained = score[members] >= taken.explain_from
            if np.count_nonzero(explained):
                before |= zip(members[explained].tolist(), hidden[explained], strict=True)
            if part is not states:
                states.put(taken.row, part)
        outside = self.checkpoint.outside(raw)
        if outside is not None:
            outside &= self._is_input
            outside[duplicate] = False
            outside[list(failed)] = False
            outside = outside if outside.any() else None
        return BatchScores(
            score, raw, duplicate, conflict, failed, expired, before, weight, outside
        )

    def _step(
        self, states: AccountStates, batch: MicroBatch
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
        """Apply one transaction to each of m states, in place.

        Returns:
            scores float32[m], merchant weights uint8[m], raw features float32[m, R].
        """
        n = len(batch)
        raw = np.empty((n, self._columns), np.float32)
        raw[:, ACCOUNT_END:FEATURES_END] = batch.merchant_raw
        raw[:, FEATURES_END:] = batch.fields
        raw[:, :ACCOUNT_END], after = observe(
            states.history, batch.amount, batch.timestamp_ms, self._scale
        )
        inputs = self.checkpoint.encode(raw)  # [m, I]
        logits, hidden = self._stepper.step(inputs, states.hidden)
        score = sigmoid(logits)
        if not (_all_finite(score) and _all_finite(raw[:, :FEATURES_END])):
            raise ComputationError("the score is not a number")
        note_applied(states, batch)
        states.history.put(slice(None), after)
        # Rounding after each step makes the result independent of the micro-batch's end.
        states.hidden[:] = hidden
        if self._weighs:
            return score, self._stepper.merchant_weight(inputs), raw
        return score, np.full(n, WEIGHT_MAX, np.uint8), raw


def _rounds(
    states: AccountStates, batch: MicroBatch
) -> Iterator[tuple[NDArray[np.intp], AccountStates, MicroBatch]]:
    """Yield each round: its transactions, and a copy of their states and of their columns.

    Most small polls hold each account once, in the order of the states. Their one round has the
    states themselves.
    """
    n = len(batch)
    everything = np.arange(n)
    if n == len(states) and np.count_nonzero(batch.row == everything) == n:
        yield everything, states, batch
        return
    for members in rounds_of(batch.row):
        taken = batch.take(members)
        yield members, states.take(taken.row), taken


def _repeated(
    states: AccountStates, batch: MicroBatch
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Find the transactions [m] whose account has their id: with their content, with another."""
    differing = states.recent_ids ^ batch.id_hash[:, None]  # [m, RECENT_IDS]
    same_id = ((differing & _ID_HALF) == 0) & (states.recent_ids != 0)
    seen: NDArray[np.bool_] = (differing == 0).any(axis=1)
    return seen, same_id.any(axis=1) & ~seen


def _all_finite(numbers: NDArray[np.float32]) -> bool:
    return int(np.count_nonzero(np.isfinite(numbers))) == numbers.size


def _join_outside(first: BatchScores, second: BatchScores) -> NDArray[np.bool_] | None:
    """Join the inputs out of range of two halves."""
    if first.outside is None and second.outside is None:
        return None
    parts = [
        np.zeros(part.raw.shape, bool) if part.outside is None else part.outside
        for part in (first, second)
    ]
    return np.concatenate(parts)


def scorer_of(settings: Settings, checkpoint: Checkpoint) -> Scorer:
    """Make the scorer of a worker with these settings."""
    return Scorer(
        checkpoint,
        ttl_ms=int(settings.state_ttl_days * DAY_MS),
        reject_conflicts=settings.id_conflicts == "reject",
    )


def note_applied(states: AccountStates, batch: MicroBatch) -> None:
    """Record in m states which transaction each applies; their history is still the one before."""
    count = states.history.count
    states.recent_ids[np.arange(len(count)), count % RECENT_IDS] = batch.id_hash
    states.last_offset[:] = batch.offset
    np.maximum(states.last_record_ms, batch.record_ms, out=states.last_record_ms)
    np.copyto(states.first_offset, batch.offset, where=count == 0)
