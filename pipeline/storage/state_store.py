"""Store of account states in Redis or Redis Cluster.

Every write is conditional. One command reads a partition's states with its watermark. One script
writes them, and only if the watermark is still the expected one. So a partition's states are
exactly its log up to its watermark at any moment, whichever worker writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Protocol

import msgspec

from model.units import DAY_MS
from pipeline.messages.replies import ANSWERED, REJECTED
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient
from pipeline.storage.client import StoreUnavailableError as StoreUnavailableError
from pipeline.storage.client import redis_client as redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.script import Command, load_script
from pipeline.storage.servers import RedisServer, servers
from pipeline.storage.transaction_note import NOTE_CONSTANTS, NOTE_EXPIRY_MS, ScoredNote

_SAVE_STATES = load_script(
    "notes", "save_states", **NOTE_CONSTANTS, ANSWERED=ANSWERED, REJECTED=REJECTED
)


class Load(msgspec.Struct, frozen=True):
    """A request for a partition's watermark and states of accounts in it."""

    partition: int
    account_ids: list[str]


class LoadResult(msgspec.Struct, frozen=True):
    """The loaded values; None for a missing one."""

    watermark: bytes | None
    states: list[bytes | None]


class Save(msgspec.Struct, frozen=True):
    """A request to write states and the new watermark, if ``expected`` still stands.

    A state of None is deleted. An account may appear twice: the last one counts.

    Attributes:
        notes: notes of the transactions that the states contain. Only a
            :class:`pipeline.storage.poll_store.PollStore` writes them.
        answers: transaction id and value of each answer key
            (:class:`pipeline.messages.replies.StoredAnswer`).
    """

    partition: int
    expected: bytes | None
    watermark: bytes
    account_ids: list[str]
    states: Sequence[bytes | None]
    notes: Sequence[ScoredNote] = ()
    answers: Sequence[tuple[str, bytes]] = ()


class LossCheck(Protocol):
    """Interface of a check that Redis lost no keys."""

    async def require_no_loss(self, *, absent: bool) -> None:
        """Return if no loss is known.

        Args:
            absent: a key is missing; ask the servers whether they evicted any.

        Raises:
            StoreUnavailableError: keys are lost and not repaired yet; call again.
        """


def is_absent(found: Sequence[LoadResult]) -> bool:
    """Return whether a watermark or a state is missing."""
    return any(one.watermark is None or None in one.states for one in found)


