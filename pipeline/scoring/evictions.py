"""Notice what Redis evicts while a worker runs, and have it computed again from the log.

An evicted state cannot be told from that of an account which is new. So a worker looks every
second whether a server may evict and how many keys it has evicted, and asks once more before it
believes that something is absent. Once keys were evicted, nothing is loaded until the loss is
repaired: every partition's watermark is set back to where its log begins, as `recur state rebuild`
does, and the labels are booked again. That happens when no server may evict any more, so that it
ends. Up to which numbers of evicted keys the states are repaired stands in Redis itself: what was
evicted while no worker ran is noticed, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from pipeline.errors import StartupError
from pipeline.kafka.score_log import LogUnavailableError, ScoreLog
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.partitions import read_watermark
from pipeline.settings import Settings, redis_address
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.servers import NO_EVICTION, RedisServer, evicted_keys, servers
from pipeline.storage.state_store import Load, RedisStateStore, Save

log = logging.getLogger(__name__)

LOCK_MS = 60_000
"""A worker that repairs and dies keeps the others from it for so long, milliseconds."""

SERVERS_REMEMBERED = 64
"""Numbers of evicted keys that are kept, by server and start of it."""

SET_POLICY = (
    "set maxmemory-policy to noeviction (redis-cli config set maxmemory-policy noeviction, or the"
    " provider's parameter of that name)"
)


class Record(msgspec.Struct, frozen=True):
    """The record of evictions that stands in Redis.

    Attributes:
        repaired: numbers of evicted keys up to which states are repaired, by run id of a server.
        lost: keys that were evicted since, and whose loss is not repaired yet.
        repairs: how often it was repaired.
    """

    repaired: dict[str, int]
    lost: int = 0
    repairs: int = 0


class EvictedError(StoreUnavailableError):
    """Redis evicted keys, and what is absent may have been there."""


class Evictions:
    """Watches the servers for one worker, and repairs what they evicted.

    Args:
        settings: name Redis and topics.
        model: the checkpoint's digest.
        partitions: partition count of the transactions topic.
        store, merchant_store: what is repaired.
        logs: where logs begin and end.
        labels_partitions: asked for the partition count of the labels topic.
        metrics, health: what operations see.
        on_repaired: called once watermarks are set back, whichever worker did it.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        model: str,
        partitions: int,
        store: RedisStateStore,
        merchant_store: RedisMerchantStore,
        logs: ScoreLog,
        labels_partitions: Callable[[], Awaitable[int | None]],
        metrics: Metrics,
        health: Health,
        on_repaired: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._partitions = partitions
        self._store = store
        self._merchant_store = merchant_store
        self._logs = logs
        self._labels_partitions = labels_partitions
        self._metrics = metrics
        self._health = health
        self._on_repaired = on_repaired
        self._redis = RedisClient(redis_client(settings))
        self._keys = Keys(settings.redis_key_prefix, model, settings.topic("transactions"))
        self._one_at_a_time = asyncio.Lock()
        self._record: Record | None = None
        self._is_written = True  # that something is lost
        # By run id of a server: evicted keys that are in the metric.
        self._counted: dict[str, int] = {}
        # By server's name: evicted keys that are repaired.
        self._believed: dict[str, int] = {}
        self._lost = 0
        self._wrong: dict[str, str] = {}

    async def require_no_loss(self, *, absent: bool) -> None:
        """See :class:`pipeline.storage.state_store.LossCheck`."""
        if absent and not self._lost:
            evicted = await evicted_keys(self._redis)
            is_known = self._record is not None
            if not is_known or any(n > self._believed.get(x, 0) for x, n in evicted.items()):
                await self._examine()
        if self._lost:
            raise EvictedError(
                f"it evicted {self._lost} keys; waiting until that is repaired: {SET_POLICY}"
            )

    async def look(self) -> None:
        """See how the servers are, and repair what is lost once they evict no more.

        Raises:
            StoreUnavailableError: Redis does not answer; look again.
        """
        found = await self._examine()
        if self._lost and not any(server.may_evict for server in found):
            try:
                await self._repair()
            except (LogUnavailableError, StartupError) as error:
                self._metrics.kafka_errors.inc()
                log.warning(
                    "what Redis evicted cannot be repaired yet; trying again",
                    extra={"why": str(error)},
                )

    async def close(self) -> None:
        """Give connections back."""
        await self._redis.close()

    # look --------------------------------------------------------------------------------

    async def _examine(self) -> list[RedisServer]:
        """Ask the servers, and find out and write down what is lost."""
        async with self._one_at_a_time:
            written = await self._read()
            # After it: a number under that of the record is one that was reset.
            found = await servers(self._redis)
            self._tell(found)
            evicted = _evicted(found)
            record = written or self._record or await self._first_record(evicted)
            self._count(evicted, record.repaired)
            record = _compared(record, evicted)
            if self._lost and not self._is_written:
                record = msgspec.structs.replace(record, lost=self._lost)
            self._notice(found, record)
            if record != written:
                await self._write(record)
            self._is_written = True
            return found

    async def _first_record(self, evicted: dict[str, int]) -> Record:
        """Begin a record; of states that stand already, anything may be evicted."""
        has_states = bool(await self._store.watermarks(self._partitions))
        return Record({} if has_states else evicted)

    def _notice(self, found: list[RedisServer], record: Record) -> None:
        """Say what is lost, or that it is repaired."""
        before, had_lost = self._record, self._lost
        self._record, self._lost = record, record.lost
        if record.lost:
            self._is_written = self._is_written and bool(had_lost)
            self._health.down(
                "evictions",
                f"Redis evicted {record.lost} keys, so account states are lost; they are computed"
                f" again from the log once it may not evict: {SET_POLICY}",
            )
            if not had_lost:
                log.error(
                    "Redis evicted keys, and account states may be among them; nothing more is"
                    " scored until they are computed again from the log, once it may not evict:"
                    f" {SET_POLICY}",
                    extra={"keys": record.lost, "policy": _policies(found)},
                )
            return
        self._believed = {server.name: server.evicted or 0 for server in found}
        self._health.up("evictions")
        if had_lost or (before is not None and record.repairs != before.repairs):
            log.info("what Redis evicted is computed again from the log; another worker began it")
            self._on_repaired()

    def _count(self, evicted: Mapping[str, int], repaired: Mapping[str, int]) -> None:
        """Add what was evicted since the look before to the metric."""
        for run, n in evicted.items():
            before = self._counted.get(run, repaired.get(run, 0))
            self._metrics.evicted_keys.inc(n - before if n >= before else n)
            self._counted[run] = n

    def _tell(self, found: list[RedisServer]) -> None:
        """Make the worker not ready, and log a line, where a server is not as it must be."""
        place = redis_address(self._settings.redis_url)
        self._metrics.may_evict.set(any(server.may_evict for server in found))
        wrong: dict[str, str] = {}
        for server in found:
            where = server.name or place
            if server.may_evict:
                wrong["redis_policy"] = (
                    f"the Redis at {where} has maxmemory-policy {server.policy}, so it may evict"
                    f" account states: {SET_POLICY}"
                )
            if server.is_full:
                wrong["redis_memory"] = (
                    f"the Redis at {where} is full (maxmemory) and refuses writes: raise maxmemory"
                )
            if server.is_replica:
                wrong["redis_role"] = (
                    f"the Redis at {where} is a replica and refuses writes: set RECUR_REDIS_URL to"
                    " its primary, or to redis+sentinel://, which follows the primary"
                )
        for part in self._wrong.keys() - wrong.keys():
            self._health.up(part)
            log.info("Redis is as it must be again", extra={"what": part})
        for part, why in wrong.items():
            self._health.down(part, why)
            if part not in self._wrong:
                log.error(why)
        self._wrong = wrong

    # repair ------------------------------------------------------------------------------

    async def _repair(self) -> None:
        """Set all watermarks back, unless another worker is at it."""
        lock, owner = self._keys.evictions_lock(), secrets.token_hex(8)
        if not await self._redis.ask("SET", lock, owner, "NX", "PX", str(LOCK_MS)):
            return
        try:
            await self._repair_alone()
        finally:
            await self._redis.ask("DEL", lock)

    async def _repair_alone(self) -> None:
        found = await self._examine()  # another worker may have repaired it meanwhile
        record, lost = self._record, self._lost
        if record is None or not lost or any(server.may_evict for server in found):
            return
        records = sum([await self._take_back(p) for p in range(self._partitions)])
        if self._settings.update_merchant_profiles:
            await self._merchant_store.forget_recorded(await self._labels_partitions() or 0)
        # What is evicted from here on is more than what is written here.
        record = Record(record.repaired | _evicted(found), 0, record.repairs + 1)
        await self._write(record)
        self._record, self._lost = record, 0
        self._believed = {server.name: server.evicted or 0 for server in found}
        self._health.up("evictions")
        log.warning(
            "what Redis evicted is computed again from the log, and labels are booked again;"
            " correct merchants' counts with `recur state rebuild --merchants`",
            extra={"keys": lost, "records": records},
        )
        self._on_repaired()

    async def _take_back(self, partition: int) -> int:
        """Set a partition's watermark back to its log's begin; how many records that is."""
        topic, scores_topic = self._keys.topic, self._settings.topic("scores")
        while True:
            bounds = await self._logs.bounds(topic, partition)
            scores = await self._logs.bounds(scores_topic, partition)
            (loaded,) = await self._store.load_unchecked([Load(partition, [])])
            if loaded.watermark is None:
                return 0  # a worker begins at the log's begin by itself
            standing = read_watermark(topic, partition, loaded.watermark)
            if standing.next_offset > bounds.end:
                return 0  # of another log: the worker that takes the partition says so
            mark = dataclasses.replace(
                standing,
                next_offset=min(bounds.begin, standing.next_offset),
                scores_offset=max(scores.begin, standing.scores_begin),
                writer=secrets.randbits(64),
            )
            save = Save(partition, loaded.watermark, mark.to_bytes(), [], [])
            if (await self._store.save([save]))[0]:
                return standing.next_offset - mark.next_offset
            # A worker has saved in between: from where it is now.

    # what is repaired --------------------------------------------------------------------

    async def _read(self) -> Record | None:
        """Read the record, with every look, so that Redis evicts it no sooner than watermarks."""
        value = await self._redis.ask("GET", self._keys.evictions())
        if value is None:
            return None
        try:
            return msgspec.json.decode(value, type=Record)
        except msgspec.DecodeError:  # of another version: a new one is written
            return None

    async def _write(self, record: Record) -> None:
        last = dict(list(record.repaired.items())[-SERVERS_REMEMBERED:])
        value = msgspec.json.encode(msgspec.structs.replace(record, repaired=last))
        await self._redis.ask("SET", self._keys.evictions(), value)


def _compared(record: Record, evicted: Mapping[str, int]) -> Record:
    """Compare a record with the numbers now: what is over its own is lost."""
    # A number under its own was reset (CONFIG RESETSTAT): it counts from zero.
    repaired = {run: n for run, n in record.repaired.items() if evicted.get(run, n) >= n}
    lost = sum(n - repaired.get(run, 0) for run, n in evicted.items())
    # Lost is lost: servers forget their numbers when they start again.
    return Record(repaired, max(record.lost, lost), record.repairs)


def _evicted(found: list[RedisServer]) -> dict[str, int]:
    """Collect numbers of evicted keys, by the servers' run ids."""
    return {
        server.run_id or server.name or "redis": server.evicted
        for server in found
        if server.evicted is not None
    }


def _policies(found: list[RedisServer]) -> str:
    policies = {server.policy or "unknown" for server in found}
    return ", ".join(sorted(policies - {NO_EVICTION} or policies))
