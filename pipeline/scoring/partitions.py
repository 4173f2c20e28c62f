"""Which partitions the worker owns, and how far each one's states are its log.

All that can go wrong with a partition is one case: the watermark in the store is not the
expected one. A new owner, a zombie, a Redis that failed over to an older copy or lost its
data: the worker goes on from the watermark that it finds, drops what is before it, reads
the log back where it is behind, and takes what was published past it from the scores topic.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from time import monotonic
from typing import Literal, Protocol

from pipeline.errors import StartupError
from pipeline.kafka.producer import AppendResult, Transactions
from pipeline.kafka.score_log import Bounds, Kept, LogUnavailableError, ScoreLog
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.retry import Retrier
from pipeline.storage.state_store import Load, Save, StateStore
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, is_other, other_log, shown

log = logging.getLogger(__name__)

RECOVERY_LOOKAHEAD = 20_000
"""Published scores are read this many sources ahead of the micro-batch, offsets."""

ALL_SOURCES = 2**62

LOG_LOOK_SECONDS = 0.25
"""What is fetched is of the topic whose id was told so long ago at most. In less no topic is
deleted, made again and filled past where a worker is; one look costs as much as a small poll."""

ON_NEW_LOG = Literal["stop", "begin"]
"""What to do where the topic was deleted and made again."""


class Record(Protocol):
    """What the worker reads of a Kafka record."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Chunk:
    """A partition's part of a poll: every record of the log in [begin, end).

    Attributes:
        epoch: how often the partition had been sought back when it was fetched.
    """

    begin: int
    end: int
    records: Sequence[Record]
    epoch: int = 0


@dataclass
class Poll:
    """Everything one fetch returned.

    Attributes:
        chunks: by partition.
        applied: the offset that each partition may be committed to; filled when processed.
    """

    chunks: dict[int, Chunk]
    applied: dict[int, int] = field(default_factory=dict)


class TransactionLog(Protocol):
    """What the worker needs of its consumer besides polls."""

    async def committed(self, partition: int) -> int | None:
        """The group's committed offset; None for a group that has none.

        Raises:
            LogUnavailableError: the broker does not answer.
        """

    async def seek(self, partition: int, offset: int) -> int:
        """Read the partition from ``offset`` on, in polls to come; the epoch of those."""


@dataclass
class Recovery:
    """Scores published of transactions that are not applied, read in step with these.

    Attributes:
        position: offset in the scores partition to read on from.
        end: where the scores partition ended when it was taken.
        kept: by source offset: a lower bound of the score's own offset, and the score.
    """

    position: int
    end: int
    kept: dict[int, tuple[int, Kept]] = field(default_factory=dict)


@dataclass
class OwnedPartition:
    """What the worker knows of a partition that it works on.

    Attributes:
        watermark: its watermark's bytes, as they stand in the store.
        next_offset: the first offset that is not applied: its state is not saved.
        computed_to: the first offset whose state is not computed.
        scores_next: the next offset of its scores partition, if nobody else writes there.
        scores_from: scores of transactions from ``next_offset`` on stand from here on.
        alerts_from: alerts and rejections of records from here on are not published yet.
        committed: the group's offset when the partition was taken, and what we committed since.
        producer_epoch: under which we commit, where scores and offsets are committed together.
        log_id, scores_log_id: ids of the topics that the offsets are of.
        scores_begin: offset in its scores partition before which all is of another log.
        stale_to: offsets that the group committed up to here may be those of a log before.
        recovery: until all that was published is read.
        neighbour: the watermark before it; during a save, the one after it.
        states: values of accounts' states as computed, which the store has or will have once
            what is computed is saved (None: no state); the last used stand last.
        seeking: a seek to ``computed_to`` is under way.
    """

    watermark: bytes
    next_offset: int
    computed_to: int
    scores_next: int
    scores_from: int
    alerts_from: int
    recovery: Recovery | None
    committed: int
    producer_epoch: int
    log_id: bytes
    scores_log_id: bytes
    scores_begin: int
    stale_to: int
    neighbour: bytes | None = None
    states: dict[str, bytes | None] = field(default_factory=dict)
    seeking: bool = False

    def knows(self, watermark: bytes | None) -> bool:
        """Whether a watermark is the expected one, also while a save is under way."""
        return watermark is not None and watermark in (self.watermark, self.neighbour)

    def remember(self, accounts: Sequence[str], states: Sequence[bytes | None]) -> None:
        """Keep states that were computed."""
        held = self.states
        for account, state in zip(accounts, states, strict=True):
            held.pop(account, None)
            held[account] = state

    def forget_states(self, most: int) -> None:
        """Keep only the states used last."""
        for account in list(islice(self.states, max(0, len(self.states) - most))):
            del self.states[account]


