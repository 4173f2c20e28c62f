"""Corrects merchants' profiles in Redis while workers add to them.

Counts are corrected by adding what is missing and taking off what is too much, so that what
workers count meanwhile stays. Known frauds are replaced by a script that looks first whether the
slot's labels are booked as far as they were: else a worker has booked in between, and nothing is
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from model.features.merchant import BUCKETS
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, Script, redis_client
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

# KEYS: the slot's watermarks of the labels partitions, then profiles. ARGV: how many watermarks,
# the expected ones, time to live in milliseconds, an empty profile, then each profile's known
# frauds. Returns 1, or 0 where it wrote nothing.
REPLACE_SCRIPT = Script(
    b"""
local n = tonumber(ARGV[1])
for i = 1, n do
  if (redis.call('GET', KEYS[i]) or '0') ~= ARGV[1 + i] then return 0 end
end
for i = n + 1, #KEYS do
  local value, fixed = redis.call('GET', KEYS[i]), ARGV[3 + n]
  if value and #value >= %(fixed)d and string.byte(value) == %(format)d
      and (#value - %(fixed)d) %% %(fraud)d == 0 then
    fixed = string.sub(value, 1, %(fixed)d)
  end
  redis.call('SET', KEYS[i], fixed .. ARGV[3 + i], 'PX', ARGV[2 + n])
end
return 1
"""
    % {b"fixed": FIXED_BYTES, b"format": PROFILE_FORMAT, b"fraud": FRAUD_BYTES}
)

# KEYS: a profile. ARGV: pairs of a bucket and how many to take off, if the ring still has it.
TAKE_OFF_SCRIPT = Script(
    b"""
local head = redis.call('GETRANGE', KEYS[1], 0, %(header)d - 1)
if #head < %(header)d or string.byte(head) ~= %(format)d then return 0 end
local newest = struct.unpack('>I4', head, 5)
for i = 1, #ARGV, 2 do
  local bucket = tonumber(ARGV[i])
  if bucket <= newest and bucket > newest - %(buckets)d then
    redis.call('BITFIELD', KEYS[1], 'OVERFLOW', 'SAT', 'INCRBY', 'u16',
      '#' .. (%(header)d / 2 + bucket %% %(buckets)d), '-' .. ARGV[i + 1])
  end
end
return 1
"""
    % {b"header": HEADER_BYTES, b"format": PROFILE_FORMAT, b"buckets": BUCKETS}
)


class MerchantRepair:
    """Corrects profiles of one Redis or Redis Cluster; use as an async context manager.

    Args:
        settings: name the Redis, the key prefix and the labels topic.
        labels_partitions: of the labels topic.

    Raises:
        StoreUnavailableError: from every call: Redis does not answer.
    """

    def __init__(self, settings: Settings, labels_partitions: int) -> None:
        self.profiles = RedisMerchantStore.from_settings(settings)
        self._calls = RedisClient(redis_client(settings), REPLACE_SCRIPT, TAKE_OFF_SCRIPT)
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
        await self._calls.close()
        await self.profiles.close()

    async def booked_to(self, slot: int) -> list[int]:
        """Before which offset all labels of each partition are booked in a slot's profiles."""
        keys = self._keys.labels_watermarks(slot, self._topic, self._partitions)
        (values,) = await self._calls.execute([("MGET", *keys)])
        return [0 if value is None else int(value) for value in values]

    async def replace_frauds(
        self,
        slot: int,
        booked_to: Sequence[int],
        frauds: Mapping[str, Sequence[Fraud]],
    ) -> bool:
        """Replace known frauds of a slot's merchants.

        Args:
            booked_to: up to where labels are booked.
            frauds: by merchant.

        Returns:
            whether it was done: not where a worker has booked meanwhile.
        """
        watermarks = self._keys.labels_watermarks(slot, self._topic, self._partitions)
        call = REPLACE_SCRIPT.call(
            [*watermarks, *map(self._keys.profile, frauds)],
            b"%d" % self._partitions,
            *(b"%d" % offset for offset in booked_to),
            b"%d" % EXPIRY_MS,
            EMPTY_VALUE,
            *(b"".join(encode_frauds(entries)) for entries in frauds.values()),
        )
        (done,) = await self._calls.execute([call])
        return bool(done)

    async def add(self, counts: Mapping[int, Mapping[str, int]]) -> None:
        """Add transactions, by bucket and merchant."""
        for bucket in sorted(counts):
            await self.profiles.add({bucket: counts[bucket]}, [])

    async def take_off(self, counts: Mapping[str, Mapping[int, int]]) -> None:
        """Take transactions off, by merchant and bucket."""
        calls = [
            TAKE_OFF_SCRIPT.call(
                [self._keys.profile(merchant)],
                *(b"%d" % number for pair in buckets.items() for number in pair),
            )
            for merchant, buckets in counts.items()
        ]
        if calls:
            await self._calls.execute(calls)
