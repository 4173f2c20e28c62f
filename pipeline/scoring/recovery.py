"""Recovery that needs no command: after a loss in Redis, a rebalance or a worker's death.

All these cases look the same: the watermark in the store is not the expected one. The writer may
be a new owner or a zombie. Redis may have failed over to an older copy, or lost its data. The
worker takes the partition over from the watermark that it finds. It drops records before it,
reads the log back if the watermark is behind, and takes scores published past it from the scores
topic. Without any watermark it computes all states again from the start of the log.

Manual commands for damaged states are in :mod:`pipeline.admin`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pipeline.kafka.polls import Bounds, Record
from pipeline.kafka.producer import AppendResult, Transactions
from pipeline.kafka.score_log import LoggedScore, ScoreLog
from pipeline.scoring.consumer import PartitionConsumer
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.retry import Retrier
from pipeline.scoring.topic_id_cache import TopicIdCache
from pipeline.scoring.watermark_check import check_watermark, read_watermark
from pipeline.storage.state_store import Load, Save, StateStore
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID, is_other, log_of, other_log, shown

log = logging.getLogger(__name__)

RECOVERY_LOOKAHEAD = 20_000
"""Published scores are read this many source offsets ahead of the micro-batch."""

ALL_SOURCES = 2**62

ON_NEW_LOG = Literal["stop", "begin"]
"""Reaction to a topic that was deleted and created again."""


class PartitionRecovery:
    """Takeover of partitions from the watermarks in the store, and of scores published past them.

    Args:
        topic, scores_topic: full names.
        partitions: partition count of both.
        store, score_log, consumer: watermarks, published scores and committed offsets.
        writer: id of this worker in the watermarks that it writes, u64.
        transactions: transactions of exactly-once processing; None without them.
        on_new_log: reaction to a topic that was deleted and created again.
    """

    def __init__(
        self,
        *,
        topic: str,
        scores_topic: str,
        partitions: int,
        store: StateStore,
        score_log: ScoreLog,
        consumer: PartitionConsumer,
        retrier: Retrier,
        metrics: Metrics,
        writer: int,
        transactions: Transactions | None,
        on_new_log: ON_NEW_LOG,
    ) -> None:
        self._topic = topic
        self._scores_topic = scores_topic
        self._partitions = partitions
        self._store = store
        self._score_log = score_log
        self._consumer = consumer
        self._retrier = retrier
        self._metrics = metrics
        self._transactions = transactions
        self._on_new_log = on_new_log
        self.log_id = TopicIdCache(topic, score_log, retrier)
        self._scores_log_id = TopicIdCache(scores_topic, score_log, retrier)
        self._writer = writer
        # Number of publications of each partition. Bounds from before the last one are outdated.
        self._publications: Counter[int] = Counter()
        # A poll may outlive its assignment. If it finds no watermark, data was lost.
        self._ever_owned: set[int] = set()
        # The topic's id when fetching of each partition started.
        self.fetched_of: dict[int, bytes] = {}

    # take over ---------------------------------------------------------------------------

    async def take_over(
        self, partition: int, watermark: bytes | None, begin: int, *, is_assigned: bool
    ) -> OwnedPartition:
        """Take a partition over from its watermark, whichever worker wrote it.

        Args:
            watermark: the watermark in the store, or None.
            begin: begin of the first chunk: where a new group starts.
            is_assigned: whether the group assigned the partition to this worker.

        Raises:
            StartupError: states and log do not belong together.
        """
        producer_epoch = 0
        if self._transactions is not None and is_assigned:
            # This comes first: it commits or aborts the open transaction of the last owner.
            take = self._transactions.take
            producer_epoch = await self._retrier.retry_kafka(lambda: take(partition))
        committed = await self._retrier.retry_kafka(lambda: self._consumer.committed(partition))
        while watermark is None:
            is_new = committed is None and partition not in self._ever_owned
            watermark = await self._write_first_watermark(partition, begin if is_new else None)
        # Bounds are read after the watermark: then both logs reach at least as far as it says.
        watermark, log_id, bounds = await self._take_log(partition, watermark, committed)
        mark = read_watermark(self._topic, partition, watermark)
        scores_log_id = await self._scores_log_id.get(now=True)
        scores = await self._scores_bounds(partition)
        self._ever_owned.add(partition)
        check_watermark(self._topic, partition, mark, self._partitions, bounds.end)
        is_same = not is_other(mark.scores_log_id, scores_log_id)
        if not is_same:
            self._warn_new_scores_log(partition, mark.scores_log_id, scores_log_id)
        # An offset past the end belongs to a scores topic that was created again: read it all.
        is_in_log = is_same and scores.begin <= mark.scores_offset <= scores.end
        committed, stale_to = _committed_in_log(committed, log_id, bounds.end, mark.stale_to)
        owned = OwnedPartition(
            watermark=watermark,
            next_offset=mark.next_offset,
            scores_from=mark.scores_offset if is_in_log else scores.begin,
            scores_end=scores.end,
            committed=committed,
            producer_epoch=producer_epoch,
            log_id=log_id,
            scores_log_id=scores_log_id,
            scores_begin=mark.scores_begin if is_same else 0,
            stale_to=stale_to,
        )
        self._skip_deleted_records(partition, owned, bounds.begin)
        return owned

    async def _take_log(
        self, partition: int, watermark: bytes, committed: int | None
    ) -> tuple[bytes, bytes, Bounds]:
        """Start the current log if the watermark belongs to another one.

        Returns:
            the watermark that stands afterwards, the log's id and its bounds.

        Raises:
            StartupError: the settings say to stop.
        """
        while True:
            mark = read_watermark(self._topic, partition, watermark)
            log_id = await self.log_id.get(now=True)
            if is_other(mark.log_id, log_id):
                watermark = await self._start_new_log(partition, watermark, mark, log_id, committed)
                continue
            bounds = await self.bounds(partition)
            # If the topic was created again in between, the bounds belong to the next log.
            if not is_other(log_id, await self.log_id.get(now=True)):
                return watermark, log_id, bounds

    async def _write_first_watermark(self, partition: int, begin: int | None) -> bytes | None:
        """Write a watermark if there is none.

        Args:
            begin: its offset; None after a loss of data: the start of the log.

        Returns:
            the watermark that stands afterwards, whichever worker wrote it.
        """
        # The id is read before the bounds: then bounds of a later log are noticed.
        log_id = await self.log_id.get(now=True)
        if begin is not None and is_other(self.fetched_of.get(partition, NO_ID), log_id):
            begin = None  # the begin of a poll of an earlier log
        if begin is None:
            begin = (await self.bounds(partition)).begin
            log.error(
                "Redis lost the states of a partition; computing them again from its log",
                extra={"partition": partition, "from_offset": begin},
            )
        scores_log_id = await self._scores_log_id.get(now=True)
        scores = await self._bounds(self._scores_topic, partition)
        mark = Watermark(
            self._partitions,
            begin,
            scores.begin,
            self._writer,
            log_id,
            scores_log_id,
        ).to_bytes()
        await self._retrier.retry_redis(
            lambda: self._store.save([Save(partition, None, mark, [], [])])
        )
        return await self.standing_watermark(partition)

    async def _start_new_log(
        self,
        partition: int,
        watermark: bytes,
        mark: Watermark,
        log_id: bytes,
        committed: int | None,
    ) -> bytes:
        """Start states from a topic that was deleted and created again, or stop.

        Returns:
            the watermark that stands afterwards, whichever worker wrote it.

        Raises:
            StartupError: the settings say to stop.
        """
        if self._on_new_log == "stop":
            raise other_log(self._topic, mark.log_id, log_id)
        bounds = await self.bounds(partition)
        scores = await self._bounds(self._scores_topic, partition)
        scores_log_id = await self._scores_log_id.get(now=True)
        begin = Watermark(
            self._partitions,
            bounds.begin,
            scores.end,
            self._writer,
            log_id,
            scores_log_id,
            scores.end,
            # The committed offset may be ahead of a watermark that Redis set back.
            max(mark.next_offset, mark.stale_to, committed or 0),
        )
        if await self._retrier.retry_redis(
            partial(begin_log, self._store, partition, watermark, begin.to_bytes())
        ):
            log.warning(
                "the topic was deleted and created again: its states start from the new log",
                extra={
                    "topic": self._topic,
                    "partition": partition,
                    "id_then": shown(mark.log_id),
                    "id_now": shown(log_id),
                },
            )
        standing = await self.standing_watermark(partition)
        return begin.to_bytes() if standing is None else standing

    def _warn_new_scores_log(self, partition: int, known: bytes, found: bytes) -> None:
        log.warning(
            "the scores topic was deleted and created again: its scores are lost, and scores are"
            " recovered from its start",
            extra={
                "topic": self._scores_topic,
                "partition": partition,
                "id_then": shown(known),
                "id_now": shown(found),
            },
        )

    async def standing_watermark(self, partition: int) -> bytes | None:
        """Load the watermark that stands in the store."""
        (loaded,) = await self._retrier.retry_redis(lambda: self._store.load([Load(partition, [])]))
        return loaded.watermark

    # records deleted by retention --------------------------------------------------------

    async def skip_deleted_records(self, partition: int, owned: OwnedPartition) -> None:
        """Skip records that retention deleted before they were applied, and count them."""
        bounds = await self.bounds(partition)
        self._skip_deleted_records(partition, owned, bounds.begin)

    def _skip_deleted_records(self, partition: int, owned: OwnedPartition, log_begin: int) -> None:
        lost = owned.skip_to(log_begin)
        if lost:
            self._metrics.records_lost.inc(lost)
            log.error(
                "retention deleted records before they were applied; raise the topic's retention",
                extra={"partition": partition, "records": lost},
            )

    # published scores --------------------------------------------------------------------

    async def published_scores(
        self, partition: int, owned: OwnedPartition, records: Sequence[Record]
    ) -> dict[int, LoggedScore]:
        """Return the scores of these records that were published before, by offset."""
        if not records:
            return {}
        last = records[-1].offset
        unread = owned.unread_scores(last)
        if unread is not None:
            start, end = unread
            scores, position = await self._retrier.retry_kafka(
                lambda: self._score_log.read(partition, start, end, last + RECOVERY_LOOKAHEAD)
            )
            owned.add_read_scores(scores, position)
        return owned.published_scores(records)

    async def check_zombie_scores(
        self, partition: int, owned: OwnedPartition, appended: AppendResult, next_offset: int
    ) -> dict[int, LoggedScore]:
        """Read scores between this worker's own scores: a zombie published them.

        A zombie is a worker that still believes it owns the partition. Its scores of transactions
        from ``next_offset`` on were published first, so they are kept.

        Returns:
            the scores that were read, by source offset. They include this worker's own if it does
            not know where these stand.
        """
        self._publications[partition] += 1
        if appended.first is None or appended.next is None:
            end_now = (await self._bounds(self._scores_topic, partition)).end
            start, end = owned.note_appended(end_now, end_now)
        else:
            start, end = owned.note_appended(appended.first, appended.next)
        if end <= start:
            return {}
        scores, _ = await self._retrier.retry_kafka(
            lambda: self._score_log.read(partition, start, end, ALL_SOURCES)
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
        owned.keep_later_scores(later, start, end)
        return scores

    def next_watermark(
        self, owned: OwnedPartition, next_offset: int, appended: AppendResult | None
    ) -> Watermark:
        """Return the watermark to save once everything before ``next_offset`` is applied."""
        scores_from = owned.next_scores_from(
            next_offset, None if appended is None else appended.next
        )
        return Watermark(
            self._partitions,
            next_offset,
            scores_from,
            self._writer,
            owned.log_id,
            owned.scores_log_id,
            owned.scores_begin,
            owned.stale_to,
        )

    # bounds ------------------------------------------------------------------------------

    async def bounds(self, partition: int) -> Bounds:
        """Return the current bounds of a partition of the transactions topic."""
        return await self._bounds(self._topic, partition)

    async def _scores_bounds(self, partition: int) -> Bounds:
        """Return the bounds of a scores partition, with this worker's own late publications."""
        publications = -1
        while publications != self._publications[partition]:
            publications = self._publications[partition]
            scores = await self._bounds(self._scores_topic, partition)
        return scores

    async def _bounds(self, topic: str, partition: int) -> Bounds:
        return await self._retrier.retry_kafka(lambda: self._score_log.bounds(topic, partition))