class AsksIds(Protocol):
    """Knows topics' ids."""

    async def topic_id(self, topic: str) -> bytes | None:
        """A topic's id now; None where there is no such topic.

        Raises:
            LogUnavailableError: the broker does not answer.
        """


class LogId:
    """The id of a topic, as it is told now or was told a moment ago.

    Args:
        topic: full name.
        logs: is asked.
        retrier: waits for a broker that is away, and for a topic that is not there.
    """

    def __init__(self, topic: str, logs: AsksIds, retrier: Retrier) -> None:
        self._topic = topic
        self._logs = logs
        self._retrier = retrier
        self._told = NO_ID
        self._look_again_at = 0.0

    @property
    def told(self) -> bytes:
        """The id as it was told last; :data:`NO_ID` before it was asked for."""
        return self._told

    async def look(self, *, now: bool) -> bytes:
        """The id; one that was told :data:`LOG_LOOK_SECONDS` ago will do, unless ``now``."""
        if now or monotonic() >= self._look_again_at:
            look_again_at = monotonic() + LOG_LOOK_SECONDS
            self._told = await self._retrier.retry_kafka(self._ask)
            self._look_again_at = look_again_at
        return self._told

    async def _ask(self) -> bytes:
        found = await self._logs.topic_id(self._topic)
        if found is None:
            raise LogUnavailableError(f"there is no topic {self._topic}")
        return found


