"""Detection and repair of evictions by Redis while workers run.

An evicted state looks like the state of a new account. So a worker asks every second whether a
server may evict, and how many keys it evicted. It asks again before it trusts a missing key.

After an eviction nothing is loaded until the loss is repaired. The repair sets every partition's
watermark back to the start of its log, as `recur state rebuild` does, and has labels recorded
again. It waits until no server may evict any more: otherwise it would never end.

Redis itself holds the record of repaired evictions. So evictions without a running worker are
detected, too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from pipeline.errors import StartupError
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import ScoreLog
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.watermark_check import read_watermark
from pipeline.settings import Settings, redis_address
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.servers import NO_EVICTION, RedisServer, evicted_keys, servers
from pipeline.storage.state_store import Load, RedisStateStore, Save

log = logging.getLogger(__name__)

LOCK_MS = 60_000
"""Life of the lock, milliseconds: how long a worker that died blocks the repair."""

SERVERS_REMEMBERED = 64
"""Starts of servers whose numbers of evicted keys are kept."""

SET_POLICY = (
    "set maxmemory-policy to noeviction (redis-cli config set maxmemory-policy noeviction, or the"
    " provider's parameter of that name)"
)


class EvictionRecord(msgspec.Struct, frozen=True):
    """The record of evictions in Redis.

    Attributes:
        repaired: number of evicted keys that are repaired, by run id of a server.
        lost: number of keys evicted since then and not repaired yet.
        repairs: number of repairs.
    """

    repaired: dict[str, int]
    lost: int = 0
    repairs: int = 0


class EvictedError(StoreUnavailableError):
    """Redis evicted keys, so a missing key may be a loss."""


class Evictions:
    """Watch over the servers for one worker, and repair of evictions.

    Args:
        settings: name Redis and topics.
        model: the checkpoint's digest.
        partitions: partition count of the transactions topic.
        store, merchant_store: the stores to repair.
        logs: bounds of the logs.
        labels_partitions: returns the partition count of the labels topic.
        metrics, health: monitoring.
        on_repaired: called after any worker set the watermarks back.
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
        self._record: EvictionRecord | None = None
        self._is_loss_written = True
        # By run id of a server: evicted keys already counted in the metric.
        self._counted: dict[str, int] = {}
        # By name of a server: evicted keys already repaired.
        self._repaired: dict[str, int] = {}
        self._lost = 0
        self._wrong: dict[str, str] = {}

    async def require_no_loss(self, *, absent: bool) -> None:
        """Return if no loss is known; see :class:`pipeline.storage.state_store.LossCheck`."""
        if absent and not self._lost:
            evicted = await evicted_keys(self._redis)
            is_known = self._record is not None
            if not is_known or any(n > self._repaired.get(x, 0) for x, n in evicted.items()):
                await self._examine()
        if self._lost:
            raise EvictedError(
                f"it evicted {self._lost} keys; waiting for the repair: {SET_POLICY}"
            )

    async def look(self) -> None:
        """Check the servers, and repair a loss once they evict no more.

        Raises:
            StoreUnavailableError: Redis does not answer; call again.
        """
        found = await self._examine()
        if self._lost and not any(server.may_evict for server in found):
            try:
                await self._repair()
            except (LogUnavailableError, StartupError) as error:
                self._metrics.kafka_errors.inc()
                log.warning(
                    "the loss of evicted keys cannot be repaired yet; trying again",
                    extra={"why": str(error)},
                )

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.close()

    # check -------------------------------------------------------------------------------

    async def _examine(self) -> list[RedisServer]:
        """Ask the servers, find out what is lost, and write it down."""
        async with self._one_at_a_time:
            written = await self._read()
            # Read the record first: then a lower number means that the counter was reset.
            found = await servers(self._redis)
            self._report(found)
            evicted = _evicted(found)
            record = written or self._record or await self._first_record(evicted)
            self._count(evicted, record.repaired)
            record = _compare(record, evicted)
            if self._lost and not self._is_loss_written:
                record = msgspec.structs.replace(record, lost=self._lost)
            self._notice(found, record)
            if record != written:
                await self._write(record)
            self._is_loss_written = True
            return found

    async def _first_record(self, evicted: dict[str, int]) -> EvictionRecord:
        """Start a record; if states exist already, count all evictions as losses."""
        has_states = bool(await self._store.watermarks(self._partitions))
        return EvictionRecord({} if has_states else evicted)

    def _notice(self, found: list[RedisServer], record: EvictionRecord) -> None:
        """Report a new loss, or its repair."""
        before, had_lost = self._record, self._lost
        self._record, self._lost = record, record.lost
        if record.lost:
            self._is_loss_written = self._is_loss_written and bool(had_lost)
            self._health.down(
                "evictions",
                f"Redis evicted {record.lost} keys, so account states are lost; they are computed"
                f" again from the log once Redis may not evict: {SET_POLICY}",
            )
            if not had_lost:
                log.error(
                    "Redis evicted keys, and account states may be among them; scoring stops until"
                    " they are computed again from the log, once Redis may not evict:"
                    f" {SET_POLICY}",
                    extra={"keys": record.lost, "policy": _policies(found)},
                )
            return
        self._repaired = {server.name: server.evicted or 0 for server in found}
        self._health.up("evictions")
        if had_lost or (before is not None and record.repairs != before.repairs):
            log.info("evicted states are computed again from the log; another worker started it")
            self._on_repaired()

    def _count(self, evicted: Mapping[str, int], repaired: Mapping[str, int]) -> None:
        """Add the evictions since the last check to the metric."""
        for run, n in evicted.items():
            before = self._counted.get(run, repaired.get(run, 0))
            self._metrics.evicted_keys.inc(n - before if n >= before else n)
            self._counted[run] = n

    def _report(self, found: list[RedisServer]) -> None:
        """Make the worker not ready, and log an error, if a server is not set up as required."""
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
                    f"the Redis at {where} is full (maxmemory) and rejects writes: raise maxmemory"
                )
            if server.is_replica:
                wrong["redis_role"] = (
                    f"the Redis at {where} is a replica and rejects writes: set RECUR_REDIS_URL to"
                    " its primary, or to redis+sentinel://, which follows the primary"
                )
        for part in self._wrong.keys() - wrong.keys():
            self._health.up(part)
            log.info("Redis is set up as required again", extra={"what": part})
        for part, why in wrong.items():
            self._health.down(part, why)
            if part not in self._wrong:
                log.error(why)
        self._wrong = wrong

    # repair ------------------------------------------------------------------------------

    async def _repair(self) -> None:
        """Set all watermarks back, unless another worker does."""
        lock, owner = self._keys.evictions_lock(), secrets.token_hex(8)
        if not await self._redis.ask("SET", lock, owner, "NX", "PX", str(LOCK_MS)):
            return
        try:
            await self._repair_alone()
        finally:
            await self._redis.ask("DEL", lock)

    async def _repair_alone(self) -> None:
        found = await self._examine()  # another worker may have repaired the loss meanwhile
        record, lost = self._record, self._lost
        if record is None or not lost or any(server.may_evict for server in found):
            return
        records = sum([await self._set_back(p) for p in range(self._partitions)])
        if self._settings.update_merchant_profiles:
            await self._merchant_store.forget_recorded(await self._labels_partitions() or 0)
        # Later evictions exceed the numbers written here, so they are detected.
        record = EvictionRecord(record.repaired | _evicted(found), 0, record.repairs + 1)
        await self._write(record)
        self._record, self._lost = record, 0
        self._repaired = {server.name: server.evicted or 0 for server in found}
        self._health.up("evictions")
        log.warning(
            "evicted states are computed again from the log, and labels are recorded again;"
            " correct merchants' counts with `recur state rebuild --merchants`",
            extra={"keys": lost, "records": records},
        )
        self._on_repaired()

    async def _set_back(self, partition: int) -> int:
        """Set a partition's watermark back to the start of its log; return by how many records."""
        topic, scores_topic = self._keys.topic, self._settings.topic("scores")
        while True:
            bounds = await self._logs.bounds(topic, partition)
            scores = await self._logs.bounds(scores_topic, partition)
            (loaded,) = await self._store.load_unchecked([Load(partition, [])])
            if loaded.watermark is None:
                return 0  # a worker starts at the start of the log anyway
            standing = read_watermark(topic, partition, loaded.watermark)
            if standing.next_offset > bounds.end:
                return 0  # of another log: the worker that takes the partition reports it
            mark = msgspec.structs.replace(
                standing,
                next_offset=min(bounds.begin, standing.next_offset),
                scores_offset=max(scores.begin, standing.scores_begin),
                writer=secrets.randbits(64),
            )
            save = Save(partition, loaded.watermark, mark.to_bytes(), [], [])
            if (await self._store.save([save]))[0]:
                return standing.next_offset - mark.next_offset
            # A worker saved in between: try again from its watermark.

    # record in Redis ---------------------------------------------------------------------

    async def _read(self) -> EvictionRecord | None:
        """Read the record; frequent reads keep Redis from evicting it before watermarks."""
        value = await self._redis.ask("GET", self._keys.evictions())
        if value is None:
            return None
        try:
            return msgspec.json.decode(value, type=EvictionRecord)
        except msgspec.DecodeError:  # of another version: it is replaced
            return None

    async def _write(self, record: EvictionRecord) -> None:
        last = dict(list(record.repaired.items())[-SERVERS_REMEMBERED:])
        value = msgspec.json.encode(msgspec.structs.replace(record, repaired=last))
        await self._redis.ask("SET", self._keys.evictions(), value)


def _compare(record: EvictionRecord, evicted: Mapping[str, int]) -> EvictionRecord:
    """Compare a record with the current numbers: keys above the repaired number are lost."""
    # A lower number was reset (CONFIG RESETSTAT): count from zero.
    repaired = {run: n for run, n in record.repaired.items() if evicted.get(run, n) >= n}
    lost = sum(n - repaired.get(run, 0) for run, n in evicted.items())
    # A loss stays a loss: servers reset their numbers at a restart.
    return EvictionRecord(repaired, max(record.lost, lost), record.repairs)


def _evicted(found: list[RedisServer]) -> dict[str, int]:
    """Collect numbers of evicted keys by run id of the server."""
    return {
        server.run_id or server.name or "redis": server.evicted
        for server in found
        if server.evicted is not None
    }


def _policies(found: list[RedisServer]) -> str:
    policies = {server.policy or "unknown" for server in found}
    return ", ".join(sorted(policies - {NO_EVICTION} or policies))
