"""First half of processing a poll: decode → load → drop applied → score → decide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline.kafka.polls import Poll
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.cloudevents import alert_events, score_events
from pipeline.messages.decision import DecisionThresholds, thresholds_of
from pipeline.scoring.dead_letter import DeadLetters
from pipeline.scoring.decoder import BatchDecoder
from pipeline.scoring.merchant_features import MerchantFeatureCache
from pipeline.scoring.metrics import Metrics, add
from pipeline.scoring.outputs import OutputBuilder
from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.retry import Retrier
from pipeline.scoring.scorer import BatchScores, MicroBatch, Scorer
from pipeline.scoring.stages import (
    ComputedPoll,
    DecidedPart,
    DecodedPart,
    LoadedPart,
    ScoredPart,
    explain_from,
    micro_batch_of,
)
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates
from pipeline.storage.poll_store import PollStore
from pipeline.storage.state_store import Load

THREAD_MIN = 256
"""Minimum batch size for computing in a thread.

At 2,000 transactions this raises throughput by a third, because answers of the broker and Redis
are handled meanwhile; small batches only pay the overhead."""


class FoundStates(msgspec.Struct, frozen=True, eq=False):
    """A part's states, as memory and store have them.

    Attributes:
        watermark: the store's.
        values: states of the part's accounts.
        loaded_rows: rows of ``values`` that came from the store.
    """

    watermark: bytes | None
    values: list[bytes | None]
    loaded_rows: list[int]


class PollComputer:
    """Computation of polls; it writes nothing but its partitions' states in memory.

    Args:
        settings: limits and names.
        scorer: the model.
        store: account states and merchants' profiles.
        partitions: the owned partitions and their progress.
        retrier: repeats calls to services that do not answer.
        metrics: monitoring.
        clock_ms: wall clock, epoch milliseconds.

    Attributes:
        thresholds: of the next micro-batch's decisions.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        scorer: Scorer,
        store: PollStore,
        partitions: PartitionManager,
        retrier: Retrier,
        metrics: Metrics,
        clock_ms: Callable[[], int],
    ) -> None:
        self._scorer = scorer
        self._store = store
        self._partitions = partitions
        self._retrier = retrier
        self._metrics = metrics
        checkpoint = scorer.checkpoint
        features = checkpoint.header.features
        self._merchants: MerchantFeatureCache | None = None
        if features.uses_merchants:
            self._merchants = MerchantFeatureCache(
                metrics=metrics,
                label_delay_ms=features.label_delay_ms,
                size_max=settings.merchant_cache_size,
            )
        topic = settings.topic("transactions")
        dead_letters = DeadLetters(topic, settings.dead_letter_value_max_bytes, metrics, clock_ms)
        self._decoder = BatchDecoder(settings, checkpoint, clock_ms)
        self._outputs = OutputBuilder(
            topic,
            checkpoint,
            dead_letters,
            metrics,
            clock_ms,
            score_events=score_events(settings),
            alert_events=alert_events(settings),
        )
        self.use(thresholds_of(settings, checkpoint.header.thresholds))

    def use(self, thresholds: DecisionThresholds) -> None:
        """Decide by these thresholds from the next micro-batch on."""
        self.thresholds = thresholds
        self._metrics.threshold.labels("review").set(thresholds.review)
        self._metrics.threshold.labels("decline").set(thresholds.decline)

    async def compute(self, poll: Poll) -> ComputedPoll:
        """Run the steps from decode to decide.

        Polls are computed one at a time, in order.
        """
        with self._metrics.timed("decode"):
            decode = self._decoder.decode
            decoded = [decode(partition, chunk) for partition, chunk in poll.chunks.items()]
        with self._metrics.timed("load"):
            loaded = await self._load(decoded)
        with self._metrics.timed("compute"):
            if sum(len(part.decoded.records) for part in loaded) < THREAD_MIN:
                parts, scores, micro_batch = self._score_and_decide(loaded)
            else:  # a thread, so that the poll before is concluded meanwhile
                parts, scores, micro_batch = await asyncio.to_thread(self._score_and_decide, loaded)
            for part in parts:
                part.owned.keep_computed(part.end, *part.scored.changed)
        return ComputedPoll(poll, parts, scores, micro_batch)

    # load, drop applied ------------------------------------------------------------------

    async def _load(self, decoded: Sequence[DecodedPart]) -> list[LoadedPart]:
        """Load states, watermarks and merchants' features; drop what is applied already.

        A part that does not continue its partition's states is left out: the log is read back.
        """
        decoded = [part for part in decoded if self._partitions.is_assigned(part.partition)]
        if self._merchants is None:
            accepted, _ = await self._load_states(decoded, ())
            raw = None
        else:
            features = self._merchants.look_up(
                [transaction.merchant_id for part in decoded for transaction in part.transactions],
                np.array([time for part in decoded for time in part.sent_ms], np.int64),
            )
            accepted, profiles = await self._load_states(decoded, features.merchant_ids)
            if profiles:
                self._merchants.fill(features, profiles)
            raw = features.raw
        loaded = []
        end = 0
        for part, (owned, found) in zip(decoded, accepted, strict=True):
            start, end = end, end + len(part.transactions)
            if owned is not None:
                of_part = None if raw is None else raw[start:end]
                loaded.append(await self._loaded(part, owned, found, of_part))
        # A rebalance may have revoked partitions during the waits.
        return [p for p in loaded if self._partitions.owns(p.decoded.partition, p.owned)]

    async def _loaded(
        self,
        part: DecodedPart,
        owned: OwnedPartition,
        found: FoundStates,
        merchant_raw: NDArray[np.float32] | None,
    ) -> LoadedPart:
        """Drop what is applied already, and find the scores that are published already."""
        begin, before = owned.computed_to, len(part.records)
        if part.chunk.begin < begin:
            part = self._drop_applied(part, begin)
        if merchant_raw is not None and len(part.records) < before:
            merchant_raw = merchant_raw[before - len(part.records) :]
        values = found.values
        for forget in part.forgets:
            values[forget.row] = None
        recovery = self._partitions.recovery
        published = await recovery.published_scores(part.partition, owned, part.records)
        if published:
            published = _of_transactions(part, published)
            if merchant_raw is not None:
                _take_published(merchant_raw, part, published)
            self._metrics.scores_recovered.inc(len(published))
        end = max(part.chunk.end, begin)
        return LoadedPart(
            part, owned, begin, end, values, found.loaded_rows, merchant_raw, published
        )

    def _drop_applied(self, part: DecodedPart, begin: int) -> DecodedPart:
        """Drop records before the watermark."""
        rest = part.since(begin)
        self._metrics.records_skipped.labels("applied").inc(part.size - rest.size)
        return rest

    async def _load_states(
        self, parts: Sequence[DecodedPart], merchant_ids: Sequence[str]
    ) -> tuple[list[tuple[OwnedPartition | None, FoundStates]], list[bytes | None]]:
        """Load watermarks and the states that are not in memory, and accept each chunk.

        Returns:
            for each part its states and its partition, None if the chunk does not continue them;
            and the values of the merchants' profiles.
        """
        manager = self._partitions
        before = [manager.owned(part.partition) for part in parts]
        states, profiles = await self._request_states(parts, before, merchant_ids)
        accepted: list[tuple[OwnedPartition | None, FoundStates]] = []
        again = []
        for i, (part, known, found) in enumerate(zip(parts, before, states, strict=True)):
            owned = await manager.accept(part.partition, part.chunk, found.watermark)
            accepted.append((owned, found))
            if owned is not None and owned is not known:
                if known is None and owned.watermark == found.watermark:
                    continue
                again.append(i)  # the loaded states belong to another watermark
        if again:
            await self._load_again(parts, accepted, again)
        return accepted, profiles

    async def _load_again(
        self,
        parts: Sequence[DecodedPart],
        accepted: list[tuple[OwnedPartition | None, FoundStates]],
        again: Sequence[int],
    ) -> None:
        """Load the states of these parts for the watermarks that their partitions have now."""
        manager = self._partitions
        parts = [parts[i] for i in again]
        taken = [accepted[i][0] for i in again]
        states, _ = await self._request_states(parts, taken, ())
        for i, part, known, found in zip(again, parts, taken, states, strict=True):
            owned = await manager.accept(part.partition, part.chunk, found.watermark)
            if owned is not None and owned is not known:
                await manager.seek_back(part.partition, owned)
                owned = None
            accepted[i] = owned, found

    async def _request_states(
        self,
        parts: Sequence[DecodedPart],
        partitions: Iterable[OwnedPartition | None],
        merchant_ids: Sequence[str],
    ) -> tuple[list[FoundStates], list[bytes | None]]:
        """Take states from memory, and load the others with the watermarks and profiles."""
        if not parts:
            return [], []
        requests, in_memory = [], []
        for part, owned in zip(parts, partitions, strict=True):
            held = owned.states if owned is not None else {}
            accounts = part.accounts
            values = [held.get(account) for account in accounts]
            absent = [i for i, value in enumerate(values) if value is None]
            to_load = [i for i in absent if accounts[i] not in held]
            requests.append(Load(part.partition, [accounts[i] for i in to_load]))
            in_memory.append((values, to_load))
        replies, profiles = await self._retrier.retry_redis(
            self._store.load, requests, merchant_ids
        )
        states = []
        for (values, to_load), reply in zip(in_memory, replies, strict=True):
            for i, value in zip(to_load, reply.states, strict=True):
                values[i] = value
            states.append(FoundStates(reply.watermark, values, to_load))
        return states, profiles

    # rounds, features, GRU, decide -------------------------------------------------------

    def _score_and_decide(
        self, parts: Sequence[LoadedPart]
    ) -> tuple[list[DecidedPart], BatchScores, MicroBatch]:
        """Run the steps that need the processor only."""
        thresholds = self.thresholds  # they may change while a thread computes
        scored, scores, micro_batch = self._score(parts, thresholds)
        return self._outputs.decide(scored, scores, thresholds), scores, micro_batch

    def _score(
        self, parts: Sequence[LoadedPart], thresholds: DecisionThresholds
    ) -> tuple[list[ScoredPart], BatchScores, MicroBatch]:
        """Advance the states of all parts together."""
        micro_batch = micro_batch_of(
            [part.decoded for part in parts],
            [part.merchant_raw for part in parts],
            explain_from(parts, thresholds.review),
            self._decoder.extra_fields,
        )
        values = [value for part in parts for value in part.values]
        states, scores, valid, invalid = self._scorer.score(values, micro_batch)
        self._count_states(parts, len(values), valid.tolist(), invalid, scores.expired)
        of_invalid: list[int] = []
        if invalid:
            unusable = ~valid & np.array([value is not None for value in values], bool)
            of_invalid = np.flatnonzero(unusable[micro_batch.row]).tolist()
        scored = []
        start = 0
        for part, changed in zip(parts, self._changed(parts, states), strict=True):
            stop = start + len(part.decoded.records)
            unusable_here = {i - start for i in of_invalid if start <= i < stop}
            scored.append(ScoredPart(part, start, unusable_here, changed))
            start = stop
        return scored, scores, micro_batch

    def _count_states(
        self,
        parts: Sequence[LoadedPart],
        n: int,
        is_valid: Sequence[bool],
        invalid: int,
        expired: int,
    ) -> None:
        """Count the states of a micro-batch by where they came from."""
        n_loaded = first_row = 0
        for part in parts:
            n_loaded += sum(is_valid[first_row + row] for row in part.loaded_rows)
            first_row += len(part.values)
        n_cached = sum(is_valid) - n_loaded
        counters = self._metrics.state_results
        add(counters["loaded"], n_loaded)
        add(counters["invalid"], invalid)
        add(counters["cached"], n_cached)
        add(counters["missing"], n - n_cached - n_loaded - invalid)
        add(counters["expired"], expired)

    def _changed(
        self, parts: Sequence[LoadedPart], states: AccountStates
    ) -> list[tuple[list[str], Sequence[bytes | None]]]:
        """Return each part's accounts whose states changed, and these states."""
        last_offset = states.last_offset.tolist()
        first_rows, changed = [], []
        n = 0
        for part in parts:
            first_rows.append(n)
            n += len(part.values)
            changed.append([r for r in range(first_rows[-1], n) if last_offset[r] >= part.begin])
        all_changed = np.array([row for rows in changed for row in rows], np.intp)
        values = iter(self._scorer.codec.encode(states, all_changed))
        found: list[tuple[list[str], Sequence[bytes | None]]] = []
        for part, first_row, rows in zip(parts, first_rows, changed, strict=True):
            names, forgets = part.decoded.accounts, part.decoded.forgets
            accounts = [names[row - first_row] for row in rows]
            saved: list[bytes | None] = list(islice(values, len(rows)))
            if forgets:
                last = {names[forget.row]: forget.row for forget in forgets}
                gone = [account for account, row in last.items() if first_row + row not in rows]
                accounts += gone
                saved += [None] * len(gone)
            found.append((accounts, saved))
        return found


def _of_transactions(
    part: DecodedPart, published: dict[int, LoggedScore]
) -> dict[int, LoggedScore]:
    """Return published scores without those of an earlier log, which had the same offsets."""
    pairs = zip(part.records, part.transactions, strict=True)
    ids = {record.offset: transaction.transaction_id for record, transaction in pairs}
    found = {offset: score.of(ids[offset]) for offset, score in published.items()}
    return {offset: score for offset, score in found.items() if score is not None}


def _take_published(
    merchant_raw: NDArray[np.float32], part: DecodedPart, published: dict[int, LoggedScore]
) -> None:
    """Overwrite merchants' features, float32[n, M], by those that a published score records."""
    for i, record in enumerate(part.records):
        score = published.get(record.offset)
        recorded = score.merchant_raw() if score is not None else None
        if recorded is not None:
            merchant_raw[i] = recorded
