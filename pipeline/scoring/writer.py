"""Second half of processing a poll: publish → save → reply → ack."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from model.features.merchant import BUCKET_MS
from model.features.spec import FeatureSpec
from model.units import DAY_MS
from pipeline.kafka.polls import Poll
from pipeline.kafka.producer import AppendResult, PartOutput, Publisher, Transactions
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.replies import Reply
from pipeline.scoring.answers import answer_all, messages_of
from pipeline.scoring.dead_letter import ThrottledWarning
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics, add
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.retry import Retrier
from pipeline.scoring.stages import ComputedPoll, DecidedPart
from pipeline.settings import Settings
from pipeline.storage.client import StoreForbiddenError, StoreUnavailableError
from pipeline.storage.poll_store import PollStore
from pipeline.storage.state_store import Save
from pipeline.timestamps import is_record_time
from pipeline.topic_id import LogOffset

log = logging.getLogger(__name__)

MAX_LATENCY_AGE_MS = DAY_MS
"""An older record belongs to a copied log: its age says nothing about latency."""


class PollWriter:
    """Writer of computed polls: records to Kafka, then states to the store.

    Args:
        settings: limits and names.
        features: the checkpoint's features.
        store: account states and merchants' profiles.
        publisher: publishes scores, alerts and dead letters.
        transactions: publishes them together with the group's offsets instead; None to publish
            and acknowledge.
        partitions: the owned partitions and their progress.
        retrier: repeats calls to services that do not answer.
        metrics, health: monitoring.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        features: FeatureSpec,
        store: PollStore,
        publisher: Publisher,
        transactions: Transactions | None,
        partitions: PartitionManager,
        retrier: Retrier,
        metrics: Metrics,
        health: Health,
        clock_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._transactions = transactions
        self._partitions = partitions
        self._retrier = retrier
        self._metrics = metrics
        self._health = health
        self._clock_ms = clock_ms
        self._writes_notes = settings.update_merchant_profiles
        self._counts_merchants = self._writes_notes and features.uses_merchants
        self._topic = settings.topic("transactions")
        self._tolerance_ms = int(settings.timestamp_tolerance_seconds * 1000)
        self._conflicts = ThrottledWarning("a transaction id came again with another content")
        self._state_cache_size = settings.state_cache_size
        self._micro_batch_max = settings.micro_batch_max
        # Gateway and reply of each answer that is saved, but not published yet.
        self._replies: list[tuple[str, Reply]] = []

    async def conclude(self, computed: ComputedPoll) -> None:
        """Run the steps publish, save and ack.

        Polls are concluded one at a time, in order; the next one may be computed meanwhile.
        """
        # Meanwhile a rebalance may have revoked partitions, or a save met another watermark.
        parts = [p for p in computed.parts if self._partitions.owns(p.partition, p.owned)]
        if not parts:
            self._ack(computed.poll, ())
            return
        with self._metrics.timed("publish"):
            parts, appended = await self._publish(parts)
        if not parts:
            return
        self._observe(computed)
        with self._metrics.timed("save"):
            saved = await self._save(parts, appended)
        if self._replies:
            await self._reply()
        with self._metrics.timed("ack"):
            self._ack(computed.poll, saved)

    # publish -----------------------------------------------------------------------------

    async def _publish(
        self, parts: list[DecidedPart]
    ) -> tuple[list[DecidedPart], dict[int, AppendResult]]:
        """Publish scores, alerts and dead letters.

        Returns:
            the parts that are still owned, and where the scores of each partition went.
        """
        if self._transactions is not None:
            return await self._commit(parts, self._transactions)
        return parts, await self._publisher.publish(
            {part.partition: part.scores for part in parts if part.scores},
            [alert for part in parts for alert in part.alerts],
            [dead_letter for part in parts for dead_letter in part.dead_letters],
        )

    async def _commit(
        self, parts: list[DecidedPart], transactions: Transactions
    ) -> tuple[list[DecidedPart], dict[int, AppendResult]]:
        """Commit a Kafka transaction for each part with output or progress."""
        outputs = {}
        for part in parts:
            owned = part.owned
            has_output = part.scores or part.alerts or part.dead_letters
            if has_output or part.end > owned.committed:
                outputs[part.partition] = PartOutput(
                    part.scores,
                    part.alerts,
                    part.dead_letters,
                    LogOffset(max(part.end, owned.committed), owned.log_id),
                    owned.producer_epoch,
                )
        committed = await transactions.commit(outputs)
        still_owned = []
        for part in parts:
            if part.partition in outputs:
                if part.partition not in committed:
                    self._partitions.fenced(part.partition, part.owned)
                    continue
                part.owned.note_committed(outputs[part.partition].next_offset)
            still_owned.append(part)
        return still_owned, {p: where for p, where in committed.items() if where is not None}

    def _observe(self, computed: ComputedPoll) -> None:
        """Record latency and other metrics at the moment the scores are acknowledged."""
        micro_batch, scores = computed.micro_batch, computed.scores
        if not len(micro_batch):
            return
        now_ms = self._clock_ms()
        metrics = self._metrics
        unapplied = {*np.flatnonzero(scores.duplicate).tolist(), *scores.failed}
        self._observe_times(computed.parts, unapplied, now_ms)
        metrics.micro_batch.observe((len(micro_batch),))
        metrics.score.observe(np.delete(scores.score, [*unapplied]) if unapplied else scores.score)
        metrics.event_age.set((now_ms - int(micro_batch.timestamp_ms.max())) / 1000.0)
        add(metrics.duplicate_transactions, int(np.count_nonzero(scores.duplicate)))
        conflicts = np.flatnonzero(scores.conflict).tolist()
        add(metrics.id_conflicts, len(conflicts))
        for part in computed.parts if conflicts else ():
            found = part.scored.indices(conflicts)
            if found:
                offset = part.decoded.records[found[0]].offset
                self._conflicts.log(self._topic, part.partition, offset, now_ms, len(found))

    def _observe_times(
        self, parts: Sequence[DecidedPart], unapplied: Collection[int], now_ms: int
    ) -> None:
        """Record the latency of applied transactions, and clocks that are wrong.

        Args:
            unapplied: indices of the micro-batch's transactions that were not applied.
        """
        tolerance_ms = self._tolerance_ms
        latencies = []
        n_skewed = n_ahead = n_behind = 0
        for part in parts:
            decoded, start = part.decoded, part.scored.start
            for i, (record, sent_ms) in enumerate(
                zip(decoded.records, decoded.sent_ms, strict=True), start
            ):
                created_ms = record.timestamp
                if i in unapplied or not is_record_time(created_ms):
                    continue
                age_ms = now_ms - created_ms
                if age_ms < 0:
                    n_skewed += 1
                    age_ms = 0
                if age_ms <= MAX_LATENCY_AGE_MS:
                    latencies.append(age_ms / 1000.0)
                if sent_ms > created_ms + tolerance_ms:
                    n_ahead += 1
                elif sent_ms < created_ms - tolerance_ms:
                    n_behind += not decoded.is_history[i - start]
        metrics = self._metrics
        metrics.latency.observe(latencies)
        add(metrics.clock_skew, n_skewed)
        add(metrics.skews["ahead"], n_ahead)
        add(metrics.skews["behind"], n_behind)

    # save --------------------------------------------------------------------------------

    async def _save(
        self, parts: Sequence[DecidedPart], appended: Mapping[int, AppendResult]
    ) -> list[DecidedPart]:
        """Save states and watermarks: each part completely or not at all.

        Notes are written before the states, so that a crash in between repeats them. Writing a
        note twice changes nothing.

        Returns:
            the parts whose states and watermarks stand in the store.
        """
        requests = []
        replies = []
        for part in parts:
            where = appended.get(part.partition)
            logged: Mapping[int, LoggedScore] = {}
            if where is not None:
                logged = await self._partitions.recovery.check_zombie_scores(
                    part.partition, part.owned, where, part.end
                )
            answered = answer_all(part.answers, part.scores, where, logged)
            replies.append(answered.replies)
            requests.append(self._save_request(part, where, answered.stored))
        counts = self._merchant_counts(parts)
        stands = await self._retrier.retry_redis(self._store.save, requests, counts)
        saved = []
        held_states_max = self._held_states_max()
        for part, request, is_saved, of_it in zip(parts, requests, stands, replies, strict=True):
            if not is_saved:
                await self._partitions.recover_from_conflict(
                    part.partition, part.owned, part.decoded.chunk
                )
                continue
            saved.append(part)
            self._replies += of_it
            part.owned.end_save(request.watermark, part.end, held_states_max)
        add(self._metrics.forgotten, sum(len(part.decoded.forgets) for part in saved))
        add(self._metrics.transactions, sum(part.scored_count for part in saved))
        return saved

    def _save_request(
        self,
        part: DecidedPart,
        where: AppendResult | None,
        answers: Sequence[tuple[str, bytes]],
    ) -> Save:
        owned = part.owned
        watermark = self._partitions.recovery.next_watermark(owned, part.end, where).to_bytes()
        owned.begin_save(watermark)
        notes = part.notes if self._writes_notes else ()
        return Save(
            part.partition, owned.watermark, watermark, *part.scored.changed, notes, answers
        )

    def _merchant_counts(self, parts: Sequence[DecidedPart]) -> dict[int, Counter[str]]:
        """Count the transactions with a first score, by time bucket and merchant."""
        counts: dict[int, Counter[str]] = {}
        for part in parts if self._counts_merchants else ():
            transactions, times = part.decoded.transactions, part.decoded.sent_ms
            names = [transactions[i].merchant_id for i in part.new]
            buckets = [times[i] // BUCKET_MS for i in part.new]
            for bucket in set(buckets):  # almost always one
                found = names
                if buckets.count(bucket) < len(buckets):
                    found = [n for n, b in zip(names, buckets, strict=True) if b == bucket]
                counts.setdefault(bucket, Counter()).update(found)
        return counts

    def _held_states_max(self) -> int:
        """Return how many states of a partition stay in memory, at least those of one poll."""
        partitions = max(1, len(self._partitions.assigned()))
        return max(self._state_cache_size // partitions, self._micro_batch_max)

    # reply -------------------------------------------------------------------------------

    async def _reply(self) -> None:
        """Publish the replies to the gateways; one that is lost stands in its answer key."""
        replies, self._replies = self._replies, []
        try:
            await self._store.reply(messages_of(replies))
        except (StoreUnavailableError, StoreForbiddenError) as error:
            self._metrics.replies_lost.inc(len(replies))
            log.warning(
                "replies to gateways are lost; their answer keys have them",
                extra={"replies": len(replies), "error": type(error).__name__},
            )

    # ack ---------------------------------------------------------------------------------

    def _ack(self, poll: Poll, saved: Sequence[DecidedPart]) -> None:
        """Allow the commit of saved offsets, unless a transaction committed them.

        A seek skips what another worker saved. If no further record comes, no later poll acks it.
        """
        if saved:
            self._health.moved()
        if self._transactions is not None:
            return
        for partition in poll.chunks:
            owned = self._partitions.owned(partition)
            if owned is not None and owned.skips_uncommitted:
                poll.applied[partition] = LogOffset(owned.next_offset, owned.log_id)
        for part in saved:
            if self._partitions.owns(part.partition, part.owned):
                poll.applied[part.partition] = LogOffset(part.end, part.owned.log_id)
