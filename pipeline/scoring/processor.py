"""The worker's heart: a poll of records in; scores, alerts and saved states out.

    decode → load → drop applied → rounds → features → GRU → decide → publish → save → ack

The order is the guarantee. Scores are published before states are saved, and states are
saved before offsets are acked; a partition's states and its watermark are saved together,
only if the watermark is the one that was loaded. So whatever dies at whatever moment, each
partition's states are exactly its log up to its watermark, the scores topic tells what was
said of transactions past it, and committed offsets are never past it.

Where scores and offsets are committed together (the setting ``transactional``), offsets are
committed before states are saved, and may be past the watermark after a crash: the log is read
back to it, and what was published past it is kept as ever.

The steps are two halves: :meth:`Processor.compute` up to decide, :meth:`Processor.conclude`
from publish on. A worker computes a poll while it concludes the one before; what is computed
and not yet saved is held in memory (:class:`pipeline.scoring.partitions.Owned`) and is dropped with
the partition where a save finds another watermark.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.features.merchant import BUCKET_MS, MERCHANT_FEATURES, WEIGHT_MAX
from model.reasons import Explainer
from model.transaction import Transaction
from pipeline.errors import RejectedError
from pipeline.kafka.decompression_limit import refuse_batch
from pipeline.kafka.polls import Chunk, Poll, Record
from pipeline.kafka.producer import AppendResult, Outgoing, PartOutput, Publisher, Transactions
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.control import CONTROL_HEADER, decode_control
from pipeline.messages.decision import DECISIONS, DecisionThresholds, thresholds_of
from pipeline.messages.decoding import payment_ms
from pipeline.messages.extra_fields import NO_EXTRA_FIELDS, ExtraFields
from pipeline.messages.scores import (
    ScoreEncoder,
    encode_alert,
    source_prefix,
    with_merchant_weight,
    with_out_of_range,
    with_refused_state,
    with_thresholds,
)
from pipeline.messages.transactions import HISTORY_HEADER, WARM_HEADER, decode_transaction
from pipeline.scoring.dead_letter import DeadLetters, Notices
from pipeline.scoring.health import Health
from pipeline.scoring.merchant_features import Merchants
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.partitions import OwnedPartition, PartitionManager
from pipeline.scoring.retry import Retrier
from pipeline.scoring.scorer import ID_CONFLICT, MicroBatch, Scored, Scorer, id_hashes
from pipeline.settings import Settings
from pipeline.storage.account_state import AccountStates
from pipeline.storage.merchant_profile import transaction_hash
from pipeline.storage.merchant_store import MerchantStore, ScoredNote
from pipeline.storage.state_store import Load, LoadResult, Save, StateStore
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS
from pipeline.timestamps import (
    RECORD_TIME_MAX_MS,
    are_record_times,
    event_time,
    is_record_time,
)
from pipeline.topic_id import LogOffset
from pipeline.units import DAY_MS

APPROVE = DECISIONS[0]

NEVER = 2.0
"""A score that there is none of."""

BACKFILLED_FROM_MS = DAY_MS
"""A record that is older when it is scored is of a log that was copied: its age is no latency."""

THREAD_MIN = 256
"""From so many transactions on a micro-batch is computed in a thread, while answers of broker
and Redis are taken: with 2,000 that is a third more throughput, with a few it is all loss."""


@dataclass(frozen=True)
class Forget:
    """An instruction to forget an account.

    Attributes:
        offset: of its record.
        row: the account's row for what comes after it, with an empty state.
    """

    offset: int
    row: int


@dataclass
class Part:
    """A partition's part of a micro-batch on its way through the steps.

    Attributes:
        records, transactions: what can be scored, in log order.
        sent_ms: event time of each transaction, as it was sent and is published.
        timestamps_ms: event time that enters the account's features and state.
        is_past: whether each transaction says that it is of the past.
        rows: the place of each transaction's account in ``accounts``.
        accounts: account ids; distinct, but that one which is forgotten is another from there on.
        forgets: instructions to forget an account.
        merchant_raw: float32[n, M], merchants' features; None where the checkpoint uses none.
        new: indices of the transactions that have no score yet and get one.
        rejected: records that cannot be scored, with reason and error.
        owned: the partition, once its watermark is known.
        values: states of ``accounts``; those of the rows ``asked`` came from the store, the
            others were held in memory.
        kept: by offset, scores that were published before.
        begin: the first offset that was not computed before.
        refused: indices of the transactions whose account's state could not be used.
        scored: where this part stands in the micro-batch's arrays.
        said: how many transactions have a score, old or new.
        scores, alerts, letters: what to publish.
        flagged: index, score and decision of what is to raise an alert.
        notes: what labels will need to know of transactions.
        changed: accounts and states to save; None is to be deleted.
        saved: whether they and the watermark stand in the store.
    """

    partition: int
    chunk: Chunk
    records: list[Record] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    sent_ms: list[int] = field(default_factory=list)
    timestamps_ms: list[int] = field(default_factory=list)
    is_past: list[bool] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)
    forgets: list[Forget] = field(default_factory=list)
    merchant_raw: NDArray[np.float32] | None = None
    rejected: list[tuple[Record, str, str]] = field(default_factory=list)
    owned: OwnedPartition | None = None
    values: list[bytes | None] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    kept: dict[int, LoggedScore] = field(default_factory=dict)
    begin: int = 0
    refused: list[int] = field(default_factory=list)
    scored: slice = field(default_factory=lambda: slice(0, 0))
    new: list[int] = field(default_factory=list)
    said: int = 0
    scores: list[Outgoing] = field(default_factory=list)
    alerts: list[Outgoing] = field(default_factory=list)
    letters: list[Outgoing] = field(default_factory=list)
    flagged: list[tuple[int, bytes, str]] = field(default_factory=list)
    notes: list[ScoredNote] = field(default_factory=list)
    changed: tuple[list[str], Sequence[bytes | None]] = field(default_factory=lambda: ([], []))
    saved: bool = False

    @property
    def end(self) -> int:
        """The first offset after this part."""
        return max(self.chunk.end, self.begin)

    def indices(self, failed: Iterable[int]) -> list[int]:
        """Those of the micro-batch's indices that are this part's, from its start."""
        where = self.scored
        return [i - where.start for i in failed if where.start <= i < where.stop]

    @property
    def partition_owned(self) -> OwnedPartition:
        """The partition, known from the load on."""
        assert self.owned is not None
        return self.owned


@dataclass(frozen=True)
class Computed:
    """A poll that is computed and not concluded."""

    poll: Poll
    parts: list[Part]
    scored: Scored
    batch: MicroBatch


class PartDecoder:
    """Records to transactions, for the worker and for whoever computes its states again.

    Args:
        settings: limits.
        checkpoint: its currency and further fields.
        clock_ms: wall clock, epoch milliseconds; asked only where a record has no time.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.further_fields = ExtraFields(checkpoint.header.features.fields)
        self._currency = checkpoint.header.currency
        self._future_limit_ms = int(settings.max_timestamp_ahead_seconds * 1000)
        self._tolerance_ms = int(settings.timestamp_tolerance_seconds * 1000)
        self._age_max_ms = int(settings.max_timestamp_age_seconds * 1000)
        self._clock_ms = clock_ms

    def part(self, partition: int, chunk: Chunk) -> Part:
        """A chunk's transactions; what cannot be scored is set aside with its reason."""
        part = Part(partition, chunk)
        row_of: dict[str, int] = {}
        for record in chunk.records:
            try:
                if record.headers and _is_instruction(record):
                    _obey(part, row_of, record)
                    continue
                is_past = bool(record.headers) and _is_of_the_past(record)
                transaction, sent_ms, timestamp_ms = self._decode(record, is_past)
            except RejectedError as error:
                part.rejected.append((record, error.reason, str(error)))
                continue
            part.records.append(record)
            part.transactions.append(transaction)
            part.sent_ms.append(sent_ms)
            part.timestamps_ms.append(timestamp_ms)
            part.is_past.append(is_past)
            row = row_of.setdefault(transaction.account_id, len(part.accounts))
            if row == len(part.accounts):
                part.accounts.append(transaction.account_id)
            part.rows.append(row)
        return part

    def _decode(self, record: Record, is_past: bool) -> tuple[Transaction, int, int]:
        """A record's transaction, its event time as sent, and that of its account's features."""
        refuse_batch(record.value)
        transaction = decode_transaction(
            record.key, record.value, self._currency, self.further_fields
        )
        sent_ms = payment_ms(transaction.timestamp)
        record_ms = record.timestamp
        if -self._age_max_ms <= sent_ms - record_ms <= 0 and record_ms < RECORD_TIME_MAX_MS:
            return transaction, sent_ms, sent_ms  # as almost all are; else it costs more calls
        return transaction, sent_ms, self._event_time(sent_ms, record_ms, is_past)

    def _event_time(self, sent_ms: int, record_ms: int, is_past: bool) -> int:
        """Event time for the features of a transaction that is early, old, or has no record time.

        Raises:
            RejectedError: it is too early or too old.
        """
        is_timed = is_record_time(record_ms)
        # Without a time of the record's the clock alone can tell a far future.
        ahead_ms = sent_ms - (record_ms if is_timed else self._clock_ms())
        if ahead_ms > self._future_limit_ms:
            of = "the record's own" if is_timed else "the worker's clock"
            raise RejectedError(
                "future_timestamp",
                f"the timestamp is over {self._future_limit_ms // 1000} s past {of}",
            )
        if not is_timed:
            return sent_ms
        if -ahead_ms > self._age_max_ms and not is_past:
            raise RejectedError(
                "old_timestamp",
                f"the timestamp is over {self._age_max_ms // 1000} s before the record's own: send"
                f" history with the header {HISTORY_HEADER}, or set max_timestamp_age_seconds",
            )
        return event_time(sent_ms, record_ms, self._tolerance_ms)


