"""A scorer whose states are chains of hashes: any other past gives another state and score.

A network forgets and rounds, so its scores may hide a transaction that was applied twice or left
out. Here an account's hidden state is a hash of three things: its previous hidden state, the
transaction and the merchant's features. It is the same to the last bit in every micro-batch, and
costs a microsecond. The real scorer does the rest: rounds, duplicates, expiry, bisection, and the
state's bookkeeping and bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from model.checkpoint import Checkpoint, CheckpointThresholds
from model.features.merchant import WEIGHT_MAX
from model.features.spec import INPUTS
from model.reasons import Reason
from pipeline.scoring.scorer import ACCOUNT_END, MicroBatch, Scorer, note_applied
from pipeline.storage.account_state import AccountStates
from tests.fakes.memory_workers import small_checkpoint

POISON = 666.0
"""Amount that makes the computation fail."""

NO_HIDDEN = bytes(8)
"""Hidden state of an account without transactions."""

_TRANSACTION = struct.Struct("<qd")

_FINITE = 0xBFFF_BFFF_BFFF_BFFF
"""Mask that clears the highest exponent bit of four float16 values.

It keeps them under 2, like a network's. Larger ones are refused when a computation fails."""


def chained(before: bytes, offset: int, amount: float, merchant: bytes) -> bytes:
    """Return the hidden state after a transaction, 8 bytes.

    Args:
        merchant: the merchant's features, as float32.
    """
    bits = xxh3_64_intdigest(before + _TRANSACTION.pack(offset, amount) + merchant)
    return (bits & _FINITE).to_bytes(8, "little")


def score_of(hidden: bytes) -> float:
    """Compute a float32 score in [0, 1) from the hidden state."""
    return int.from_bytes(hidden[:3], "little") / 2**24


def weight_of(amount: float) -> int:
    """Return the merchant weight of a payment; a third of payments have less than the full one."""
    return WEIGHT_MAX if amount < 67 else int(amount)


def chain_checkpoint() -> Checkpoint:
    """Make a checkpoint that uses merchants and raises an alert for two fifths of all scores."""
    checkpoint = small_checkpoint(hidden_size=4, inputs=INPUTS)
    return checkpoint.with_header(thresholds=CheckpointThresholds(review=0.6, decline=0.8))


class ChainScorer(Scorer):
    """Scorer that advances chains of hashes."""

    def _step(
        self, states: AccountStates, batch: MicroBatch
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
        amounts = batch.amount.tolist()
        if POISON in amounts:
            raise FloatingPointError("it fails")
        others = np.concatenate((batch.merchant_raw, batch.fields), axis=1)
        after = list(
            map(
                chained,
                (row.tobytes() for row in states.hidden),
                batch.offset.tolist(),
                amounts,
                (row.tobytes() for row in others),
            )
        )
        note_applied(states, batch)
        states.hidden[:] = np.frombuffer(b"".join(after), np.float16).reshape(states.hidden.shape)
        states.history.count[:] += 1
        raw = np.zeros((len(batch), self._columns), np.float32)
        raw[:, 0] = amounts
        raw[:, ACCOUNT_END:] = others
        score = np.array([score_of(hidden) for hidden in after], np.float32)
        return score, np.array([weight_of(amount) for amount in amounts], np.uint8), raw


class NoReasons:
    """Replacement of :class:`model.reasons.Explainer`, because no check reads reasons."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._reasons = [Reason("history", 1.0)]

    def explain(self, raw: Any, hidden: Sequence[Any]) -> list[list[Reason]]:
        """Return the same reason for each score."""
        return [self._reasons] * len(raw)