async def begin_log(store: StateStore, partition: int, standing: bytes, mark: bytes) -> bool:
    """Start a partition's states from another log: delete the old states, then write the mark.

    Both steps are conditional writes, so no other writer is overtaken. If interrupted, the
    watermark still names the old log, and everything is repeated.

    Returns:
        whether the mark stands.

    Raises:
        StoreUnavailableError: the result is unknown; call again.
        StoreForbiddenError: Redis forbids its user to list keys.
    """
    async for places in store.accounts(partition):
        accounts = [account for place, account in places if place == partition]
        if accounts:
            gone = Save(partition, standing, standing, accounts, [None] * len(accounts))
            if not (await store.save([gone]))[0]:
                return False
    (stands,) = await store.save([Save(partition, standing, mark, [], [])])
    return stands


def _committed_in_log(
    committed: int | None, log_id: bytes, log_end: int, stale_to: int
) -> tuple[int | None, int]:
    """Return the committed offset if it certainly refers to this log, and the new ``stale_to``.

    A worker that outlived its topic may commit offsets of the earlier log late.
    """
    if committed is None or is_other(log_of(committed), log_id):
        return None, stale_to
    if committed > log_end:  # it refers to an earlier log, which was longer
        stale_to = max(stale_to, committed)
    return (None if committed <= stale_to else committed), stale_to