class StateStore(Protocol):
    """Interface of a store of account states."""

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Read each request's watermark and states, together.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """Write each request completely, or nothing of it if its watermark is not the expected one.

        Returns:
            for each request, whether its values stand now. A repeated request whose first
            answer was lost is true, too.

        Raises:
            StoreUnavailableError: the store does not answer; call again with the same requests.
        """

    def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield partition and account id of every state, of one partition or all.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def ping(self) -> None:
        """Return if the store answers.

        Raises:
            StoreUnavailableError: the store does not answer.
        """

    async def close(self) -> None:
        """Close the connections."""


class RedisStateStore:
    """Store of states in one Redis or a Redis Cluster.

    Args:
        client: a connected client that returns bytes.
        keys: names the keys.
        expiry_ms: how long Redis keeps an unused state: the state's time to live plus the
            log's retention, so that a replay decides as the worker did.
        answer_expiry_ms: how long Redis keeps an answer.

    Attributes:
        loss_check: called before the result of a load is trusted; None trusts all.
        redis: the client.
    """

    def __init__(
        self, client: Any, keys: Keys, expiry_ms: int, answer_expiry_ms: int = DAY_MS
    ) -> None:
        self.loss_check: LossCheck | None = None
        self.redis = RedisClient(client)
        self._keys = keys
        self._expiry = b"%d" % expiry_ms
        self._note_expiry = b"%d" % NOTE_EXPIRY_MS
        self._answer_expiry = b"%d" % answer_expiry_ms

    @classmethod
    def from_settings(cls, settings: Settings, model: str) -> RedisStateStore:
        """Make a store for the model with this digest; it connects at the first call."""
        expiry_ms = int((settings.state_ttl_days + settings.log_retention_days) * DAY_MS)
        keys = Keys(settings.redis_key_prefix, model, settings.topic("transactions"))
        return cls(redis_client(settings), keys, expiry_ms, int(settings.answer_seconds * 1000))

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """See :class:`StateStore`: it takes one MGET, on a cluster one for each partition.

        If a key is missing, :attr:`loss_check` finds out whether it was evicted.
        """
        found = await self.load_unchecked(requests)
        if self.loss_check is not None:
            await self.loss_check.require_no_loss(absent=is_absent(found))
        return found

    async def load_unchecked(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Load without the loss check, for the repair itself."""
        return self.loaded(requests, await self.redis.execute(self.load_commands(requests)))

    def load_commands(self, requests: Sequence[Load]) -> list[Command]:
        """Make the commands that load watermarks and states."""
        keys = self._keys
        wanted = [
            [
                keys.watermark(request.partition),
                *keys.accounts(request.partition, request.account_ids),
            ]
            for request in requests
        ]
        if self.redis.is_cluster or not wanted:
            return [("MGET", *part) for part in wanted]
        return [("MGET", *chain.from_iterable(wanted))]

    def loaded(self, requests: Sequence[Load], replies: Sequence[Any]) -> list[LoadResult]:
        """Read the replies of :meth:`load_commands`."""
        values = chain.from_iterable(replies)
        return [
            LoadResult(next(values), list(islice(values, len(request.account_ids))))
            for request in requests
        ]

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """See :class:`StateStore`: it takes one script call for each partition."""
        return self.saved(requests, await self.redis.execute(self.save_commands(requests)))

    def save_commands(
        self,
        requests: Sequence[Save],
        note_keys: Callable[[Sequence[ScoredNote]], list[bytes]] | None = None,
    ) -> list[Command]:
        """Make the commands that save states, and notes if their keys are given.

        Args:
            note_keys: returns for each note its key and its merchant's profile; None on a
                cluster, where a script cannot write both.
        """
        return [self._save(request, note_keys) for request in requests]

    def _save(
        self, request: Save, note_keys: Callable[[Sequence[ScoredNote]], list[bytes]] | None
    ) -> Command:
        keys, partition, accounts = self._keys, request.partition, request.account_ids
        notes = request.notes if note_keys is not None else ()
        answer_keys: list[bytes] = []
        answers: list[bytes] = []
        if request.answers:
            answer_keys = keys.answers(partition, [name for name, _ in request.answers])
            answers = [self._answer_expiry, *[value for _, value in request.answers]]
        return _SAVE_STATES.call(
            [
                keys.watermark(partition),
                *keys.accounts(partition, accounts),
                *(note_keys(notes) if note_keys is not None else ()),
                *answer_keys,
            ],
            request.expected or b"",
            request.watermark,
            b"%d" % len(accounts),
            self._expiry,
            self._note_expiry,
            b"".join([note.to_bytes() for note in notes]),
            *[state or b"" for state in request.states],
            *answers,
        )

    def reply_commands(self, messages: Mapping[str, bytes]) -> list[Command]:
        """Make the commands that publish a message to each gateway."""
        replies = self._keys.replies
        return [("PUBLISH", replies(gateway), text) for gateway, text in messages.items()]

    def saved(self, requests: Sequence[Save], replies: Sequence[Any]) -> list[bool]:
        """Read the replies of :meth:`save_commands`: for each, whether its values stand."""
        return [
            reply == request.watermark for reply, request in zip(replies, requests, strict=True)
        ]

    async def ping(self) -> None:
        """See :class:`StateStore`."""
        await self.redis.ask("PING")

    async def servers(self) -> list[RedisServer]:
        """Describe the Redis, or each primary of the cluster.

        Raises:
            StoreUnavailableError: a server does not answer.
        """
        return await servers(self.redis)

    async def watermarks(self, partitions: int) -> dict[int, bytes]:
        """Load the existing watermarks, by partition.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        requests = [Load(partition, []) for partition in range(partitions)]
        replies = await self.load_unchecked(requests)
        return {
            partition: reply.watermark
            for partition, reply in enumerate(replies)
            if reply.watermark is not None
        }

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield partition and account id of every state, some at a time.

        It may miss a state that is written meanwhile.

        Raises:
            StoreUnavailableError: Redis does not answer.
            StoreForbiddenError: Redis forbids its user to list keys.
        """
        async for keys in self.redis.scan(self._keys.accounts_pattern(partition)):
            yield [place for key in keys if (place := self._keys.account_of(key)) is not None]

    async def close(self) -> None:
        """See :class:`StateStore`."""
        await self.redis.close()
