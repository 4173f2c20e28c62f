"""Scores that variants of a transaction would get now. Nothing is written.

The computation is the worker's (:class:`pipeline.scoring.scorer.Scorer`), on the account's state in
Redis. Each variant starts from that state, as if the others did not exist.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from model.checkpoint import Checkpoint
from model.features.merchant import MERCHANT_FEATURES, observe_merchants
from model.reasons import Explainer, Reason
from pipeline.gateway.incoming import Incoming
from pipeline.messages.decision import DECISIONS, thresholds_of
from pipeline.messages.extra_fields import ExtraFields
from pipeline.scoring.scorer import MicroBatch, scorer_of
from pipeline.settings import Settings
from pipeline.storage.merchant_profile import decode_profiles
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.state_store import Load, RedisStateStore

AFTER_ALL = 2**62
"""Offset past every state's, so that no state counts as later than the variant."""


class Variant(msgspec.Struct, frozen=True, omit_defaults=True):
    """The score of one variant.

    Attributes:
        merchant_id, amount, timestamp: the variant's; the time in epoch milliseconds.
        score: probability of fraud; None if the computation fails.
        reasons: the reasons of the alert that it would raise.
        out_of_range: inputs beyond what training saw.
    """

    merchant_id: str
    amount: float
    timestamp: int
    score: float | None
    decision: str | None
    reasons: list[Reason] | None = None
    out_of_range: list[str] | None = None


class WhatIf(msgspec.Struct, frozen=True):
    """Answer to a what-if.

    Attributes:
        account_id: the account.
        model: digest of the checkpoint.
        transactions_seen: transactions that the account's state contains; 0: it has no state.
        variants: in the order of the request.
    """

    account_id: str
    model: str
    transactions_seen: int
    variants: list[Variant]


class WhatIfService:
    """Computation of what-ifs.

    Args:
        settings: thresholds and the states' time to live.
        checkpoint: the workers'.
        states, merchants: the workers' stores; they are only read.
        extra_fields: the checkpoint's.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        states: RedisStateStore,
        merchants: RedisMerchantStore,
        extra_fields: ExtraFields,
    ) -> None:
        self._checkpoint = checkpoint
        self._scorer = scorer_of(settings, checkpoint)
        self._explainer = Explainer(checkpoint)
        self._thresholds = thresholds_of(settings, checkpoint.header.thresholds)
        self._states = states
        self._merchants = merchants
        self._extra_fields = extra_fields
        self._names = np.array(checkpoint.header.features.names)

    async def score(self, variants: Sequence[Incoming], now_ms: int) -> WhatIf:
        """Score variants of one account.

        Args:
            now_ms: the time that counts as the records', epoch milliseconds.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        first = variants[0]
        account_id = first.transaction.account_id
        (loaded,) = await self._states.load([Load(first.partition, [account_id])])
        merchant_raw = await self._merchant_raw(variants)
        n = len(variants)
        batch = MicroBatch(
            row=np.arange(n),
            amount=np.array([v.transaction.amount for v in variants], np.float64),
            timestamp_ms=np.array([v.timestamp_ms for v in variants], np.int64),
            record_ms=np.full(n, now_ms, np.int64),
            offset=np.full(n, AFTER_ALL, np.int64),
            # A hash that no state has: a variant is no duplicate of what was scored.
            id_hash=np.full(n, secrets.randbits(64) | 1, np.uint64),
            merchant_raw=merchant_raw,
            fields=self._extra_fields.columns([v.transaction for v in variants]),
            explain_from=np.full(n, self._thresholds.review, np.float32),
        )
        before, _, _ = self._scorer.codec.decode([loaded.states[0]])
        _, scores, _, _ = self._scorer.score([loaded.states[0]] * n, batch)
        found = [
            self._variant(one, float(scores.score[i]) if i not in scores.failed else None)
            for i, one in enumerate(variants)
        ]
        explained = [i for i in scores.before if i not in scores.failed]
        if explained:
            hidden = np.array([scores.before[i] for i in explained])
            for i, reasons in zip(
                explained, self._explainer.explain(scores.raw[explained], hidden), strict=True
            ):
                found[i] = msgspec.structs.replace(found[i], reasons=reasons)
        if scores.outside is not None:
            for i in np.flatnonzero(scores.outside.any(axis=1)).tolist():
                names = self._names[scores.outside[i]].tolist()
                found[i] = msgspec.structs.replace(found[i], out_of_range=names)
        return WhatIf(account_id, self._checkpoint.digest, int(before.history.count[0]), found)

    def _variant(self, one: Incoming, score: float | None) -> Variant:
        decision = None
        if score is not None:
            (choice,) = self._thresholds.decide(np.array([score], np.float32)).tolist()
            decision = DECISIONS[choice]
            score = float(str(np.float32(score)))  # the shortest decimal, as in a score's record
        transaction = one.transaction
        return Variant(transaction.merchant_id, transaction.amount, one.sent_ms, score, decision)

    async def _merchant_raw(self, variants: Sequence[Incoming]) -> np.ndarray[Any, Any]:
        """Load the merchants' features, float32[n, M]; zeros if the checkpoint uses none."""
        features = self._checkpoint.header.features
        if not features.uses_merchants:
            return np.zeros((len(variants), len(MERCHANT_FEATURES)), np.float32)
        place_of: dict[str, int] = {}
        place = [place_of.setdefault(v.transaction.merchant_id, len(place_of)) for v in variants]
        profiles, _ = decode_profiles(await self._merchants.load(list(place_of)))
        times = np.array([v.sent_ms for v in variants], np.int64)
        return observe_merchants(profiles, np.array(place, np.intp), times, features.label_delay_ms)
