"""Loads and saves of one poll: states, watermarks, merchants' profiles and notes together.

One Redis answers each in one round trip. A Redis Cluster answers loads in one round trip to each
node. Its saves take three: a script cannot change keys of two slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pipeline.storage.merchant_store import Counts, RedisMerchantStore
from pipeline.storage.state_store import Load, LoadResult, RedisStateStore, Save, is_absent


class PollStore(Protocol):
    """Interface of a store for the states and merchants of polls."""

    async def load(
        self, requests: Sequence[Load], merchant_ids: Sequence[str]
    ) -> tuple[list[LoadResult], list[bytes | None]]:
        """Read each request's watermark and states, and the values of merchants' profiles.

        Returns:
            a result for each request, and a value for each merchant, None for a missing one.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def save(self, requests: Sequence[Save], counts: Counts) -> list[bool]:
        """Save states and watermarks, as :meth:`StateStore.save` does, and what merchants need.

        The notes of a request are written before its states. Transactions are counted
        at least once.

        Returns:
            for each request, whether its values stand now.

        Raises:
            StoreUnavailableError: the store does not answer; call again with the same requests.
        """

    async def reply(self, messages: Mapping[str, bytes]) -> None:
        """Publish a message to each gateway, by its id; nobody may hear it.

        Raises:
            StoreUnavailableError: the store does not answer; some may be published.
            StoreForbiddenError: Redis forbids it.
        """


class RedisPollStore:
    """Store of polls in the Redis of two stores.

    Args:
        states: the store of states. Its connection and its loss check serve all calls.
        merchants: the store of profiles.
    """

    def __init__(self, states: RedisStateStore, merchants: RedisMerchantStore) -> None:
        self._states = states
        self._merchants = merchants
        self._redis = states.redis

    async def load(
        self, requests: Sequence[Load], merchant_ids: Sequence[str]
    ) -> tuple[list[LoadResult], list[bytes | None]]:
        """See :class:`PollStore`."""
        commands = self._states.load_commands(requests)
        of_states = len(commands)
        replies = await self._redis.execute(commands + self._merchants.load_commands(merchant_ids))
        found = self._states.loaded(requests, replies[:of_states])
        profiles = self._merchants.loaded(merchant_ids, replies[of_states:])
        check = self._states.loss_check
        if check is not None:
            await check.require_no_loss(absent=None in profiles or is_absent(found))
        return found, profiles

    async def save(self, requests: Sequence[Save], counts: Counts) -> list[bool]:
        """See :class:`PollStore`: on one Redis a script writes notes with their states."""
        states, merchants, execute = self._states, self._merchants, self._redis.execute
        count = merchants.count_commands(counts)
        if not self._redis.is_cluster:
            save = states.save_commands(requests, merchants.note_keys)
            return states.saved(requests, (await execute(save + count))[: len(save)])
        await execute(merchants.note_commands([n for request in requests for n in request.notes]))
        stands = await states.save(requests)
        await execute(count)  # last: a save that is repeated repeats no counts
        return stands

    async def reply(self, messages: Mapping[str, bytes]) -> None:
        """See :class:`PollStore`."""
        await self._redis.execute(self._states.reply_commands(messages))
