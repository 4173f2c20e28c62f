"""``recur state rekey``: states move to the partitions that their accounts' records now go to.

When the transactions topic gets more partitions, most accounts' records go to another one from
then on. Records that are written stay where they are, and so a moved account's history lies in
two logs. Its state goes on in the new one: it says that it began in another partition (first and
last offset -1), so that no offset of the old log is taken for one of the new.

Each account has to be in one place, so no worker may run meanwhile, and the records of accounts
that move must be applied in their old partitions. The watermarks are written last: until then
workers refuse to start, and the command may be run again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from rich.console import Console

from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.partition_reader import KafkaPartitionReader
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import add_partitions, group_members, partition_count, topic_ids
from pipeline.progress import Bar, bar_for
from pipeline.scoring.watermark_check import read_watermark
from pipeline.settings import Settings
from pipeline.storage.account_state import StateCodec
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_scan import StateScan
from pipeline.storage.state_store import Load, RedisStateStore, Save
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, is_other, other_log

READ_MOST = 8_192

ELSEWHERE = -1
"""The offset of a transaction that lies in another partition's log."""


@dataclass(frozen=True)
class RepartitionResult:
    """What was done, or would be.

    Attributes:
        before, after: partition counts.
        stays, moves: states.
        unreadable: states of another format, or damaged; they stay and expire.
        stranded: records of accounts that move which are not applied in their old partition.
        scores_partitions: of the scores topic, before.
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
        settings: the workers'.
        console: where progress is shown.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._topic = settings.topic("transactions")
        self._scores_topic = settings.topic("scores")
        checkpoint = load_checkpoint(settings)
        self._model = checkpoint.digest
        architecture = checkpoint.network.architecture
        self._codec = StateCodec(architecture.layers, architecture.hidden_size)
        self._store = RedisStateStore.from_settings(settings, self._model)

    async def run(self, *, dry_run: bool, accept_stranded: bool) -> RepartitionResult | None:
        """Move the states, and write the watermarks; None where there is nothing to do.

        Args:
            dry_run: only say what would be done.
            accept_stranded: go on although records of accounts that move are not applied.

        Raises:
            RecurError: it must not be done now, or Kafka or Redis does not answer.
        """
        try:
            return await self._run(dry_run, accept_stranded)
        except (StoreUnavailableError, LogUnavailableError) as error:
            raise RecurError(
                f"the states are not all moved ({error}): run the command again; until it is"
                " through no worker starts"
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
        with bar_for(self._console) as bar:
            stranded = await self._stranded(marks, before, after, bar)
            if stranded and not (dry_run or accept_stranded):
                raise RecurError(
                    f"{stranded} records of accounts that move are not applied in their old"
                    " partitions, and come there when the accounts are elsewhere. Give"
                    " --accept-stranded: each is scored as if its account were new. Or set"
                    " RECUR_REDIS_KEY_PREFIX to a new prefix, and all accounts begin anew"
                )
            found = await self._look(before, after, bar)
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
                f" has {after}: partitions were taken away, or added twice between two runs."
                " Set RECUR_REDIS_KEY_PREFIX to a new prefix, and all accounts begin anew"
            )
        if scores > after:
            raise RecurError(
                f"topic {self._scores_topic} has {scores} partitions and {self._topic} has"
                f" {after}: add partitions to {self._topic} first"
            )

    async def _stranded(
        self, marks: Mapping[int, Watermark], before: int, after: int, bar: Bar
    ) -> int:
        """Records past the watermarks whose accounts' records go elsewhere now."""
        stranded = 0
        for partition in range(before):
            start = marks[partition].next_offset if partition in marks else 0
            async with KafkaPartitionReader(
                self._settings, self._topic, partition, start
            ) as reader:
                end = (await reader.bounds()).end
                while records := await reader.read(end, READ_MOST):
                    stranded += sum(
                        partition_of(record.key, after) != partition
                        for record in records
                        if record.key is not None
                    )
                    left = end - reader.position
                    bar.show("reading what waits", reader.position, 1 - left / max(1, end))
        return stranded

    async def _look(self, before: int, after: int, bar: Bar) -> tuple[int, int, int]:
        """How many states stay, move and cannot be read.

        Raises:
            RecurError: states lie where Kafka's default partitioner does not put them.
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
                            " know. Set RECUR_REDIS_KEY_PREFIX to a new prefix, and all begin anew"
                        )
                moving = [
                    account
                    for account, key in zip(accounts, keys, strict=True)
                    if partition_of(key, after) != partition
                ]
                stays += len(accounts) - len(moving)
                sound = await self._sound(partition, moving)
                moves += sound
                unreadable += len(moving) - sound
                seen += len(accounts)
                bar.show("looking at states", seen, 0.0)
        return stays, moves, unreadable

    async def _sound(self, partition: int, accounts: list[str]) -> int:
        (reply,) = await self._store.load([Load(partition, accounts)])
        return int(self._codec.decode(reply.states)[1].sum())

    async def _move(self, after: int, states: int, bar: Bar) -> None:
        """Move states, a few at a time: each is written where it goes, and then deleted."""
        seen = 0
        async with StateScan(self._settings) as scan:
            async for partition, accounts in scan.accounts(self._model):
                by_place: dict[int, list[str]] = {}
                for account in accounts:
                    place = partition_of(account.encode(), after)
                    if place != partition:
                        by_place.setdefault(place, []).append(account)
                for place, moving in by_place.items():
                    await self._move_some(scan, partition, place, moving)
                seen += len(accounts)
                bar.show("moving states", seen, min(1.0, seen / max(1, states)))

    async def _move_some(
        self, scan: StateScan, source: int, target: int, accounts: list[str]
    ) -> None:
        (here,) = await self._store.load([Load(source, accounts)])
        (there,) = await self._store.load([Load(target, accounts)])
        states, loaded, _ = self._codec.decode(here.states)
        standing, stands, _ = self._codec.decode(there.states)
        states.first_offset[:] = states.last_offset[:] = ELSEWHERE
        # A state may be in both places: the command was cut off, and they are the same; or a
        # worker ran after the change, and the one there lacks the account's history.
        wins = loaded & ~(stands & (standing.history.count >= states.history.count))
        rows = np.flatnonzero(wins)
        values = self._codec.encode(states, rows)
        names = [accounts[row] for row in rows.tolist()]
        await scan.copy(self._model, source, target, dict(zip(names, values, strict=True)))
        gone = [accounts[row] for row in np.flatnonzero(loaded).tolist()]
        await scan.delete(self._model, source, gone)

    async def _write_watermarks(self, marks: Mapping[int, Watermark], after: int) -> None:
        """Of the new partition count: the old partitions' as they stand, the others at 0."""
        logs = KafkaScoreLog(self._settings)
        await logs.start()
        try:
            for partition in range(after):
                (loaded,) = await self._store.load([Load(partition, [])])
                mark = marks.get(partition)
                if mark is not None:
                    new_mark = replace(mark, partitions=after, writer=secrets.randbits(64))
                else:
                    scores = await logs.bounds(self._scores_topic, partition)
                    begin = (await logs.bounds(self._topic, partition)).begin
                    new_mark = Watermark(after, begin, scores.begin, secrets.randbits(64))
                new = new_mark.to_bytes()
                if not (await self._store.save([Save(partition, loaded.watermark, new, [], [])]))[
                    0
                ]:
                    raise RecurError(
                        "a worker has written meanwhile: stop all of them, and run the command"
                        " again"
                    )
        finally:
            await logs.stop()


def describe(
    result: RepartitionResult | None, topic: str, scores_topic: str, dry_run: bool
) -> Iterator[str]:
    """Lines for a person to read."""
    if result is None:
        yield f"the states are of the partitions that {topic} has: there is nothing to move"
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
        yield "start the workers; histories of moved accounts cannot be verified from the new logs"


async def rekey_lines(
    settings: Settings, *, dry_run: bool, accept_stranded: bool, console: Console
) -> Sequence[str]:
    """What `recur state rekey` prints, when it is done.

    Raises:
        RecurError: it must not be done; the message says why.
    """
    result = await Repartition(settings, console).run(
        dry_run=dry_run, accept_stranded=accept_stranded
    )
    topic, scores_topic = settings.topic("transactions"), settings.topic("scores")
    return list(describe(result, topic, scores_topic, dry_run))