class PartitionManager:
    """The partitions that the group gave this worker.

    Args:
        topic, scores_topic: full names.
        partitions: partition count of both.
        store, score_log, transaction_log: where watermarks, scores and positions are.
        transactions: where scores and offsets are committed together; None where they are not.
        on_fenced: called with a partition that turned out to be another worker's.
        on_new_log: what to do where the topic was deleted and made again.
    """

    def __init__(
        self,
        *,
        topic: str,
        scores_topic: str,
        partitions: int,
        store: StateStore,
        score_log: ScoreLog,
        transaction_log: TransactionLog,
        retrier: Retrier,
        metrics: Metrics,
        transactions: Transactions | None = None,
        on_fenced: Callable[[int], None] = lambda partition: None,
        on_new_log: ON_NEW_LOG = "stop",
    ) -> None:
        self._topic = topic
        self._scores_topic = scores_topic
        self._partitions = partitions
        self._store = store
        self._score_log = score_log
        self._transaction_log = transaction_log
        self._retrier = retrier
        self._metrics = metrics
        self._transactions = transactions
        self._on_fenced = on_fenced
        self._on_new_log = on_new_log
        self._log = LogId(topic, score_log, retrier)
        self._scores_log = LogId(scores_topic, score_log, retrier)
        self._writer = secrets.randbits(64)
        self._assigned: set[int] = set()
        self._owned: dict[int, OwnedPartition] = {}
        # How often scores of each partition were published: what was known before is not all.
        self._publications: Counter[int] = Counter()
        # A poll may outlive its assignment: what it finds gone was there all the same.
        self._ever_owned: set[int] = set()
        # The topic's id when what is fetched of each partition now began to be fetched, and the
        # epoch of that: what is older may be of a log before.
        self._fetched_of: dict[int, bytes] = {}
        self._epochs: dict[int, int] = {}

    async def look_at_log(self) -> None:
        """Learn the topic's id before anything is fetched of it."""
        await self._log.look(now=True)

    def assign(self, partitions: Collection[int]) -> None:
        """The group gave these partitions, and no others."""
        self._assigned = set(partitions)
        # Kept from assignments before this one, whose chunks may still be worked on.
        for partition in partitions:
            if self._fetched_of.get(partition, NO_ID) == NO_ID:
                self._fetched_of[partition] = self._log.told
        for partition in [p for p in self._owned if p not in self._assigned]:
            del self._owned[partition]

    def revoke(self, partitions: Collection[int]) -> None:
        """The group took these partitions away."""
        self._assigned.difference_update(partitions)
        for partition in partitions:
            self._owned.pop(partition, None)

    def fenced(self, partition: int, owned: OwnedPartition) -> None:
        """Another has taken the partition: it is not ours until the group gives it again."""
        if self.owns(partition, owned):
            self._metrics.fenced.inc()
            self.revoke([partition])
            self._on_fenced(partition)

    def owned(self, partition: int) -> OwnedPartition | None:
        """What is known of a partition that is worked on."""
        return self._owned.get(partition)

    def owns(self, partition: int, owned: OwnedPartition | None) -> bool:
        """Whether the partition is still owned as it was then."""
        return owned is not None and self._owned.get(partition) is owned

    def is_assigned(self, partition: int) -> bool:
        """Whether the group gave the partition to this worker."""
        return partition in self._assigned

    def assigned(self) -> set[int]:
        """The partitions that the group gave."""
        return set(self._assigned)

    def next_offsets(self) -> dict[int, int]:
        """The first offset that is not applied, of each partition worked on."""
        return {partition: owned.next_offset for partition, owned in self._owned.items()}

    async def accept(
        self, partition: int, chunk: Chunk, watermark: bytes | None
    ) -> OwnedPartition | None:
        """Take the partition for a chunk, given the watermark loaded with its states.

        Returns:
            the partition, or None where the chunk does not continue its states: then the
            log is read back to where they are.

        Raises:
            StartupError: states and log do not belong together.
        """
        owned = self._owned.get(partition)
        if owned is None or not owned.knows(watermark):
            if owned is not None:
                self._metrics.watermark_conflicts.inc()
            owned = await self._assume(partition, watermark, chunk.begin)
        # Offsets that go back are a log that begins again, or a redelivery: not to be dropped
        # as applied before it is known which.
        elif is_other(owned.log_id, await self._log.look(now=chunk.begin < owned.computed_to)):
            owned = await self._assume(partition, watermark, chunk.begin)
        if not await self._is_of_log(partition, owned, chunk):
            return None
        if chunk.begin > owned.computed_to:
            await self.seek_back(partition, owned)
            return None
        owned.seeking = False
        if chunk.records and chunk.records[0].offset > owned.computed_to:
            await self._notice_lost_records(partition, owned)
        return owned

    async def _is_of_log(self, partition: int, owned: OwnedPartition, chunk: Chunk) -> bool:
        """Whether a chunk is surely of the log that its partition is owned of, else it is fetched
        again: one that was fetched before the log was made again may have any of its offsets.
        """
        if self._fetched_of.get(partition, NO_ID) not in (NO_ID, owned.log_id):
            self._fetched_of[partition] = owned.log_id
            owned.seeking = True
            self._epochs[partition] = await self._transaction_log.seek(partition, owned.computed_to)
            return False
        return chunk.epoch >= self._epochs.get(partition, 0)

    async def published(
        self, partition: int, owned: OwnedPartition, records: Sequence[Record]
    ) -> dict[int, Kept]:
        """Scores that were published of these records before, by offset."""
        recovery = owned.recovery
        if recovery is None or not records:
            return {}
        last = records[-1].offset
        if max(recovery.kept, default=-1) < last and recovery.position < recovery.end:
            start = recovery.position
            kept, recovery.position = await self._retrier.retry_kafka(
                lambda: self._score_log.read(
                    partition, start, recovery.end, last + RECOVERY_LOOKAHEAD
                )
            )
            for source, score in kept.items():
                _, first = found_before = recovery.kept.setdefault(source, (start, score))
                if first is not score:
                    recovery.kept[source] = found_before[0], first.and_then(score)
        found = recovery.kept
        return {r.offset: found[r.offset][1] for r in records if r.offset in found}

    async def notice_foreign_scores(
        self, partition: int, owned: OwnedPartition, appended: AppendResult, next_offset: int
    ) -> None:
        """Read what stands between our scores: its writer thinks it owns the partition.

        Its scores of transactions from ``next_offset`` on are the first ones, and are kept.
        """
        self._publications[partition] += 1
        expected = owned.scores_next
        if appended.first is None or appended.next is None:
            bounds = await self._bounds(self._scores_topic, partition)
            owned.scores_next = end = bounds.end
        else:
            owned.scores_next, end = appended.next, appended.first
        if end <= expected:
            return
        scores, _ = await self._retrier.retry_kafka(
            lambda: self._score_log.read(partition, expected, end, ALL_SOURCES)
        )
        if scores and appended.first is not None:
            self._metrics.zombie_scores.inc(len(scores))
            log.warning(
                "another worker published scores of this partition",
                extra={"partition": partition, "scores": len(scores)},
            )
        later = {
            source: replace(score, is_recent=True)
            for source, score in scores.items()
            if source >= next_offset
        }
        if later:
            owned.recovery = owned.recovery or Recovery(end, end)
            for source, score in later.items():
                owned.recovery.kept.setdefault(source, (expected, score))

    def watermark_at(
        self, owned: OwnedPartition, next_offset: int, appended: AppendResult | None
    ) -> Watermark:
        """The watermark to save once everything before ``next_offset`` is applied."""
        if owned.recovery is not None:
            owned.scores_from = _recovered_to(owned, owned.recovery, next_offset)
        elif appended is not None and appended.next is not None:
            owned.scores_from = appended.next
        return Watermark(
            self._partitions,
            next_offset,
            owned.scores_from,
            self._writer,
            owned.log_id,
            owned.scores_log_id,
            owned.scores_begin,
            owned.stale_to,
        )

    async def follow(self, partition: int, owned: OwnedPartition, chunk: Chunk) -> None:
        """The watermark was another at the save, and nothing was written: go on from it."""
        if partition not in self._owned:
            return  # revoked
        # Even if the next poll has seen it already: that does not know what was published since.
        self._metrics.watermark_conflicts.inc()
        log.warning(
            "the watermark is not the expected one; going on from the one that stands",
            extra={"partition": partition},
        )
        standing = await self._standing(partition)
        owned = await self._assume(partition, standing, chunk.begin)
        await self.seek_back(partition, owned)

    async def seek_back(self, partition: int, owned: OwnedPartition) -> None:
        """Have the partition read again from where its states are."""
        if not owned.seeking:
            owned.seeking = True
            await self._transaction_log.seek(partition, owned.computed_to)

    async def _assume(self, partition: int, watermark: bytes | None, begin: int) -> OwnedPartition:
        """Take a partition as its watermark tells, whoever wrote that."""
        producer_epoch = 0
        if self._transactions is not None and partition in self._assigned:
            # Before all else is asked for: what was under way is committed then, or never is.
            take = self._transactions.take
            producer_epoch = await self._retrier.retry_kafka(lambda: take(partition))
        committed = await self._retrier.retry_kafka(
            lambda: self._transaction_log.committed(partition)
        )
        while watermark is None:
            is_new = committed is None and partition not in self._ever_owned
            watermark = await self._write_first_watermark(
                partition, begin if is_new else None, committed
            )
        mark = read_watermark(self._topic, partition, watermark)
        log_id = await self._log.look(now=True)
        while is_other(mark.log_id, log_id):
            watermark = await self._begin_new_log(partition, watermark, mark, log_id, committed)
            mark = read_watermark(self._topic, partition, watermark)
            log_id = await self._log.look(now=True)
        scores_log_id = await self._scores_log.look(now=True)
        # Asked for after the watermark is known: both logs reach at least as far as it says.
        bounds = await self._bounds(self._topic, partition)
        publications = -1
        while publications != self._publications[partition]:  # our own, of a poll before
            publications = self._publications[partition]
            scores = await self._bounds(self._scores_topic, partition)
        self._ever_owned.add(partition)
        check_watermark(self._topic, partition, mark, self._partitions, bounds.end)
        if is_other(mark.scores_log_id, scores_log_id):
            log.warning(
                "the scores topic was deleted and made again: what it held of transactions is"
                " gone, and scores are recovered from its begin",
                extra={
                    "topic": self._scores_topic,
                    "partition": partition,
                    "id_then": shown(mark.scores_log_id),
                    "id_now": shown(scores_log_id),
                },
            )
        # Past the end: the scores topic was recreated, and all that it holds is of since then.
        is_same = not is_other(mark.scores_log_id, scores_log_id)
        in_log = is_same and scores.begin <= mark.scores_offset <= scores.end
        recovery = Recovery(mark.scores_offset if in_log else scores.begin, scores.end)
        if committed is not None and committed <= mark.stale_to:
            committed = None  # of a log before this one, perhaps
        owned = OwnedPartition(
            watermark=watermark,
            next_offset=mark.next_offset,
            computed_to=mark.next_offset,
            scores_next=scores.end,
            scores_from=recovery.position,
            alerts_from=max(mark.next_offset, committed or 0),
            recovery=recovery if recovery.position < recovery.end else None,
            committed=committed or 0,
            producer_epoch=producer_epoch,
            log_id=log_id,
            scores_log_id=scores_log_id,
            scores_begin=mark.scores_begin if is_same else 0,
            stale_to=mark.stale_to,
        )
        if bounds.begin > owned.computed_to:
            self._lose_records(partition, owned, bounds.begin)
        if partition in self._assigned:
            self._owned[partition] = owned
        return owned

    async def _write_first_watermark(
        self, partition: int, begin: int | None, committed: int | None
    ) -> bytes | None:
        """Write a watermark where there is none, at the log's begin if at no other offset.

        Returns:
            what stands afterwards, whoever wrote it.
        """
        if begin is None:
            begin = (await self._bounds(self._topic, partition)).begin
            log.error(
                "no states in Redis for a partition that was worked on; replaying its log",
                extra={"partition": partition, "from_offset": begin},
            )
        log_id = await self._log.look(now=True)
        scores_log_id = await self._scores_log.look(now=True)
        scores = await self._bounds(self._scores_topic, partition)
        stale_to = 0
        if committed is not None and committed > (await self._bounds(self._topic, partition)).end:
            stale_to = committed  # of a log before this one, which ends earlier
        mark = Watermark(
            self._partitions,
            begin,
            scores.begin,
            self._writer,
            log_id,
            scores_log_id,
            stale_to=stale_to,
        ).to_bytes()
        await self._retrier.retry_redis(
            lambda: self._store.save([Save(partition, None, mark, [], [])])
        )
        return await self._standing(partition)

    async def see_log(self) -> None:
        """See that the topic is the one that the states are of, though nothing comes of it.

        Raises:
            StartupError: it is another, and the settings say to stop then.
        """
        owned = dict(self._owned)
        if not owned:
            return
        try:
            found = await self._score_log.topic_id(self._topic)
        except LogUnavailableError:
            return
        if found is None:  # gone, for which nobody waits here
            return
        for partition, known in owned.items():
            if is_other(known.log_id, found) and self.owns(partition, known):
                if self._on_new_log == "stop":
                    raise other_log(self._topic, known.log_id, found)
                # Whatever comes next is a reason to look at the watermark.
                begin = (await self._bounds(self._topic, partition)).begin
                if self.owns(partition, known):
                    del self._owned[partition]
                    await self._transaction_log.seek(partition, begin)

    async def _begin_new_log(
        self,
        partition: int,
        watermark: bytes,
        mark: Watermark,
        log_id: bytes,
        committed: int | None,
    ) -> bytes:
        """The topic was deleted and made again: begin its states, or stop.

        Returns:
            the watermark that stands then, whoever wrote it.

        Raises:
            StartupError: the settings say to stop.
        """
        if self._on_new_log == "stop":
            raise other_log(self._topic, mark.log_id, log_id)
        bounds = await self._bounds(self._topic, partition)
        scores = await self._bounds(self._scores_topic, partition)
        scores_log_id = await self._scores_log.look(now=True)
        begin = Watermark(
            self._partitions,
            bounds.begin,
            scores.end,
            self._writer,
            log_id,
            scores_log_id,
            scores.end,
            # What the group committed may be further than a watermark that Redis took back.
            max(mark.next_offset, mark.stale_to, committed or 0),
        )
        if await self._retrier.retry_redis(
            partial(begin_log, self._store, partition, watermark, begin.to_bytes())
        ):
            log.warning(
                "the topic was deleted and made again: its states begin anew from it",
                extra={
                    "topic": self._topic,
                    "partition": partition,
                    "id_then": shown(mark.log_id),
                    "id_now": shown(log_id),
                },
            )
        standing = await self._standing(partition)
        return begin.to_bytes() if standing is None else standing

    async def _standing(self, partition: int) -> bytes | None:
        (loaded,) = await self._retrier.retry_redis(
            lambda: self._store.load([Load(partition, [])])
        )
        return loaded.watermark

    async def _bounds(self, topic: str, partition: int) -> Bounds:
        return await self._retrier.retry_kafka(lambda: self._score_log.bounds(topic, partition))

    async def _notice_lost_records(self, partition: int, owned: OwnedPartition) -> None:
        bounds = await self._bounds(self._topic, partition)
        if bounds.begin > owned.computed_to:
            self._lose_records(partition, owned, bounds.begin)

    def _lose_records(self, partition: int, owned: OwnedPartition, log_begin: int) -> None:
        lost = log_begin - owned.computed_to
        self._metrics.records_lost.inc(lost)
        log.error(
            "retention deleted records before they were applied; raise the topic's retention",
            extra={"partition": partition, "records": lost},
        )
        owned.computed_to = log_begin