def _is_instruction(record: Record) -> bool:
    """Whether a record is an instruction, known or not, and no transaction."""
    return any(name == CONTROL_HEADER for name, _ in record.headers)


def _is_of_the_past(record: Record) -> bool:
    """Whether a record says that its transaction is of the past."""
    return any(name in (HISTORY_HEADER, WARM_HEADER) for name, _ in record.headers)


def _obey(part: Part, row_of: dict[str, int], record: Record) -> None:
    """Take an instruction into a part.

    Raises:
        RejectedError: it is none that this version knows.
    """
    account_id = decode_control(record.key, record.value, record.headers)
    if account_id is not None:
        part.forgets.append(Forget(record.offset, len(part.accounts)))
        row_of[account_id] = len(part.accounts)
        part.accounts.append(account_id)


class Processor:
    """Applies polls, one at a time.

    Args:
        settings: limits and names.
        scorer: the model.
        store, merchant_store: account states and merchants' profiles.
        publisher: scores, alerts and rejected records out.
        transactions: out instead, and the group's offsets with them; None to publish and ack.
        ownership: the partitions and how far their states are.
        patience: waits for services that are away.
        metrics, health: what operations see.
        clock_ms: wall clock, epoch milliseconds.
        together: awaits calls side by side, as :func:`asyncio.gather` does.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        scorer: Scorer,
        store: StateStore,
        merchant_store: MerchantStore,
        publisher: Publisher,
        transactions: Transactions | None = None,
        ownership: PartitionManager,
        patience: Retrier,
        metrics: Metrics,
        health: Health,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        together: Callable[..., Awaitable[Any]] = asyncio.gather,
    ) -> None:
        self._scorer = scorer
        self._store = store
        self._publisher = publisher
        self._transactions = transactions
        self._ownership = ownership
        self._patience = patience
        self._metrics = metrics
        self._health = health
        self._clock_ms = clock_ms
        self._together = together
        self._merchant_store = merchant_store
        features = scorer.checkpoint.header.features
        self._is_serving = settings.update_merchant_profiles
        self._merchant_counts = self._is_serving and features.uses_merchants
        self._merchants: Merchants | None = None
        if features.uses_merchants:
            self._merchants = Merchants(
                store=merchant_store,
                patience=patience,
                metrics=metrics,
                label_delay_ms=features.label_delay_ms,
                cached_max=settings.merchant_cache_size,
            )
        self._topic = settings.topic("transactions")
        self._tolerance_ms = int(settings.timestamp_tolerance_seconds * 1000)
        self._conflicts = Notices("a transaction id came again with another content")
        self._cached_states_max = settings.state_cache_size
        self._micro_batch_max = settings.micro_batch_max
        self._dead_letters = DeadLetters(
            self._topic, settings.dead_letter_value_max_bytes, metrics, clock_ms
        )
        names = features.names
        self._decoder = PartDecoder(settings, scorer.checkpoint, clock_ms)
        self._further_fields = self._decoder.further_fields
        self._explainer = Explainer(scorer.checkpoint)
        self._names = np.array(names)
        self._encoder = ScoreEncoder(names, scorer.checkpoint.digest)
        for name in names:
            metrics.out_of_range.labels(name)
        self.use(thresholds_of(settings, scorer.checkpoint.header.thresholds))

    def use(self, thresholds: DecisionThresholds) -> None:
        """Decide by these from the next micro-batch on."""
        self.thresholds = thresholds
        self._metrics.threshold.labels("review").set(thresholds.review)
        self._metrics.threshold.labels("decline").set(thresholds.decline)

    async def process(self, poll: Poll) -> None:
        """Apply a poll; when this returns, ``poll.applied`` may be committed.

        It is empty where scores and offsets are committed together: nothing is left to commit.

        Raises:
            PublishError: the broker does not take what must be published.
            ScorerBrokenError: the computation fails for everything.
            StartupError: states and log do not belong together.
        """
        await self.conclude(await self.compute(poll))

    async def compute(self, poll: Poll) -> Computed:
        """Decode, load, drop applied, rounds, features, GRU, decide.

        Polls are computed one at a time, in order.
        """
        with self._metrics.timed("decode"):
            parts = self._decode(poll)
        with self._metrics.timed("load"):
            parts = await self._load(parts)
        with self._metrics.timed("compute"):
            if sum(len(part.records) for part in parts) < THREAD_MIN:
                states, scored, batch = self._score_and_decide(parts)
            else:  # so that the poll before is concluded meanwhile
                states, scored, batch = await asyncio.to_thread(self._score_and_decide, parts)
            self._hold(parts, states)
        return Computed(poll, parts, scored, batch)

    def _score_and_decide(self, parts: list[Part]) -> tuple[AccountStates, Scored, MicroBatch]:
        """Rounds, features, GRU, decide: what needs the processor alone."""
        thresholds = self.thresholds  # new ones may come while a thread is at it
        states, scored, batch = self._score(parts, thresholds)
        self._decide(parts, scored, thresholds)
        return states, scored, batch

    async def conclude(self, computed: Computed) -> None:
        """Publish, save, ack.

        Polls are concluded one at a time, in order; the next one may be computed meanwhile.
        """
        # The group may have taken partitions away since, or a save have met another watermark.
        parts = [p for p in computed.parts if self._ownership.owns(p.partition, p.owned)]
        if not parts:
            return
        with self._metrics.timed("publish"):
            parts, appended = await self._publish(parts)
        if not parts:
            return
        self._observe(computed)
        with self._metrics.timed("save"):
            await self._save(parts, appended)
        with self._metrics.timed("ack"):
            self._ack(computed.poll, parts)

    # decode ------------------------------------------------------------------------------

    def _decode(self, poll: Poll) -> list[Part]:
        """Records to transactions; what cannot be scored is set aside with its reason."""
        return [self._decoder.part(partition, chunk) for partition, chunk in poll.chunks.items()]

    # load, drop applied ------------------------------------------------------------------

    async def _load(self, parts: list[Part]) -> list[Part]:
        """States with their watermarks, merchants' features, and what is past the watermarks.

        A part that does not continue its partition's states is left out: the log is read
        back to where they are.
        """
        parts = [part for part in parts if self._ownership.is_assigned(part.partition)]
        for part in parts:
            part.owned = self._ownership.owned(part.partition)
        await self._load_all(parts)
        for part in parts:
            if part.owned is not None:
                part.begin = part.owned.computed_to
                self._drop_applied(part)
                for forget in part.forgets:
                    part.values[forget.row] = None
                part.kept = _of_these(
                    part,
                    await self._ownership.published(part.partition, part.owned, part.records),
                )
                self._metrics.scores_recovered.inc(len(part.kept))
        # The group may have taken partitions away during the waits.
        return [part for part in parts if self._ownership.owns(part.partition, part.owned)]

    async def _load_all(self, parts: list[Part]) -> None:
        """Account states and watermarks, and what is not held in memory of merchants."""
        if self._merchants is None:
            await self._load_values(parts)
            return
        wanted = self._merchants.look(
            [transaction.merchant_id for part in parts for transaction in part.transactions],
            np.array([time for part in parts for time in part.sent_ms], np.int64),
        )
        if len(wanted.missing):
            await self._together(self._load_values(parts), self._merchants.fill(wanted))
        else:
            await self._load_values(parts)
        start = 0
        for part in parts:
            stop = start + len(part.transactions)
            part.merchant_raw = wanted.raw[start:stop]
            start = stop

    async def _load_values(self, parts: list[Part]) -> None:
        """Ask the store for what is not held in memory, and for the watermarks."""
        again = []
        for part, reply in zip(parts, await self._ask(parts), strict=True):
            known = part.owned
            part.owned = await self._ownership.accept(part.partition, part.chunk, reply.watermark)
            if part.owned is not None and part.owned is not known:
                if known is None and part.owned.watermark == reply.watermark:
                    continue
                again.append(part)  # what is at hand is of another watermark
        for part, reply in zip(again, await self._ask(again), strict=True):
            known = part.partition_owned
            part.owned = await self._ownership.accept(part.partition, part.chunk, reply.watermark)
            if part.owned is not None and part.owned is not known:
                await self._ownership.seek_back(part.partition, part.owned)
                part.owned = None

    async def _ask(self, parts: list[Part]) -> list[LoadResult]:
        """Fill ``values`` from memory and store; the store's replies, for their watermarks."""
        if not parts:
            return []
        requests = []
        for part in parts:
            held = part.owned.states if part.owned is not None else {}
            accounts = part.accounts
            part.values = values = [held.get(account) for account in accounts]
            absent = [i for i, value in enumerate(values) if value is None]
            part.asked = [i for i in absent if accounts[i] not in held]
            requests.append(Load(part.partition, [accounts[i] for i in part.asked]))
        replies = await self._patience.retry_redis(lambda: self._store.load(requests))
        for part, reply in zip(parts, replies, strict=True):
            for i, value in zip(part.asked, reply.states, strict=True):
                part.values[i] = value
        return replies

    def _drop_applied(self, part: Part) -> None:
        """Leave only what is past the watermark."""
        next_offset = part.begin
        if part.chunk.begin >= next_offset:
            return
        before = len(part.records) + len(part.rejected)
        applied = bisect_left(part.records, next_offset, key=lambda record: record.offset)
        del part.records[:applied]
        del part.transactions[:applied]
        del part.sent_ms[:applied]
        del part.timestamps_ms[:applied]
        del part.is_past[:applied]
        del part.rows[:applied]
        if part.merchant_raw is not None:
            part.merchant_raw = part.merchant_raw[applied:]
        part.rejected = [item for item in part.rejected if item[0].offset >= next_offset]
        part.forgets = [forget for forget in part.forgets if forget.offset >= next_offset]
        self._metrics.records_skipped.labels("applied").inc(
            before - len(part.records) - len(part.rejected)
        )

    # rounds, features, GRU ---------------------------------------------------------------

    def _score(
        self, parts: list[Part], thresholds: DecisionThresholds
    ) -> tuple[AccountStates, Scored, MicroBatch]:
        """Advance the states of all parts together."""
        batch = columns(parts, self._further_fields, thresholds.review)
        values = [value for part in parts for value in part.values]
        states, scored, loaded, refused = self._scorer.score(values, batch)
        n_loaded = first_row = 0
        for part in parts:
            n_loaded += int(np.count_nonzero(loaded[first_row:][part.asked]))
            first_row += len(part.accounts)
        n_cached = int(np.count_nonzero(loaded)) - n_loaded
        counter = self._metrics.states
        counter.labels("loaded").inc(n_loaded)
        counter.labels("refused").inc(refused)
        counter.labels("cached").inc(n_cached)
        counter.labels("missing").inc(len(values) - n_cached - n_loaded - refused)
        counter.labels("expired").inc(scored.expired)
        if refused:
            absent = ~loaded & np.array([value is not None for value in values], bool)
            of_refused = np.flatnonzero(absent[batch.row]).tolist()
            for part in parts:
                part.refused = part.indices(of_refused)
        return states, scored, batch

    # decide ------------------------------------------------------------------------------

    def _decide(self, parts: list[Part], scored: Scored, thresholds: DecisionThresholds) -> None:
        """Scores and decisions to records to publish."""
        for part in parts:
            silent = scored.repeated[part.scored].copy()  # transactions of which nothing is said
            for i in part.indices(scored.failed):
                silent[i] = True
                error = scored.failed[i + part.scored.start]
                reason = "id_conflict" if error == ID_CONFLICT else "computation"
                part.rejected.append((part.records[i], reason, error))
            part.letters = [
                self._dead_letters.letter(part.partition, *item)
                for item in part.rejected
                if item[0].offset >= part.partition_owned.alerts_from or item[0].offset in part.kept
            ]
            part.new = np.flatnonzero(~silent).tolist()
            part.said = len(part.new)
            if part.kept:
                part.new = [i for i in part.new if part.records[i].offset not in part.kept]
                self._flag(part, self._kept(part, silent, thresholds))
                self._note_kept(part, silent)
        self._say(parts, scored, thresholds)
        self._alert(parts, scored)

    def _say(self, parts: list[Part], scored: Scored, thresholds: DecisionThresholds) -> None:
        """Scores of the transactions that have none yet, of all parts together."""
        at = np.array([i + part.scored.start for part in parts for i in part.new], np.intp)
        choices = thresholds.decide(scored.score[at]).tolist()
        decisions = [DECISIONS[choice] for choice in choices]
        values = self._encoder.encode(
            [part.transactions[i] for part in parts for i in part.new],
            [part.sent_ms[i] for part in parts for i in part.new],
            [
                prefix + str(part.records[i].offset)
                for part in parts
                for prefix in [source_prefix(self._topic, part.partition)]
                for i in part.new
            ],
            scored.score[at],
            decisions,
            scored.raw[at],
        )
        for i in np.flatnonzero(choices).tolist():
            values[i] = with_thresholds(values[i], thresholds)
        weights = scored.merchant_weight[at]
        for i in np.flatnonzero(weights < WEIGHT_MAX).tolist():
            values[i] = with_merchant_weight(values[i], int(weights[i]))
        self._tell_out_of_range(values, scored, at)
        start = 0
        for part in parts:
            stop = start + len(part.new)
            for i in part.refused:
                place = start + bisect_left(part.new, i)
                if place < stop and part.new[place - start] == i:
                    values[place] = with_refused_state(values[place])
            records = [part.records[i] for i in part.new]
            part.scores = [
                Outgoing(record.key, value)
                for record, value in zip(records, values[start:stop], strict=True)
            ]
            if any(choices[start:stop]):
                said = zip(part.new, values[start:stop], decisions[start:stop], strict=True)
                self._flag(part, said)
            for i in np.flatnonzero(
                (weights[start:stop] < WEIGHT_MAX) | np.array(choices[start:stop], bool)
            ).tolist():
                weight = int(weights[start + i])
                self._note(part, part.new[i], decisions[start + i], weight)
            start = stop

    def _tell_out_of_range(self, values: list[bytes], scored: Scored, at: NDArray[np.intp]) -> None:
        """Scores with inputs that training did not see say so, and they are counted."""
        if scored.outside is None:
            return
        outside = scored.outside[at]
        for i in np.flatnonzero(outside.any(axis=1)).tolist():
            values[i] = with_out_of_range(values[i], self._names[outside[i]].tolist())
        count = outside.sum(axis=0)
        for column in np.flatnonzero(count).tolist():
            self._metrics.out_of_range.labels(self._names[column]).inc(int(count[column]))

    def _note_kept(self, part: Part, silent: NDArray[np.bool_]) -> None:
        """What is to be remembered of transactions whose score was published before.

        Their notes may be lost with the states, or were not written before a worker died.
        """
        for i, (record, skip) in enumerate(zip(part.records, silent.tolist(), strict=True)):
            kept = part.kept.get(record.offset)
            if kept is not None and not skip:
                decision, weight = kept.score.decision, kept.score.weight
                if decision != APPROVE or weight < WEIGHT_MAX:
                    self._note(part, i, decision, weight)

    def _note(self, part: Part, i: int, decision: str, weight: int) -> None:
        """Remember a transaction until its labels come, unless it would be forgotten by now."""
        record, transaction = part.records[i], part.transactions[i]
        if self._clock_ms() - record.timestamp > NOTE_EXPIRY_MS:
            return
        if _is_warm(record):  # it raised no alert
            decision = APPROVE
            if weight == WEIGHT_MAX:
                return
        of = transaction_hash(transaction.transaction_id)
        part.notes.append(ScoredNote(transaction.merchant_id, of, decision, weight))

    def _kept(
        self, part: Part, silent: NDArray[np.bool_], thresholds: DecisionThresholds
    ) -> Iterator[tuple[int, bytes, str]]:
        """Transactions whose score was published before, with the score and its decision."""
        for i, (record, skip) in enumerate(zip(part.records, silent.tolist(), strict=True)):
            kept = part.kept.get(record.offset)
            if kept is not None and not skip:
                value, decision = kept.value, kept.score.decision
                if decision != APPROVE and kept.score.thresholds is None:
                    # An older version published it, and did not say what decided.
                    value = with_thresholds(value, thresholds)
                yield i, value, decision

    def _flag(self, part: Part, said: Iterable[tuple[int, bytes, str]]) -> None:
        """Scores at or over the review threshold are to raise alerts, but not while warming up."""
        alerts_from = part.partition_owned.alerts_from
        for i, score, decision in said:
            record = part.records[i]
            if decision != APPROVE and record.offset >= alerts_from and not _is_warm(record):
                part.flagged.append((i, score, decision))

    def _alert(self, parts: list[Part], scored: Scored) -> None:
        """Alerts of what is flagged; their reasons are found in one batch."""
        at = [i + part.scored.start for part in parts for i, _, _ in part.flagged]
        if not at:
            return
        before = np.stack([scored.before[i] for i in at])
        reasons = iter(self._explainer.explain(scored.raw[at], before))
        for part in parts:
            for i, score, decision in part.flagged:
                record = part.records[i]
                self._metrics.alerts.labels(decision).inc()
                alert = encode_alert(score, next(reasons), self._clock_ms())
                part.alerts.append(Outgoing(record.key, alert))

    def _hold(self, parts: list[Part], states: AccountStates) -> None:
        """Hold what is computed in memory; the next poll continues it."""
        begins = np.repeat([part.begin for part in parts], [len(part.accounts) for part in parts])
        changed = np.flatnonzero(states.last_offset >= begins)
        values = self._scorer.codec.encode(states, changed)
        first_row = start = 0
        for part in parts:
            last_row = first_row + len(part.accounts)
            stop = start + int(np.count_nonzero(changed[start:] < last_row))
            accounts = [part.accounts[row - first_row] for row in changed[start:stop].tolist()]
            part.changed = accounts, values[start:stop]
            if part.forgets:
                last = {part.accounts[forget.row]: forget.row for forget in part.forgets}
                alive = set((changed[start:stop] - first_row).tolist())
                gone = [account for account, row in last.items() if row not in alive]
                part.changed = accounts + gone, [*values[start:stop], *[None] * len(gone)]
            part.partition_owned.remember(*part.changed)
            part.partition_owned.computed_to = part.end
            first_row, start = last_row, stop

    # publish -----------------------------------------------------------------------------

    async def _publish(self, parts: list[Part]) -> tuple[list[Part], dict[int, AppendResult]]:
        """All that the parts say; the parts that are still ours, and where their scores went."""
        if self._transactions is not None:
            return await self._commit(parts, self._transactions)
        return parts, await self._publisher.publish(
            {part.partition: part.scores for part in parts if part.scores},
            [alert for part in parts for alert in part.alerts],
            [letter for part in parts for letter in part.letters],
        )

    async def _commit(
        self, parts: list[Part], transactions: Transactions
    ) -> tuple[list[Part], dict[int, AppendResult]]:
        """A transaction of Kafka for each part that says anything or moves the group's offset."""
        said = {}
        for part in parts:
            owned = part.partition_owned
            if part.scores or part.alerts or part.letters or part.end > owned.committed:
                said[part.partition] = PartOutput(
                    part.scores,
                    part.alerts,
                    part.letters,
                    LogOffset(max(part.end, owned.committed), owned.log_id),
                    owned.tenure,
                )
        committed = await transactions.commit(said)
        ours = []
        for part in parts:
            if part.partition in said:
                if part.partition not in committed:
                    self._ownership.fenced(part.partition, part.partition_owned)
                    continue
                part.partition_owned.committed = said[part.partition].next_offset
            ours.append(part)
        return ours, {p: where for p, where in committed.items() if where is not None}

    def _observe(self, computed: Computed) -> None:
        """Latency and the like, at the moment the scores are acknowledged."""
        batch, scored = computed.batch, computed.scored
        if not len(batch):
            return
        now_ms = self._clock_ms()
        metrics = self._metrics
        applied = ~scored.repeated
        applied[list(scored.failed)] = False
        self._observe_times(computed.parts, applied, now_ms)
        metrics.micro_batch.observe([len(batch)])
        metrics.score.observe(scored.score[applied])
        metrics.event_age.set((now_ms - int(batch.timestamp_ms.max())) / 1000.0)
        metrics.duplicate_transactions.inc(int(scored.repeated.sum()))
        metrics.id_conflicts.inc(int(scored.conflicting.sum()))
        for part in computed.parts:
            found = np.flatnonzero(scored.conflicting[part.scored])
            if len(found):
                offset = part.records[int(found[0])].offset
                self._conflicts.tell(self._topic, part.partition, offset, now_ms, len(found))

    def _observe_times(self, parts: list[Part], applied: NDArray[np.bool_], now_ms: int) -> None:
        """Latency of what was applied, and whose clocks are off."""
        records = [record.timestamp for part in parts for record in part.records]
        created = np.array(records, np.int64)
        sent = np.array([ms for part in parts for ms in part.sent_ms], np.int64)
        is_past = np.array([past for part in parts for past in part.is_past], bool)
        is_timed = applied & are_record_times(created)
        age_ms = now_ms - created[is_timed]
        metrics, tolerance_ms = self._metrics, self._tolerance_ms
        metrics.latency.observe(np.maximum(age_ms[age_ms <= BACKFILLED_FROM_MS], 0) / 1000.0)
        metrics.clock_skew.inc(int((age_ms < 0).sum()))
        ahead_ms = (sent - created)[is_timed]
        behind = (ahead_ms < -tolerance_ms) & ~is_past[is_timed]
        metrics.event_time_skew.labels("ahead").inc(int((ahead_ms > tolerance_ms).sum()))
        metrics.event_time_skew.labels("behind").inc(int(behind.sum()))

    # save --------------------------------------------------------------------------------

    async def _save(self, parts: list[Part], appended: dict[int, AppendResult]) -> None:
        """States and watermarks: each part whole, or nothing of it."""
        saves = []
        for part in parts:
            where = appended.get(part.partition)
            if where is not None:
                await self._ownership.notice_foreign_scores(
                    part.partition, part.partition_owned, where, part.end
                )
            saves.append(self._save_of(part, where))
        await self._remember(parts)
        stands = await self._save_all(parts, saves)
        for part, save, saved in zip(parts, saves, stands, strict=True):
            part.saved = saved
            if not saved:
                await self._ownership.follow(part.partition, part.partition_owned, part.chunk)
                continue
            owned = part.partition_owned
            owned.watermark, owned.neighbour = save.watermark, owned.watermark
            owned.next_offset = part.end
            owned.forget_states(self._most_states_held())
            self._metrics.forgotten.inc(len(part.forgets))
            self._metrics.transactions.inc(part.said)

    async def _remember(self, parts: list[Part]) -> None:
        """Write notes before the states: a worker that dies here comes to these transactions again.

        A note that is written again is the same.
        """
        notes = [note for part in parts for note in part.notes] if self._is_serving else []
        if notes:
            await self._patience.retry_redis(lambda: self._merchant_store.add({}, notes))

    async def _save_all(self, parts: list[Part], saves: list[Save]) -> list[bool]:
        """Save states, and add to merchants' profiles meanwhile; which states stand."""
        counts = self._count(parts)
        saving = self._patience.retry_redis(lambda: self._store.save(saves))
        if not counts:
            return await saving
        stands, _ = await self._together(
            saving,
            self._patience.retry_redis(lambda: self._merchant_store.add(counts, [])),
        )
        return list(stands)

    def _count(self, parts: list[Part]) -> dict[int, Counter[str]]:
        """Transactions that are scored for the first time, by time bucket and merchant."""
        counts: dict[int, Counter[str]] = {}
        for part in parts if self._merchant_counts else ():
            transactions, times = part.transactions, part.sent_ms
            names = [transactions[i].merchant_id for i in part.new]
            buckets = [times[i] // BUCKET_MS for i in part.new]
            for bucket in set(buckets):  # almost always one
                found = names
                if buckets.count(bucket) < len(buckets):
                    found = [n for n, b in zip(names, buckets, strict=True) if b == bucket]
                counts.setdefault(bucket, Counter()).update(found)
        return counts

    def _save_of(self, part: Part, where: AppendResult | None) -> Save:
        owned = part.partition_owned
        watermark = self._ownership.watermark_at(owned, part.end, where).to_bytes()
        owned.neighbour = watermark
        return Save(part.partition, owned.watermark, watermark, *part.changed)

    def _most_states_held(self) -> int:
        """Of one partition; never fewer than a poll that is computed and not saved may have."""
        partitions = max(1, len(self._ownership.assigned()))
        return max(self._cached_states_max // partitions, self._micro_batch_max)

    # ack ---------------------------------------------------------------------------------

    def _ack(self, poll: Poll, parts: list[Part]) -> None:
        """What is saved may be committed, if it was not before."""
        for part in parts if self._transactions is None else ():
            if part.saved and self._ownership.owns(part.partition, part.owned):
                log_id = part.partition_owned.log_id
                poll.applied[part.partition] = LogOffset(part.end, log_id)
        if any(part.saved for part in parts):
            self._health.moved()


def columns(
    parts: list[Part],
    further: ExtraFields = NO_EXTRA_FIELDS,
    review: float = NEVER,
) -> MicroBatch:
    """The parts' transactions as columns; sets where each part stands in them."""
    transactions: list[Transaction] = []
    records: list[Record] = []
    rows: list[int] = []
    sent_ms: list[int] = []
    timestamps_ms: list[int] = []
    accounts = 0
    for part in parts:
        part.scored = slice(len(records), len(records) + len(part.records))
        transactions += part.transactions
        records += part.records
        sent_ms += part.sent_ms
        timestamps_ms += part.timestamps_ms
        rows += [row + accounts for row in part.rows] if accounts else part.rows
        accounts += len(part.accounts)
    amount = np.array([transaction.amount for transaction in transactions], np.float64)
    sent = np.array(sent_ms, np.int64)
    created = np.array([record.timestamp for record in records], np.int64)
    return MicroBatch(
        row=np.array(rows, np.intp),
        amount=amount,
        timestamp_ms=np.array(timestamps_ms, np.int64),
        record_ms=np.where(are_record_times(created), created, sent),
        offset=np.array([record.offset for record in records], np.int64),
        id_hash=id_hashes(
            np.array([transaction_hash(t.transaction_id) for t in transactions], np.uint64),
            np.array([transaction_hash(t.merchant_id) for t in transactions], np.uint64),
            amount,
            sent,
        ),
        merchant_raw=_merchant_raw(parts),
        fields=further.columns(transactions),
        explain_from=_explain_from(parts, review),
    )


def _of_these(part: Part, kept: dict[int, LoggedScore]) -> dict[int, LoggedScore]:
    """Published scores without those of a log before this one, which had the same offsets."""
    if not kept:
        return kept
    ids = {r.offset: t.transaction_id for r, t in zip(part.records, part.transactions, strict=True)}
    found = {offset: score.of(ids[offset]) for offset, score in kept.items()}
    return {offset: score for offset, score in found.items() if score is not None}


def _merchant_raw(parts: list[Part]) -> NDArray[np.float32]:
    """float32[n, M]: merchants' features; those that a published score records stay."""
    tables = [np.zeros((0, len(MERCHANT_FEATURES)), np.float32)]
    for part in parts:
        if part.merchant_raw is None:
            tables.append(np.zeros((len(part.records), len(MERCHANT_FEATURES)), np.float32))
            continue
        if part.kept:
            for i, record in enumerate(part.records):
                kept = part.kept.get(record.offset)
                recorded = kept.merchant_raw() if kept is not None else None
                if recorded is not None:
                    part.merchant_raw[i] = recorded
        tables.append(part.merchant_raw)
    return np.concatenate(tables)


def _explain_from(parts: list[Part], review: float) -> NDArray[np.float32]:
    """float32[n]: the score from which on a transaction may raise an alert.

    A score that was published keeps its decision, whatever comes out now.
    """
    found = np.full(sum(len(part.records) for part in parts), review, np.float32)
    for part in parts:
        if part.kept:
            for i, record in enumerate(part.records, part.scored.start):
                kept = part.kept.get(record.offset)
                if kept is not None:
                    found[i] = NEVER if kept.score.decision == APPROVE else 0.0
    return found


def _is_warm(record: Record) -> bool:
    return bool(record.headers) and any(name == WARM_HEADER for name, _ in record.headers)
