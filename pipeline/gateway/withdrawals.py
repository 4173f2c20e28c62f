"""Claims of unknown fate: Redis did not answer, so they may stand, and nothing was produced.

Such a claim would hold up its transaction until it is old enough to be taken over. So the gateway
deletes it as soon as Redis answers again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.messages.replies import StoredAnswer
from pipeline.storage.answer_store import AnswerStore
from pipeline.storage.client import StoreUnavailableError

WITHDRAWALS_MAX = 10_000
"""Most claims that wait for Redis; further ones are taken over when they are old."""

AT_ONCE_MAX = 500
"""Most claims in one call of Redis."""

RETRY_SECONDS = 0.2
"""Pause between two calls while Redis is away."""

Claim = tuple[int, str, StoredAnswer]
"""Partition, transaction id, and the claim."""


class Withdrawals:
    """Deletions of claims that this gateway does not stand by.

    Args:
        answers: the answer keys.
        seconds: age from which others take a claim over, so that it needs no deletion.
        metrics: counts the claims that are left.
    """

    def __init__(self, answers: AnswerStore, seconds: float, metrics: GatewayMetrics) -> None:
        self._answers = answers
        self._seconds = seconds
        self._metrics = metrics
        self._waiting: deque[tuple[float, Claim]] = deque()
        self._task: asyncio.Task[None] | None = None

    def add(self, claims: Sequence[Claim]) -> None:
        """Delete claims in the background, each only if it still stands as it is."""
        now = time.monotonic()
        for claim in claims:
            if len(self._waiting) < WITHDRAWALS_MAX:
                self._waiting.append((now + self._seconds, claim))
            else:
                self._metrics.claims_left.inc()
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give up the claims that still wait."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._waiting:
            if self._waiting[0][0] < time.monotonic():
                self._waiting.popleft()
                self._metrics.claims_left.inc()
                continue
            some = [claim for _, claim in list(self._waiting)[:AT_ONCE_MAX]]
            try:
                await self._answers.withdraw(some)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            for _ in some:
                self._waiting.popleft()
