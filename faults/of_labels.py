"""A storm of labels: of unknown merchants, again and again, contradicting each other, and none."""

from __future__ import annotations

import numpy as np

from faults.fault import Fault
from faults.load import PATIENCE_SECONDS, START_DATE
from faults.rig import Rig
from faults.watch import until_true
from pipeline.feed import Feed
from pipeline.label_feed import encode_labels
from pipeline.merchant_profile import Profile, transaction_hash
from pipeline.merchant_store import RedisMerchantStore
from pipeline.score_log import KafkaScoreLog

LABELS = 200_000
PIECE_LABELS = 2_000
MERCHANTS = 400
"""Unknown ones: no transaction names them."""

TRANSACTIONS_OF_MERCHANT = 5
"""That are labelled again and again, as fraud or as genuine."""

NO_LABEL_SHARE = 0.05
BOOKED_LIMIT_SECONDS = 240.0

_WHEN_MS = int(np.datetime64(START_DATE, "ms").astype(np.int64)) + 10 * 86_400_000


class LabelStorm(Fault):
    """The last label of a transaction wins, and scores go on as ever."""

    name = "label-storm"
    what = "200,000 labels of unknown merchants, repeated, contradicting, 5 % of them none"

    def __init__(self) -> None:
        self._truth: dict[tuple[str, str], bool] = {}

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        self._truth.clear()
        rng = np.random.default_rng(rig.random.getrandbits(32))
        pieces = range(max(1, round(rig.seconds(LABELS / PIECE_LABELS))))
        async with Feed(rig.settings, "labels", timeout_seconds=PATIENCE_SECONDS) as feed:
            for piece in pieces:
                rig.fraction = piece / len(pieces)
                await feed.send(*self._labels(rng))
                rig.load.raise_failure()
        mark = await rig.mark()
        await self._until_booked(rig)
        await rig.recover(mark)

    def _labels(self, rng: np.random.Generator) -> tuple[list[bytes], list[bytes]]:
        """Keys and values; the truth of each transaction is its last label."""
        merchants = [f"U{n:06d}" for n in rng.integers(0, MERCHANTS, PIECE_LABELS).tolist()]
        which = rng.integers(0, TRANSACTIONS_OF_MERCHANT, PIECE_LABELS).tolist()
        transactions = [f"{m}-{n}" for m, n in zip(merchants, which, strict=True)]
        is_fraud = rng.random(PIECE_LABELS) < 0.5
        when = np.full(PIECE_LABELS, _WHEN_MS)
        block = encode_labels(transactions, merchants, merchants, is_fraud, when, when, "storm")
        values = list(block.values)
        for i in np.flatnonzero(rng.random(PIECE_LABELS) < NO_LABEL_SHARE).tolist():
            values[i] = values[i][1:]
            transactions[i] = ""
        for merchant, transaction, fraud in zip(
            merchants, transactions, is_fraud.tolist(), strict=True
        ):
            if transaction:
                self._truth[merchant, transaction] = fraud
        return list(block.keys), values

    async def _until_booked(self, rig: Rig) -> None:
        topic, partitions = rig.settings.topic("labels"), list(range(rig.settings.partitions))
        store = RedisMerchantStore.from_settings(rig.settings)
        log = KafkaScoreLog(rig.settings)
        await log.start()
        try:
            ends = await log.ends(topic, partitions)

            async def are_booked() -> bool:
                booked = {partition: await store.booked_to(partition) for partition in ends}
                return booked == ends

            await until_true(are_booked, "the labels to be booked", BOOKED_LIMIT_SECONDS)
        finally:
            await log.stop()
            await store.close()

    async def check(self, rig: Rig) -> list[str]:
        """See :class:`Fault`."""
        merchants = sorted({merchant for merchant, _ in self._truth})
        store = RedisMerchantStore.from_settings(rig.settings)
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
