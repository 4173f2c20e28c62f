"""Order of the steps from a poll of records to saved states; this order is the guarantee.

    decode → load → drop applied → rounds → features → GRU → decide → publish → save → ack

Scores are published before states are saved. States are saved before offsets are acknowledged.
A partition's states and its watermark are saved together, by a conditional write. So after a
crash at any moment, three things hold. Each partition's states are exactly its log up to its
watermark. The scores topic holds all published scores past it. Committed offsets are never past
it.

With exactly-once processing, scores and offsets are committed together, before states are saved.
After a crash the committed offset may then be past the watermark. The worker reads the log back
to the watermark and keeps all published scores.

:meth:`Processor.compute` runs the steps up to decide, :meth:`Processor.conclude` those from
publish on. A worker computes a poll while it concludes the one before. States that are computed
but not saved stay in memory (:class:`pipeline.scoring.owned_partition.OwnedPartition`). They are
dropped with the partition if a save finds another watermark.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import islice

import numpy as np

from model.features.merchant import BUCKET_MS
from model.units import DAY_MS
from pipeline.kafka.polls import Poll
from pipeline.kafka.producer import AppendResult, PartOutput, Publisher, Transactions
from pipeline.messages.decision import DecisionThresholds, thresholds_of
from pipeline.scoring.batch import ComputedPoll, PartitionBatch, micro_batch_of
from pipeline.scoring.dead_letter import DeadLetters, ThrottledWarning
from pipeline.scoring.decoder import BatchDecoder
from pipeline.scoring.health import Health
from pipeline.scoring.merchant_features import MerchantFeatureCache
from pipeline.scoring.metrics import Metrics, add
from pipeline.scoring.outputs import OutputBuilder
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.retry import Retrier
from pipeline.scoring.scorer import BatchScores, MicroBatch, Scorer
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates
from pipeline.storage.poll_store import PollStore
from pipeline.storage.state_store import Load, LoadResult, Save
from pipeline.timestamps import is_record_time
from pipeline.topic_id import LogOffset

MAX_LATENCY_AGE_MS = DAY_MS
"""An older record belongs to a copied log: its age says nothing about latency."""

THREAD_MIN = 256
"""Minimum batch size for computing in a thread.

