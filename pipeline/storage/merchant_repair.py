"""Corrections of merchants' profiles in Redis, beside running workers.

Counts are corrected by addition and subtraction, so that the workers' own counting stays. A
script replaces known frauds. It first compares the slot's labels watermarks with the expected
ones. If they differ, a worker recorded labels in between, and the script writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from model.features.merchant import BUCKETS
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.keys import MerchantKeys
from pipeline.storage.merchant_profile import (
    EMPTY_VALUE,
    FIXED_BYTES,
    FRAUD_BYTES,
    HEADER_BYTES,
    PROFILE_FORMAT,
    Fraud,
    encode_frauds,
)
from pipeline.storage.merchant_store import EXPIRY_MS, RedisMerchantStore
from pipeline.storage.script import load_script

_REPLACE_FRAUDS = load_script(
    "replace_frauds",
    FIXED_BYTES=FIXED_BYTES,
    PROFILE_FORMAT=PROFILE_FORMAT,
    FRAUD_BYTES=FRAUD_BYTES,
)
_SUBTRACT_COUNTS = load_script(
    "subtract_counts", HEADER_BYTES=HEADER_BYTES, PROFILE_FORMAT=PROFILE_FORMAT, BUCKETS=BUCKETS
)


class MerchantRepair:
    """Corrections of the profiles in one Redis or Redis Cluster, as an async context manager.

    Args:
        settings: name the Redis, the key prefix and the labels topic.
        labels_partitions: partition count of the labels topic.

    Raises:
        StoreUnavailableError: any call may raise it: Redis does not answer.
    """

    def __init__(self, settings: Settings, labels_partitions: int) -> None:
        self.profiles = RedisMerchantStore.from_settings(settings)
        self._redis = RedisClient(redis_client(settings))
        self._keys = MerchantKeys(settings.redis_key_prefix)
        self._topic = settings.topic("labels")
        self._partitions = labels_partitions

    async def __aenter__(self) -> MerchantRepair:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._redis.close()
        await self.profiles.close()

    async def recorded_to(self, slot: int) -> list[int]:
        """Return a slot's watermark of each labels partition; earlier labels are recorded."""
        keys = self._keys.labels_watermarks(slot, self._topic, self._partitions)
        (values,) = await self._redis.execute([("MGET", *keys)])
        return [0 if value is None else int(value) for value in values]

    async def replace_frauds(
        self,
        slot: int,
        recorded_to: Sequence[int],
        frauds: Mapping[str, Sequence[Fraud]],
    ) -> bool:
        """Replace known frauds of a slot's merchants.

        Args:
            recorded_to: the expected watermark of each labels partition.
            frauds: known frauds by merchant.

        Returns:
            whether it wrote; not if a worker recorded labels meanwhile.
        """
        watermarks = self._keys.labels_watermarks(slot, self._topic, self._partitions)
        call = _REPLACE_FRAUDS.call(
            [*watermarks, *map(self._keys.profile, frauds)],
            b"%d" % self._partitions,
            *(b"%d" % offset for offset in recorded_to),
            b"%d" % EXPIRY_MS,
            EMPTY_VALUE,
            *(b"".join(encode_frauds(entries)) for entries in frauds.values()),
        )
        (is_written,) = await self._redis.execute([call])
        return bool(is_written)

    async def add(self, counts: Mapping[int, Mapping[str, int]]) -> None:
        """Add transactions, by bucket and merchant."""
        for bucket in sorted(counts):
            await self.profiles.add({bucket: counts[bucket]}, [])

    async def subtract(self, counts: Mapping[str, Mapping[int, int]]) -> None:
        """Subtract transactions, by merchant and bucket."""
        calls = [
            _SUBTRACT_COUNTS.call(
                [self._keys.profile(merchant)],
                *(b"%d" % number for pair in buckets.items() for number in pair),
            )
            for merchant, buckets in counts.items()
        ]
        if calls:
            await self._redis.execute(calls)