async def begin_log(store: StateStore, partition: int, standing: bytes, mark: bytes) -> bool:
    """Begin a partition's states from another log: those of the log before go first.

    Both is done only while the watermark is the one that stands: whoever else writes is not
    overtaken. Cut off, the log before is still the watermark's, and all is done again.

    Returns:
        whether the mark stands.

    Raises:
        StoreUnavailableError: nobody knows; ask again.
        StoreForbiddenError: Redis does not allow its user to list keys.
    """
    async for places in store.accounts(partition):
        accounts = [account for place, account in places if place == partition]
        if accounts:
            gone = Save(partition, standing, standing, accounts, [None] * len(accounts))
            if not (await store.save([gone]))[0]:
                return False
    (stands,) = await store.save([Save(partition, standing, mark, [], [])])
    return stands


def _recovered_to(owned: OwnedPartition, recovery: Recovery, next_offset: int) -> int:
    """Where the published scores of transactions from ``next_offset`` on begin."""
    for source in [source for source in recovery.kept if source < next_offset]:
        del recovery.kept[source]
    if not recovery.kept and recovery.position >= recovery.end:
        owned.recovery = None
        return owned.scores_next
    return min((start for start, _ in recovery.kept.values()), default=recovery.position)


def read_watermark(topic: str, partition: int, value: bytes) -> Watermark:
    """A watermark of the store.

    Raises:
        StartupError: this version cannot read it; the message says what to do.
    """
    try:
        return Watermark.from_bytes(value)
    except ValueError as error:
        raise StartupError(
            f"the watermark of {topic}-{partition} is {error}, perhaps of a newer version: set "
            "RECUR_REDIS_KEY_PREFIX to a new prefix"
        ) from error


def check_watermark(
    topic: str,
    partition: int,
    mark: Watermark,
    partitions: int,
    log_end: int,
    log_id: bytes = NO_ID,
) -> None:
    """States and log belong together.

    Args:
        log_id: the topic's id now.

    Raises:
        StartupError: they do not; the message says what to do.
    """
    if is_other(mark.log_id, log_id):
        raise other_log(topic, mark.log_id, log_id)
    if mark.partitions != partitions:
        raise StartupError(
            f"the states in Redis were written when {topic} had {mark.partitions} partitions; it "
            f"has {partitions}, so accounts lie elsewhere: run `recur state rekey`, which moves "
            "their states. Or set RECUR_REDIS_KEY_PREFIX to a new prefix, and all begin anew"
        )
    if mark.next_offset > log_end:
        raise StartupError(
            f"the states in Redis are past the end of {topic}-{partition} (offset "
            f"{mark.next_offset}, the log ends at {log_end}): the topic was recreated or "
            "truncated. Run `recur state rebuild --all` to compute the states from the log as it "
            "is, or set RECUR_REDIS_KEY_PREFIX to a new prefix to begin anew"
        )
