"""Manual command: move states after the topic got more partitions (`recur state repartition`).

With more partitions, Kafka's partitioner sends most accounts' records to another partition.
Existing records stay, so the history of a moved account lies in two logs. Its state moves to the
new partition. First and last offset become -1, so that no offset of the old log is mistaken for
one of the new log.

An account must have one state only. So no worker may run, and all records of accounts that move
must be applied in their old partitions. If the command is interrupted, run it again. It writes
the watermarks last, so no worker starts before every state has moved.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np
from rich.console import Console

from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.partition_reader import KafkaPartitionReader
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import add_partitions, group_members, partition_count, topic_ids
from pipeline.progress import Bar
from pipeline.scoring.watermark_check import read_watermark
from pipeline.settings import Settings
from pipeline.storage.account_state import StateCodec
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_scan import StateScan
from pipeline.storage.state_store import Load, RedisStateStore, Save
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, is_other, other_log

READ_MAX = 8_192

ELSEWHERE = -1
"""Stands for the offset of a transaction in another partition's log."""


@dataclass(frozen=True)
class RepartitionResult:
    """Outcome of a repartitioning, or of its dry run.

    Attributes:
        before, after: partition counts.
        stays, moves: numbers of states.
        unreadable: number of states of another format, or damaged; they stay and expire.
        stranded: number of records in old partitions, not applied, of accounts that move.
        scores_partitions: partition count of the scores topic before.
    """

    before: int
    after: int
    stays: int
    moves: int
    unreadable: int
    stranded: int
    scores_partitions: int


partition_of = lru_cache(maxsize=65_536)(key_partition)


