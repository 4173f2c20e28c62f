"""Labels of unknown merchants, again and again, contradicting each other, and none: many of them,
or while Redis loses some.
"""

from __future__ import annotations

import asyncio

import numpy as np

from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.replay.labels import encode_labels
from pipeline.replay.producer import Feed
from pipeline.storage.merchant_profile import Profile, transaction_hash
from pipeline.storage.merchant_store import RedisMerchantStore
from tests.faults.fault import Fault
from tests.faults.harness import Rig
from tests.faults.monitor import until_true
from tests.faults.redis import RedisClusterFailover
from tests.faults.workload import PATIENCE_SECONDS, START_DATE

LABELS = 200_000
PIECE_LABELS = 2_000
MERCHANTS = 400
"""Unknown ones: no transaction names them."""

TRANSACTIONS_OF_MERCHANT = 5
"""That are labelled again and again, as fraud or as legitimate."""

TRANSACTIONS_LABELLED_ONCE = 100_000
"""Of a merchant: so many that hardly any is labelled again, which would make up for a loss."""

PIECES_PER_SECOND = 10
LABELS_PER_SECOND = 500

NO_LABEL_SHARE = 0.05
BOOKED_LIMIT_SECONDS = 240.0

_WHEN_MS = int(np.datetime64(START_DATE, "ms").astype(np.int64)) + 10 * 86_400_000


class Storm:
    """Labels that are sent, and what must become of them.

    Args:
        piece: how many are sent together.
        transactions: of each merchant that are labelled.
    """

    def __init__(self, rig: Rig, piece: int, transactions: int) -> None:
        self._rig = rig
        self._count = piece
        self._transactions = transactions
        self._truth: dict[tuple[str, str], bool] = {}
        self._rng = np.random.default_rng(rig.random.getrandbits(32))

    async def send(self, feed: Feed) -> None:
        """Send a piece."""
        await feed.send(*self._piece())
        self._rig.load.raise_failure()

    def _piece(self) -> tuple[list[bytes], list[bytes]]:
        """Keys and values; the truth of each transaction is its last label."""
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

    async def until_booked(self) -> None:
        """Return once the store says of all labels that they are booked."""
        settings = self._rig.settings
        topic, partitions = settings.topic("labels"), list(range(settings.topic_partitions))
        store = RedisMerchantStore.from_settings(settings)
        log = KafkaScoreLog(settings)
        await log.start()
        try:
            ends = await log.ends(topic, partitions)

            async def are_booked() -> bool:
                booked = {partition: await store.recorded_to(partition) for partition in ends}
                return booked == ends

            await until_true(are_booked, "the labels to be booked", BOOKED_LIMIT_SECONDS)
        finally:
            await log.stop()
            await store.close()

    async def check(self) -> list[str]:
        """What is wrong with the merchants' profiles."""
        merchants = sorted({merchant for merchant, _ in self._truth})
        store = RedisMerchantStore.from_settings(self._rig.settings)
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
        return [f"{wrong:,} merchants' profiles hold other frauds than labelled"] if wrong else []


class LabelStorm(Fault):
    """The last label of a transaction wins, and scores go on as ever."""

    name = "label-storm"
    what = "200,000 labels of unknown merchants, repeated, contradicting, 5 % of them none"
    _storm: Storm

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        self._storm = Storm(rig, PIECE_LABELS, TRANSACTIONS_OF_MERCHANT)
        pieces = range(max(1, round(rig.seconds(LABELS / PIECE_LABELS))))
        async with Feed(rig.settings, "labels", timeout_seconds=PATIENCE_SECONDS) as feed:
            for piece in pieces:
                rig.fraction = piece / len(pieces)
                await self._storm.send(feed)
        mark = await rig.mark()
        await self._storm.until_booked()
        await rig.recover(mark)

    async def check(self, rig: Rig) -> list[str]:
        """See :class:`Fault`."""
        return await self._storm.check()


class LabelsLost(RedisClusterFailover):
    """Some merchants' labels are gone with the primary that had them, others' are not."""

    name = "labels-lost"
    what = "such elections while 500 labels a second come, of which some are lost with the primary"
    _storm: Storm

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        self._storm = Storm(rig, LABELS_PER_SECOND // PIECES_PER_SECOND, TRANSACTIONS_LABELLED_ONCE)
        is_over = asyncio.Event()
        sending = asyncio.create_task(self._send(rig, is_over))
        try:
            await super().disturb(rig)
        finally:
            is_over.set()
            await sending
        await self._storm.until_booked()

    async def _send(self, rig: Rig, is_over: asyncio.Event) -> None:
        async with Feed(rig.settings, "labels", timeout_seconds=PATIENCE_SECONDS) as feed:
            while not is_over.is_set():
                await self._storm.send(feed)
                await asyncio.sleep(1 / PIECES_PER_SECOND)

    async def check(self, rig: Rig) -> list[str]:
        """See :class:`Fault`."""
        return await self._storm.check()