At 2,000 transactions this raises throughput by a third, because answers of the broker and Redis
are handled meanwhile; small batches only pay the overhead."""


class Processor:
    """The steps of processing, one poll at a time.

    Args:
        settings: limits and names.
        scorer: the model.
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
        scorer: Scorer,
        store: PollStore,
        publisher: Publisher,
        transactions: Transactions | None = None,
        partitions: PartitionManager,
        retrier: Retrier,
        metrics: Metrics,
        health: Health,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._scorer = scorer
        self._store = store
        self._publisher = publisher
        self._transactions = transactions
        self._partitions = partitions
        self._retrier = retrier
        self._metrics = metrics
        self._health = health
        self._clock_ms = clock_ms
        features = scorer.checkpoint.header.features
        self._writes_notes = settings.update_merchant_profiles
        self._counts_merchants = self._writes_notes and features.uses_merchants
        self._merchants: MerchantFeatureCache | None = None
        if features.uses_merchants:
            self._merchants = MerchantFeatureCache(
                metrics=metrics,
                label_delay_ms=features.label_delay_ms,
                size_max=settings.merchant_cache_size,
            )
        self._topic = settings.topic("transactions")
        self._tolerance_ms = int(settings.timestamp_tolerance_seconds * 1000)
        self._conflicts = ThrottledWarning("a transaction id came again with another content")
        self._state_cache_size = settings.state_cache_size
        self._micro_batch_max = settings.micro_batch_max
        dead_letters = DeadLetters(
            self._topic, settings.dead_letter_value_max_bytes, metrics, clock_ms
        )
        checkpoint = scorer.checkpoint
        self._decoder = BatchDecoder(settings, checkpoint, clock_ms)
        self._outputs = OutputBuilder(self._topic, checkpoint, dead_letters, metrics, clock_ms)
        self.use(thresholds_of(settings, checkpoint.header.thresholds))

    def use(self, thresholds: DecisionThresholds) -> None:
        """Decide by these thresholds from the next micro-batch on."""
        self.thresholds = thresholds
        self._metrics.threshold.labels("review").set(thresholds.review)
        self._metrics.threshold.labels("decline").set(thresholds.decline)

    async def process(self, poll: Poll) -> None:
        """Apply a poll; when this returns, ``poll.applied`` may be committed.

        ``poll.applied`` stays empty if scores and offsets were committed together.

        Raises:
            PublishError: the broker rejects a record that must be published.
            ScorerBrokenError: the computation fails for everything.
            StartupError: states and log do not belong together.
        """
        await self.conclude(await self.compute(poll))

    async def compute(self, poll: Poll) -> ComputedPoll:
        """Run the steps from decode to decide.

        Polls are computed one at a time, in order.
        """
        with self._metrics.timed("decode"):
            batches = self._decode(poll)
        with self._metrics.timed("load"):
            batches = await self._load(batches)
        with self._metrics.timed("compute"):
            if sum(len(batch.records) for batch in batches) < THREAD_MIN:
                states, scores, micro_batch = self._score_and_decide(batches)
            else:  # a thread, so that the poll before is concluded meanwhile
                states, scores, micro_batch = await asyncio.to_thread(
                    self._score_and_decide, batches
                )
            self._keep_in_memory(batches, states)
        return ComputedPoll(poll, batches, scores, micro_batch)

    async def conclude(self, computed: ComputedPoll) -> None:
        """Run the steps publish, save and ack.

        Polls are concluded one at a time, in order; the next one may be computed meanwhile.
        """
        # Meanwhile a rebalance may have revoked partitions, or a save met another watermark.
        batches = [b for b in computed.batches if self._partitions.owns(b.partition, b.owned)]
        if not batches:
            return
        with self._metrics.timed("publish"):
            batches, appended = await self._publish(batches)
        if not batches:
            return
        self._observe(computed)
        with self._metrics.timed("save"):
            await self._save(batches, appended)
        with self._metrics.timed("ack"):
            self._ack(computed.poll, batches)

    # decode ------------------------------------------------------------------------------

    def _decode(self, poll: Poll) -> list[PartitionBatch]:
        """Decode each partition's records."""
        return [self._decoder.decode(partition, chunk) for partition, chunk in poll.chunks.items()]

    # load, drop applied ------------------------------------------------------------------

    async def _load(self, batches: list[PartitionBatch]) -> list[PartitionBatch]:
        """Load states, watermarks and merchants' features; drop what is applied already.

        A batch that does not continue its partition's states is left out: the log is read back.
        """
        batches = [b for b in batches if self._partitions.is_assigned(b.partition)]
        for batch in batches:
            batch.owned = self._partitions.owned(batch.partition)
        await self._load_all(batches)
        for batch in batches:
            if batch.owned is not None:
                batch.begin = batch.owned.computed_to
                self._drop_applied(batch)
                for forget in batch.forgets:
                    batch.values[forget.row] = None
                batch.keep_published(
                    await self._partitions.recovery.published_scores(
                        batch.partition, batch.owned, batch.records
                    )
                )
                self._metrics.scores_recovered.inc(len(batch.published))
        # A rebalance may have revoked partitions during the waits.
        return [b for b in batches if self._partitions.owns(b.partition, b.owned)]

    async def _load_all(self, batches: list[PartitionBatch]) -> None:
        """Load states and watermarks, and the merchants' features that are not in memory."""
        if self._merchants is None:
            await self._load_states(batches, ())
            return
        features = self._merchants.look_up(
            [transaction.merchant_id for batch in batches for transaction in batch.transactions],
            np.array([time for batch in batches for time in batch.sent_ms], np.int64),
        )
        profiles = await self._load_states(batches, features.merchant_ids)
        if profiles:
            self._merchants.fill(features, profiles)
        start = 0
        for batch in batches:
            stop = start + len(batch.transactions)
            batch.merchant_raw = features.raw[start:stop]
            start = stop

    async def _load_states(
        self, batches: list[PartitionBatch], merchant_ids: Sequence[str]
    ) -> list[bytes | None]:
        """Load watermarks and the states that are not in memory, and accept each chunk.

        Returns:
            the values of the merchants' profiles.
        """
        again = []
        replies, profiles = await self._request_states(batches, merchant_ids)
        for batch, reply in zip(batches, replies, strict=True):
            known = batch.owned
            batch.owned = await self._partitions.accept(
                batch.partition, batch.chunk, reply.watermark
            )
            if batch.owned is not None and batch.owned is not known:
                if known is None and batch.owned.watermark == reply.watermark:
                    continue
                again.append(batch)  # the loaded states belong to another watermark
        replies, _ = await self._request_states(again, ())
        for batch, reply in zip(again, replies, strict=True):
            known = batch.partition_owned
            batch.owned = await self._partitions.accept(
                batch.partition, batch.chunk, reply.watermark
            )
            if batch.owned is not None and batch.owned is not known:
                await self._partitions.seek_back(batch.partition, batch.owned)
                batch.owned = None
        return profiles

    async def _request_states(
        self, batches: list[PartitionBatch], merchant_ids: Sequence[str]
    ) -> tuple[list[LoadResult], list[bytes | None]]:
        """Fill ``values`` from memory and store; return the store's replies."""
        if not batches:
            return [], []
        requests = []
        for batch in batches:
            held = batch.owned.states if batch.owned is not None else {}
            accounts = batch.accounts
            batch.values = values = [held.get(account) for account in accounts]
            absent = [i for i, value in enumerate(values) if value is None]
            batch.loaded_rows = [i for i in absent if accounts[i] not in held]
            requests.append(Load(batch.partition, [accounts[i] for i in batch.loaded_rows]))
        replies, profiles = await self._retrier.retry_redis(
            self._store.load, requests, merchant_ids
        )
        for batch, reply in zip(batches, replies, strict=True):
            for i, value in zip(batch.loaded_rows, reply.states, strict=True):
                batch.values[i] = value
        return replies, profiles

    def _drop_applied(self, batch: PartitionBatch) -> None:
        """Drop records before the watermark."""
        if batch.chunk.begin < batch.begin:
            dropped = batch.drop_before(batch.begin)
            self._metrics.records_skipped.labels("applied").inc(dropped)

    # rounds, features, GRU, decide -------------------------------------------------------

    def _score_and_decide(
        self, batches: list[PartitionBatch]
    ) -> tuple[AccountStates, BatchScores, MicroBatch]:
        """Run the steps that need the processor only."""
        thresholds = self.thresholds  # they may change while a thread computes
        states, scores, micro_batch = self._score(batches, thresholds)
        self._outputs.build(batches, scores, thresholds)
        return states, scores, micro_batch

    def _score(
        self, batches: list[PartitionBatch], thresholds: DecisionThresholds
    ) -> tuple[AccountStates, BatchScores, MicroBatch]:
        """Advance the states of all batches together."""
        micro_batch = micro_batch_of(batches, self._decoder.extra_fields, thresholds.review)
        values = [value for batch in batches for value in batch.values]
        states, scores, valid, invalid = self._scorer.score(values, micro_batch)
        is_valid = valid.tolist()
        n_loaded = first_row = 0
        for batch in batches:
            n_loaded += sum(is_valid[first_row + row] for row in batch.loaded_rows)
            first_row += len(batch.accounts)
        n_cached = sum(is_valid) - n_loaded
        counters = self._metrics.state_results
        add(counters["loaded"], n_loaded)
        add(counters["invalid"], invalid)
        add(counters["cached"], n_cached)
        add(counters["missing"], len(values) - n_cached - n_loaded - invalid)
        add(counters["expired"], scores.expired)
        if invalid:
            unusable = ~valid & np.array([value is not None for value in values], bool)
            of_invalid = np.flatnonzero(unusable[micro_batch.row]).tolist()
            for batch in batches:
                batch.invalid_states = set(batch.indices(of_invalid))
        return states, scores, micro_batch

    def _keep_in_memory(self, batches: list[PartitionBatch], states: AccountStates) -> None:
        """Keep the computed states in memory; the next poll continues from them."""
        last_offset = states.last_offset.tolist()
        first_rows, changed = [], []
        n = 0
        for batch in batches:
            first_rows.append(n)
            n += len(batch.accounts)
            changed.append([r for r in range(first_rows[-1], n) if last_offset[r] >= batch.begin])
        all_changed = np.array([row for rows in changed for row in rows], np.intp)
        values = iter(self._scorer.codec.encode(states, all_changed))
        for batch, first_row, rows in zip(batches, first_rows, changed, strict=True):
            accounts = [batch.accounts[row - first_row] for row in rows]
            saved: list[bytes | None] = list(islice(values, len(rows)))
            if batch.forgets:
                last = {batch.accounts[forget.row]: forget.row for forget in batch.forgets}
                gone = [account for account, row in last.items() if first_row + row not in rows]
                accounts += gone
                saved += [None] * len(gone)
            batch.changed = accounts, saved
            batch.partition_owned.remember(accounts, saved)
            batch.partition_owned.computed_to = batch.end

    # publish -----------------------------------------------------------------------------

    async def _publish(
        self, batches: list[PartitionBatch]
    ) -> tuple[list[PartitionBatch], dict[int, AppendResult]]:
        """Publish scores, alerts and dead letters.

        Returns:
            the batches that are still owned, and where the scores of each partition went.
        """
        if self._transactions is not None:
            return await self._commit(batches, self._transactions)
        return batches, await self._publisher.publish(
            {batch.partition: batch.scores for batch in batches if batch.scores},
            [alert for batch in batches for alert in batch.alerts],
            [dead_letter for batch in batches for dead_letter in batch.dead_letters],
        )

    async def _commit(
        self, batches: list[PartitionBatch], transactions: Transactions
    ) -> tuple[list[PartitionBatch], dict[int, AppendResult]]:
        """Commit a Kafka transaction for each batch with output or progress."""
        outputs = {}
        for batch in batches:
            owned = batch.partition_owned
            has_output = batch.scores or batch.alerts or batch.dead_letters
            if has_output or batch.end > owned.committed:
                outputs[batch.partition] = PartOutput(
                    batch.scores,
                    batch.alerts,
                    batch.dead_letters,
                    LogOffset(max(batch.end, owned.committed), owned.log_id),
                    owned.producer_epoch,
                )
        committed = await transactions.commit(outputs)
        still_owned = []
        for batch in batches:
            if batch.partition in outputs:
                if batch.partition not in committed:
                    self._partitions.fenced(batch.partition, batch.partition_owned)
                    continue
                batch.partition_owned.committed = outputs[batch.partition].next_offset
            still_owned.append(batch)
        return still_owned, {p: where for p, where in committed.items() if where is not None}

    def _observe(self, computed: ComputedPoll) -> None:
        """Record latency and other metrics at the moment the scores are acknowledged."""
        micro_batch, scores = computed.micro_batch, computed.scores
        if not len(micro_batch):
            return
        now_ms = self._clock_ms()
        metrics = self._metrics
        unapplied = {*np.flatnonzero(scores.duplicate).tolist(), *scores.failed}
        self._observe_times(computed.batches, unapplied, now_ms)
        metrics.micro_batch.observe((len(micro_batch),))
        metrics.score.observe(np.delete(scores.score, [*unapplied]) if unapplied else scores.score)
        metrics.event_age.set((now_ms - int(micro_batch.timestamp_ms.max())) / 1000.0)
        add(metrics.duplicate_transactions, int(np.count_nonzero(scores.duplicate)))
        conflicts = np.flatnonzero(scores.conflict).tolist()
        add(metrics.id_conflicts, len(conflicts))
        for batch in computed.batches if conflicts else ():
            found = batch.indices(conflicts)
            if found:
                offset = batch.records[found[0]].offset
                self._conflicts.log(self._topic, batch.partition, offset, now_ms, len(found))

    def _observe_times(
        self, batches: list[PartitionBatch], unapplied: Collection[int], now_ms: int
    ) -> None:
        """Record the latency of applied transactions, and clocks that are wrong.

        Args:
            unapplied: indices of the micro-batch's transactions that were not applied.
        """
        tolerance_ms = self._tolerance_ms
        latencies = []
        n_skewed = n_ahead = n_behind = 0
        for batch in batches:
            for i, (record, sent_ms) in enumerate(
                zip(batch.records, batch.sent_ms, strict=True), batch.span.start
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
                    n_behind += not batch.is_history[i - batch.span.start]
        metrics = self._metrics
        metrics.latency.observe(latencies)
        add(metrics.clock_skew, n_skewed)
        add(metrics.event_time_skew.labels("ahead"), n_ahead)
        add(metrics.event_time_skew.labels("behind"), n_behind)

    # save --------------------------------------------------------------------------------

    async def _save(self, batches: list[PartitionBatch], appended: dict[int, AppendResult]) -> None:
        """Save states and watermarks: each batch completely or not at all.

        Notes are written before the states, so that a crash in between repeats them. Writing a
        note twice changes nothing.
        """
        requests = []
        for batch in batches:
            where = appended.get(batch.partition)
            if where is not None:
                await self._partitions.recovery.check_zombie_scores(
                    batch.partition, batch.partition_owned, where, batch.end
                )
            requests.append(self._save_request(batch, where))
        counts = self._merchant_counts(batches)
        stands = await self._retrier.retry_redis(self._store.save, requests, counts)
        for batch, request, is_saved in zip(batches, requests, stands, strict=True):
            batch.is_saved = is_saved
            owned = batch.partition_owned
            if not is_saved:
                await self._partitions.recover_from_conflict(batch.partition, owned, batch.chunk)
                continue
            owned.watermark, owned.neighbour = request.watermark, owned.watermark
            owned.next_offset = batch.end
            owned.forget_states(self._held_states_max())
            self._metrics.forgotten.inc(len(batch.forgets))
            self._metrics.transactions.inc(batch.scored_count)

    def _save_request(self, batch: PartitionBatch, where: AppendResult | None) -> Save:
        owned = batch.partition_owned
        watermark = self._partitions.recovery.next_watermark(owned, batch.end, where).to_bytes()
        owned.neighbour = watermark
        notes = batch.notes if self._writes_notes else ()
        return Save(batch.partition, owned.watermark, watermark, *batch.changed, notes)

    def _merchant_counts(self, batches: list[PartitionBatch]) -> dict[int, Counter[str]]:
        """Count the transactions with a first score, by time bucket and merchant."""
        counts: dict[int, Counter[str]] = {}
        for batch in batches if self._counts_merchants else ():
            transactions, times = batch.transactions, batch.sent_ms
            names = [transactions[i].merchant_id for i in batch.new]
            buckets = [times[i] // BUCKET_MS for i in batch.new]
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

    # ack ---------------------------------------------------------------------------------

    def _ack(self, poll: Poll, batches: list[PartitionBatch]) -> None:
        """Allow the commit of saved offsets, unless a transaction committed them."""
        for batch in batches if self._transactions is None else ():
            if batch.is_saved and self._partitions.owns(batch.partition, batch.owned):
                log_id = batch.partition_owned.log_id
                poll.applied[batch.partition] = LogOffset(batch.end, log_id)
        if any(batch.is_saved for batch in batches):
            self._health.moved()
