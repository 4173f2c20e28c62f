"""Faults of labels: many repeated, contradicting and invalid ones, or losses of Redis."""

from __future__ import annotations

import asyncio

import numpy as np

from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.replay.labels import encode_labels
from pipeline.replay.producer import Feed
from pipeline.storage.merchant_profile import Profile, transaction_hash
from pipeline.storage.merchant_store import RedisMerchantStore
from tests.faults.fault import Fault
from tests.faults.harness import Harness
from tests.faults.monitor import until_true
from tests.faults.redis import RedisClusterFailover
from tests.faults.workload import BROKER_LIMIT_SECONDS, START_DATE

LABELS = 200_000
PIECE_LABELS = 2_000
MERCHANTS = 400
"""Number of merchants that no transaction names."""

TRANSACTIONS_OF_MERCHANT = 5
"""Number of a merchant's transactions that get many contradicting labels."""

TRANSACTIONS_LABELLED_ONCE = 100_000
"""Number of a merchant's transactions in which repeats are rare.

A repeated label would make up for a lost one.
"""

PIECES_PER_SECOND = 10
LABELS_PER_SECOND = 500

NO_LABEL_SHARE = 0.05
RECORDED_LIMIT_SECONDS = 240.0

_WHEN_MS = int(np.datetime64(START_DATE, "ms").astype(np.int64)) + 10 * 86_400_000


class LabelSender:
    """Sender of labels that also checks their effect.

    Args:
        piece: number of labels that are sent together.
        transactions: number of each merchant's transactions that are labelled.
    """

    def __init__(self, harness: Harness, piece: int, transactions: int) -> None:
        self._harness = harness
        self._count = piece
        self._transactions = transactions
        self._truth: dict[tuple[str, str], bool] = {}
        self._rng = np.random.default_rng(harness.random.getrandbits(32))

    async def send(self, feed: Feed) -> None:
        """Send some labels."""
        await feed.send(*self._piece())
        self._harness.workload.raise_failure()

    def _piece(self) -> tuple[list[bytes], list[bytes]]:
        """Make keys and values; the truth of each transaction is its last label."""
        rng = self._rng
        merchants = [f"U{n:06d}" for n in rng.integers(0, MERCHANTS, self._count).tolist()]
        which = rng.integers(0, self._transactions, self._count).tolist()
        transactions = [f"{m}-{n}" for m, n in zip(merchants, which, strict=True)]
        is_fraud = rng.random(self._count) < 0.5
        when = np.full(self._count, _WHEN_MS)
        block = encode_labels(transactions, merchants, merchants, is_fraud, when, when, "storm")
        values = list(block.values)
        for i in np.flatnonzero(rng.random(self._count) < NO_LABEL_SHARE).tolist():
            values[i] = values[i][1:]
            transactions[i] = ""
        for merchant, transaction, fraud in zip(
            merchants, transactions, is_fraud.tolist(), strict=True
        ):
            if transaction:
                self._truth[merchant, transaction] = fraud
        return list(block.keys), values

    async def until_recorded(self) -> None:
        """Wait until the store has recorded all labels."""
        settings = self._harness.settings
        topic, partitions = settings.topic("labels"), list(range(settings.topic_partitions))
        store = RedisMerchantStore.from_settings(settings)
        log = KafkaScoreLog(settings)
        await log.start()
        try:
            ends = await log.ends(topic, partitions)

            async def are_recorded() -> bool:
                recorded = {partition: await store.recorded_to(partition) for partition in ends}
                return recorded == ends

            await until_true(are_recorded, "the labels to be recorded", RECORDED_LIMIT_SECONDS)
        finally:
            await log.stop()
            await store.close()

    async def check(self) -> list[str]:
        """Describe what is wrong with the merchants' profiles."""
        merchants = sorted({merchant for merchant, _ in self._truth})
        store = RedisMerchantStore.from_settings(self._harness.settings)
        try:
            values = await store.load(merchants)
        finally:
            await store.close()
        wrong = 0
        for merchant, value in zip(merchants, values, strict=True):
            known = [] if value is None else Profile.from_bytes(value).frauds
            expected = [
                transaction_hash(transaction)
                for (of, transaction), fraud in self._truth.items()
                if of == merchant and fraud
            ]
            wrong += sorted(fraud.id_hash for fraud in known) != sorted(expected)
        return [f"{wrong:,} merchants' profiles differ from the labels"] if wrong else []


class LabelStorm(Fault):
    """A storm of labels; the last label of a transaction wins, and scoring goes on."""

    name = "label-storm"
    what = "200,000 labels of unknown merchants, repeated and contradicting, 5 % of them invalid"
    _labels: LabelSender

    async def disturb(self, harness: Harness) -> None:
        self._labels = LabelSender(harness, PIECE_LABELS, TRANSACTIONS_OF_MERCHANT)
        pieces = range(max(1, round(harness.seconds(LABELS / PIECE_LABELS))))
        async with Feed(harness.settings, "labels", timeout_seconds=BROKER_LIMIT_SECONDS) as feed:
            for piece in pieces:
                harness.fraction = piece / len(pieces)
                await self._labels.send(feed)
        mark = await harness.mark()
        await self._labels.until_recorded()
        await harness.recover(mark)

    async def check(self, harness: Harness) -> list[str]:
        return await self._labels.check()


class LabelsLost(RedisClusterFailover):
    """Labels that a dead primary of Redis Cluster takes with it."""

    name = "labels-lost"
    what = "Redis Cluster fails over 3 times and loses some of 500 labels a second"
    _labels: LabelSender

    async def disturb(self, harness: Harness) -> None:
        self._labels = LabelSender(
            harness, LABELS_PER_SECOND // PIECES_PER_SECOND, TRANSACTIONS_LABELLED_ONCE
        )
        is_over = asyncio.Event()
        sending = asyncio.create_task(self._send(harness, is_over))
        try:
            await super().disturb(harness)
        finally:
            is_over.set()
            await sending
        await self._labels.until_recorded()

    async def _send(self, harness: Harness, is_over: asyncio.Event) -> None:
        async with Feed(harness.settings, "labels", timeout_seconds=BROKER_LIMIT_SECONDS) as feed:
            while not is_over.is_set():
                await self._labels.send(feed)
                await asyncio.sleep(1 / PIECES_PER_SECOND)

    async def check(self, harness: Harness) -> list[str]:
        return await self._labels.check()
