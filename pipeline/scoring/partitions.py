"""Partitions that this worker owns: assignment, revocation, and the order of chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from pipeline.kafka.polls import Chunk, LogUnavailableError
from pipeline.kafka.producer import Transactions
from pipeline.kafka.score_log import ScoreLog
from pipeline.scoring.consumer import PartitionConsumer
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.ownership import ChunkDecision, ChunkFacts, decide_chunk
from pipeline.scoring.recovery import ON_NEW_LOG, PartitionRecovery
from pipeline.scoring.retry import Retrier
from pipeline.storage.state_store import StateStore
from pipeline.topic_id import NO_ID, is_other, other_log

log = logging.getLogger(__name__)


class PartitionManager:
    """The partitions that the group assigned to this worker.

    Args:
        topic, scores_topic: full names.
        partitions: partition count of both.
        store, score_log, consumer: watermarks, published scores, committed offsets and seeks.
        retrier: repeats calls to services that do not answer.
        metrics: monitoring.
        writer: id of this worker in the watermarks that it writes, u64.
        transactions: transactions of exactly-once processing; None without them.
        on_fenced: called with a partition that another worker took.
        on_new_log: reaction to a topic that was deleted and created again.

    Attributes:
        recovery: takes partitions over.
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
        transactions: Transactions | None = None,
        on_fenced: Callable[[int], None] = lambda partition: None,
        on_new_log: ON_NEW_LOG = "stop",
    ) -> None:
        self._topic = topic
        self._score_log = score_log
        self._consumer = consumer
        self._metrics = metrics
        self._on_fenced = on_fenced
        self._on_new_log = on_new_log
        self.recovery = PartitionRecovery(
            topic=topic,
            scores_topic=scores_topic,
            partitions=partitions,
            store=store,
            score_log=score_log,
            consumer=consumer,
            retrier=retrier,
            metrics=metrics,
            writer=writer,
            transactions=transactions,
            on_new_log=on_new_log,
        )
        self._log_id = self.recovery.log_id
        self._assigned: set[int] = set()
        self._owned: dict[int, OwnedPartition] = {}
        self._fetched_of = self.recovery.fetched_of
        # Epoch of the last seek of each partition. An older chunk may belong to an earlier log.
        self._epochs: dict[int, int] = {}

    async def learn_topic_id(self) -> None:
        """Learn the topic's id before the first fetch."""
        await self._log_id.get(now=True)

    # assignment --------------------------------------------------------------------------

    def assign(self, partitions: Collection[int]) -> None:
        """Take exactly these partitions, as the group assigned them."""
        self._assigned = set(partitions)
        # Ids of earlier assignments stay: chunks of these may still be processed.
        for partition in partitions:
            if self._fetched_of.get(partition, NO_ID) == NO_ID:
                self._fetched_of[partition] = self._log_id.last
        for partition in [p for p in self._owned if p not in self._assigned]:
            del self._owned[partition]

    def revoke(self, partitions: Collection[int]) -> None:
        """Give up partitions that the group revoked."""
        self._assigned.difference_update(partitions)
        for partition in partitions:
            self._owned.pop(partition, None)

    def fenced(self, partition: int, owned: OwnedPartition) -> None:
        """Give up a partition that another worker took, until the group assigns it again."""
        if self.owns(partition, owned):
            self._metrics.fenced.inc()
            self.revoke([partition])
            self._on_fenced(partition)

    def owned(self, partition: int) -> OwnedPartition | None:
        """Return an owned partition, or None."""
        return self._owned.get(partition)

    def owns(self, partition: int, owned: OwnedPartition | None) -> bool:
        """Return whether the partition is still owned, without a takeover since."""
        return owned is not None and self._owned.get(partition) is owned

    def is_assigned(self, partition: int) -> bool:
        """Return whether the group assigned the partition to this worker."""
        return partition in self._assigned

    def assigned(self) -> set[int]:
        """Return the assigned partitions."""
        return set(self._assigned)

    def next_offsets(self) -> dict[int, int]:
        """Return the first offset that is not applied, of each owned partition."""
        return {partition: owned.next_offset for partition, owned in self._owned.items()}

    # chunks ------------------------------------------------------------------------------

    async def accept(
        self, partition: int, chunk: Chunk, watermark: bytes | None
    ) -> OwnedPartition | None:
        """Accept a chunk if it continues the partition's states.

        Args:
            watermark: the watermark that was loaded with the states.

        Returns:
            the partition, or None if the chunk does not continue its states: then the log is
            read back to them.

        Raises:
            StartupError: states and log do not belong together.
        """
        owned = self._owned.get(partition)
        if owned is None or not owned.expects(watermark):
            facts = ChunkFacts("not owned" if owned is None else "other")
        else:
            # Offsets that go back are a redelivery or a new log. Find out which before dropping
            # them.
            log_id = await self._log_id.get(now=chunk.begin < owned.computed_to)
            facts = self._facts(
                partition, owned, chunk, is_other_log=is_other(owned.log_id, log_id)
            )
        decision = decide_chunk(facts)
        if decision is ChunkDecision.TAKE_OVER:
            if facts.watermark == "other":
                self._metrics.watermark_conflicts.inc()
            owned = await self._take_over(partition, watermark, chunk.begin)
            decision = decide_chunk(self._facts(partition, owned, chunk))
        assert owned is not None
        if decision is ChunkDecision.FETCH_AGAIN:
            await self._fetch_again(partition, owned)
        elif decision is ChunkDecision.SEEK_BACK:
            await self.seek_back(partition, owned)
        elif decision is ChunkDecision.SKIP_DELETED:
            owned.arrived()
            await self.recovery.skip_deleted_records(partition, owned)
            return owned
        elif decision is ChunkDecision.CONTINUE:
            owned.arrived()
            return owned
        return None

    def _facts(
        self, partition: int, owned: OwnedPartition, chunk: Chunk, *, is_other_log: bool = False
    ) -> ChunkFacts:
        """Gather the facts about a chunk of an owned partition whose watermark is expected.

        A chunk fetched before the topic was created again may have any of the new offsets.
        """
        fetched_of = self._fetched_of.get(partition, NO_ID)
        end = owned.computed_to
        return ChunkFacts(
            "expected",
            is_other_log,
            fetched_of not in (NO_ID, owned.log_id),
            chunk.epoch < self._epochs.get(partition, 0),
            chunk.begin > end,
            bool(chunk.records) and chunk.records[0].offset > end,
        )

    async def _take_over(
        self, partition: int, watermark: bytes | None, begin: int
    ) -> OwnedPartition:
        """Take a partition over, and own it if it is assigned."""
        owned = await self.recovery.take_over(
            partition, watermark, begin, is_assigned=partition in self._assigned
        )
        if partition in self._assigned:
            self._owned[partition] = owned
        return owned

    async def _fetch_again(self, partition: int, owned: OwnedPartition) -> None:
        """Fetch the partition again from where its states end, and drop older chunks."""
        self._fetched_of[partition] = owned.log_id
        owned.start_seek()
        self._epochs[partition] = await self._consumer.seek(partition, owned.computed_to)

    async def seek_back(self, partition: int, owned: OwnedPartition) -> None:
        """Read the partition again from where its states end, unless this is under way."""
        if owned.start_seek():
            await self._consumer.seek(partition, owned.computed_to)

    async def recover_from_conflict(
        self, partition: int, owned: OwnedPartition, chunk: Chunk
    ) -> None:
        """Continue from the standing watermark after a save found another than expected."""
        if partition not in self._owned:
            return  # revoked
        # The next poll may know the watermark already, but not the scores published since.
        self._metrics.watermark_conflicts.inc()
        log.warning(
            "the watermark is not the expected one; continuing from the one in Redis",
            extra={"partition": partition},
        )
        standing = await self.recovery.standing_watermark(partition)
        owned = await self._take_over(partition, standing, chunk.begin)
        await self.seek_back(partition, owned)

    async def check_topic_id(self) -> None:
        """Check that the topic is the one of the states, even if no records come.

        Raises:
            StartupError: it is another topic, and the settings say to stop.
        """
        owned = dict(self._owned)
        if not owned:
            return
        try:
            found = await self._score_log.topic_id(self._topic)
        except LogUnavailableError:
            return
        if found is None:  # deleted; the topic watcher waits for it
            return
        for partition, known in owned.items():
            if is_other(known.log_id, found) and self.owns(partition, known):
                if self._on_new_log == "stop":
                    raise other_log(self._topic, known.log_id, found)
                # The seek makes a chunk come, and with it a check of the watermark.
                begin = (await self.recovery.bounds(partition)).begin
                if self.owns(partition, known):
                    del self._owned[partition]
                    await self._consumer.seek(partition, begin)