class Repartition:
    """Moves one model's states.

    Args:
        settings: the workers' settings.
        console: shows progress.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._topic = settings.topic("transactions")
        self._scores_topic = settings.topic("scores")
        checkpoint = load_checkpoint(settings)
        self._model = checkpoint.digest
        self._codec = StateCodec.of(checkpoint)
        self._store = RedisStateStore.from_settings(settings, self._model)

    async def run(self, *, dry_run: bool, accept_stranded: bool) -> RepartitionResult | None:
        """Move the states, and write the watermarks; return None if nothing has to move.

        Args:
            dry_run: report what would happen, and change nothing.
            accept_stranded: go on although records of accounts that move are not applied.

        Raises:
            RecurError: the states must not move now, or Kafka or Redis does not answer.
        """
        try:
            return await self._run(dry_run, accept_stranded)
        except (StoreUnavailableError, LogUnavailableError) as error:
            raise RecurError(
                f"not all states have moved ({error}): run the command again; no worker starts"
                " until it has finished"
            ) from error
        finally:
            await self._store.close()

    async def _run(self, dry_run: bool, accept_stranded: bool) -> RepartitionResult | None:
        after = await partition_count(self._settings, self._topic)
        scores = await partition_count(self._settings, self._scores_topic)
        if after is None or scores is None:
            raise RecurError(
                f"there is no topic {self._topic} or {self._scores_topic} at"
                f" {self._settings.kafka_bootstrap_servers}: there is nothing to move"
            )
        marks = {
            partition: read_watermark(self._topic, partition, value)
            for partition, value in (await self._store.watermarks(after)).items()
        }
        log_id = (await topic_ids(self._settings)).get(self._topic, NO_ID)
        for mark in marks.values():
            if is_other(mark.log_id, log_id):
                raise other_log(self._topic, mark.log_id, log_id)
        counts = {mark.partitions for mark in marks.values()} - {after}
        if not counts:
            return None
        before = max(counts)
        self._check_counts(counts, after, scores)
        members = await group_members(self._settings)
        if members and not dry_run:
            raise RecurError(
                f"{members} workers of group {self._settings.kafka_group_id} are running: stop all"
                " of them, and run the command again"
            )
        with Bar(self._console) as bar:
            stranded = await self._count_stranded(marks, before, after, bar)
            if stranded and not (dry_run or accept_stranded):
                raise RecurError(
                    f"{stranded} records of accounts that move are not applied in their old"
                    " partitions, and the accounts' states will not be there. Add"
                    " --accept-stranded: each is scored as if its account were new. Or set"
                    " RECUR_REDIS_KEY_PREFIX to a new prefix: all accounts then start with no state"
                )
            found = await self._count_states(before, after, bar)
            result = RepartitionResult(before, after, *found, stranded, scores)
            if dry_run:
                return result
            if scores < after:
                await add_partitions(self._settings, self._scores_topic, after)
            await self._move(after, found[0] + found[1], bar)
        await self._write_watermarks(marks, after)
        return result

    def _check_counts(self, counts: set[int], after: int, scores: int) -> None:
        if len(counts) > 1 or max(counts) > after:
            raise RecurError(
                f"the watermarks in Redis are of {sorted(counts)} partitions, and {self._topic}"
                f" has {after}: partitions were removed, or added twice between two runs."
                " Set RECUR_REDIS_KEY_PREFIX to a new prefix: all accounts then start with no state"
            )
        if scores > after:
            raise RecurError(
                f"topic {self._scores_topic} has {scores} partitions and {self._topic} has"
                f" {after}: add partitions to {self._topic} first"
            )

    async def _count_stranded(
        self, marks: Mapping[int, Watermark], before: int, after: int, bar: Bar
    ) -> int:
        """Count records past the watermarks whose accounts now have another partition."""
        stranded = 0
        for partition in range(before):
            start = marks[partition].next_offset if partition in marks else 0
            async with KafkaPartitionReader(
                self._settings, self._topic, partition, start
            ) as reader:
                end = (await reader.bounds()).end
                while records := await reader.read(end, READ_MAX):
                    stranded += sum(
                        partition_of(record.key, after) != partition
                        for record in records
                        if record.key is not None
                    )
                    left = end - reader.position
                    bar.show("reading records not applied", reader.position, 1 - left / max(1, end))
        return stranded

    async def _count_states(self, before: int, after: int, bar: Bar) -> tuple[int, int, int]:
        """Count the states that stay, that move and that cannot be read.

        Raises:
            RecurError: the producers do not use Kafka's default partitioner.
        """
        stays = moves = unreadable = seen = 0
        async with StateScan(self._settings) as scan:
            async for partition, accounts in scan.accounts(self._model):
                keys = [account.encode() for account in accounts]
                for key in keys:
                    if partition not in (partition_of(key, before), partition_of(key, after)):
                        raise RecurError(
                            f"{self._topic}-{partition} has states of accounts that Kafka's default"
                            f" partitioner puts elsewhere, with {before} partitions as with"
                            f" {after}: the producers use another one, which this command does not"
                            " know. Set RECUR_REDIS_KEY_PREFIX to a new prefix: all accounts then"
                            " start with no state"
                        )
                moving = [
                    account
                    for account, key in zip(accounts, keys, strict=True)
                    if partition_of(key, after) != partition
                ]
                stays += len(accounts) - len(moving)
                sound = await self._count_readable(partition, moving)
                moves += sound
                unreadable += len(moving) - sound
                seen += len(accounts)
                bar.show("checking states", seen, 0.0)
        return stays, moves, unreadable

    async def _count_readable(self, partition: int, accounts: list[str]) -> int:
        (reply,) = await self._store.load([Load(partition, accounts)])
        return int(self._codec.decode(reply.states)[1].sum())

    async def _move(self, after: int, states: int, bar: Bar) -> None:
        """Move states in groups: write them to the new partition, then delete the old ones."""
        seen = 0
        async with StateScan(self._settings) as scan:
            async for partition, accounts in scan.accounts(self._model):
                by_partition: dict[int, list[str]] = {}
                for account in accounts:
                    target = partition_of(account.encode(), after)
                    if target != partition:
                        by_partition.setdefault(target, []).append(account)
                for target, moving in by_partition.items():
                    await self._move_accounts(scan, partition, target, moving)
                seen += len(accounts)
                bar.show("moving states", seen, min(1.0, seen / max(1, states)))

    async def _move_accounts(
        self, scan: StateScan, source: int, target: int, accounts: list[str]
    ) -> None:
        (old,) = await self._store.load([Load(source, accounts)])
        (new,) = await self._store.load([Load(target, accounts)])
        states, loaded, _ = self._codec.decode(old.states)
        new_states, has_new, _ = self._codec.decode(new.states)
        states.first_offset[:] = states.last_offset[:] = ELSEWHERE
        # An account may have a state in both partitions. After an interrupted run they are equal.
        # After a worker ran, the one in the new partition lacks the account's history.
        wins = loaded & ~(has_new & (new_states.history.count >= states.history.count))
        rows = np.flatnonzero(wins)
        values = self._codec.encode(states, rows)
        names = [accounts[row] for row in rows.tolist()]
        await scan.copy(self._model, source, target, dict(zip(names, values, strict=True)))
        gone = [accounts[row] for row in np.flatnonzero(loaded).tolist()]
        await scan.delete(self._model, source, gone)

    async def _write_watermarks(self, marks: Mapping[int, Watermark], after: int) -> None:
        """Write watermarks with the new partition count: old ones unchanged, new ones at the begin.

        Raises:
            RecurError: a worker has written meanwhile.
        """
        logs = KafkaScoreLog(self._settings)
        await logs.start()
        try:
            for partition in range(after):
                (loaded,) = await self._store.load([Load(partition, [])])
                mark = marks.get(partition)
                if mark is not None:
                    new_mark = msgspec.structs.replace(
                        mark, partitions=after, writer=secrets.randbits(64)
                    )
                else:
                    scores = await logs.bounds(self._scores_topic, partition)
                    begin = (await logs.bounds(self._topic, partition)).begin
                    new_mark = Watermark(after, begin, scores.begin, secrets.randbits(64))
                new = new_mark.to_bytes()
                save = Save(partition, loaded.watermark, new, [], [])
                if not (await self._store.save([save]))[0]:
                    raise RecurError(
                        "a worker has saved meanwhile: stop all workers, and run the command again"
                    )
        finally:
            await logs.stop()


def describe(
    result: RepartitionResult | None, topic: str, scores_topic: str, dry_run: bool
) -> Iterator[str]:
    """Yield lines for a person to read."""
    if result is None:
        yield f"the states match the partition count of {topic}: there is nothing to move"
        return
    would = "would move" if dry_run else "moved"
    yield f"{topic} had {result.before} partitions and has {result.after}"
    yield f"  {result.moves:,} states {would}, {result.stays:,} stay"
    if result.unreadable:
        yield f"  {result.unreadable:,} states cannot be read: they count as absent, and expire"
    if result.stranded:
        yield (
            f"  {result.stranded:,} records of accounts that move are not applied in their old"
            " partitions: each is scored as if its account were new"
        )
    if result.scores_partitions < result.after:
        verb = "would get" if dry_run else "got"
        yield f"  {scores_topic} {verb} {result.after} partitions, too"
    if not dry_run:
        yield "start the workers; `recur verify` cannot check the histories of moved accounts"


async def repartition_lines(
    settings: Settings, *, dry_run: bool, accept_stranded: bool, console: Console
) -> Sequence[str]:
    """Run `recur state repartition`; return its output.

    Raises:
        RecurError: the states must not move; the message says why.
    """
    result = await Repartition(settings, console).run(
        dry_run=dry_run, accept_stranded=accept_stranded
    )
    topic, scores_topic = settings.topic("transactions"), settings.topic("scores")
    return list(describe(result, topic, scores_topic, dry_run))
