"""Delayed labels of the demo: frauds become known some simulated days later."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from model.simulator.handbook import account_id, merchant_id, transaction_id
from pipeline.replay.labels import encode_labels
from pipeline.replay.producer import Feed
from pipeline.replay.simulated import SimulatedTransactions

SOURCE = "simulator"


class DelayedLabels:
    """Sender of labels that follows simulated time.

    Args:
        feed: feed of the labels topic.
        delay_ms: simulated milliseconds from a transaction to its label.

    Attributes:
        sent: number of labels that were sent.
    """

    def __init__(self, feed: Feed, delay_ms: int) -> None:
        self.sent = 0
        self.delay_ms = delay_ms
        self._feed = feed
        self._waiting: deque[tuple[SimulatedTransactions, NDArray[np.intp]]] = deque()

    def add(self, transactions: SimulatedTransactions) -> None:
        """Add transactions whose frauds get labels; pieces come in order of time."""
        self._waiting.append((transactions, np.flatnonzero(transactions.columns.scenario > 0)))

    async def send_until(self, event_ms: int) -> None:
        """Send the labels that are known at a simulated time."""
        while self._waiting:
            transactions, frauds = self._waiting[0]
            known_ms = transactions.columns.timestamp_ms[frauds] + self.delay_ms
            due = int(np.searchsorted(known_ms, event_ms, side="right"))
            if due:
                await self._send(transactions, frauds[:due], known_ms[:due])
            if due < len(frauds):
                self._waiting[0] = transactions, frauds[due:]
                return
            self._waiting.popleft()

    async def _send(
        self,
        transactions: SimulatedTransactions,
        frauds: NDArray[np.intp],
        known_ms: NDArray[np.int64],
    ) -> None:
        columns = transactions.columns
        block = encode_labels(
            [transaction_id(number) for number in (transactions.first + frauds).tolist()],
            [account_id(account) for account in columns.account[frauds].tolist()],
            [merchant_id(merchant) for merchant in columns.merchant[frauds].tolist()],
            np.ones(len(frauds), np.bool_),
            columns.timestamp_ms[frauds],
            known_ms,
            SOURCE,
        )
        await self._feed.send(block.keys, block.values)
        self.sent += len(frauds)
