"""Data that the steps of the processor hand on: a partition's batch, and a computed poll."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES
from model.transaction import Transaction
from pipeline.kafka.polls import Chunk, Poll, Record
from pipeline.kafka.producer import Outgoing
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.decision import DECISIONS
from pipeline.messages.extra_fields import NO_EXTRA_FIELDS, ExtraFields
from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.scorer import BatchScores, MicroBatch, id_hashes
from pipeline.storage.merchant_profile import transaction_hash
from pipeline.storage.transaction_note import ScoredNote
from pipeline.timestamps import are_record_times

APPROVE = DECISIONS[0]

UNREACHABLE = 2.0
"""A threshold that no score can reach."""


@dataclass(frozen=True)
class ForgetRequest:
    """A control record that asks to forget an account.

    Attributes:
        offset: offset of its record.
        row: row of the account from there on; its state starts empty.
    """

    offset: int
    row: int


@dataclass
class PartitionBatch:
    """A partition's part of a micro-batch, on its way through the steps.

    Attributes:
        records, transactions: the valid ones, in log order.
        sent_ms: event time of each transaction, as sent and published.
        timestamps_ms: event time of each transaction for the account's features and state.
        is_history: whether each record is marked as history.
        rows: index of each transaction's account in ``accounts``.
        accounts: distinct account ids, except that a forgotten account gets a second row.
        forgets: requests to forget an account.
        merchant_raw: float32[n, M], merchants' features; None if the checkpoint uses none.
        rejected: records that cannot be scored, each with reason and error.
        owned: the partition, once its watermark is known.
        values: states of ``accounts``.
        loaded_rows: rows of ``values`` that came from the store; the others were in memory.
        published: scores that were published before, by offset.
        begin: the first offset that was not computed before.
        invalid_states: indices of the transactions whose account had an invalid state.
        span: the indices of this batch within the micro-batch.
        new: indices of the transactions that get their first score.
        scored_count: number of transactions with a score, old or new.
        scores, alerts, dead_letters: records to publish.
        alert_candidates: index, score and decision of each transaction that raises an alert.
        notes: notes of transactions for their labels.
        changed: accounts and states to save; a state of None is deleted.
        is_saved: whether they and the watermark stand in the store.
    """

    partition: int
    chunk: Chunk
    records: list[Record] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    sent_ms: list[int] = field(default_factory=list)
    timestamps_ms: list[int] = field(default_factory=list)
    is_history: list[bool] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)
    forgets: list[ForgetRequest] = field(default_factory=list)
    merchant_raw: NDArray[np.float32] | None = None
    rejected: list[tuple[Record, str, str]] = field(default_factory=list)
    owned: OwnedPartition | None = None
    values: list[bytes | None] = field(default_factory=list)
    loaded_rows: list[int] = field(default_factory=list)
    published: dict[int, LoggedScore] = field(default_factory=dict)
    begin: int = 0
    invalid_states: list[int] = field(default_factory=list)
    span: slice = field(default_factory=lambda: slice(0, 0))
    new: list[int] = field(default_factory=list)
    scored_count: int = 0
    scores: list[Outgoing] = field(default_factory=list)
    alerts: list[Outgoing] = field(default_factory=list)
    dead_letters: list[Outgoing] = field(default_factory=list)
    alert_candidates: list[tuple[int, bytes, str]] = field(default_factory=list)
    notes: list[ScoredNote] = field(default_factory=list)
    changed: tuple[list[str], Sequence[bytes | None]] = field(default_factory=lambda: ([], []))
    is_saved: bool = False

    @property
    def end(self) -> int:
        """The first offset after this batch."""
        return max(self.chunk.end, self.begin)

    @property
    def partition_owned(self) -> OwnedPartition:
        """The partition, which is known from the load on."""
        assert self.owned is not None
        return self.owned

    def indices(self, of_micro_batch: Iterable[int]) -> list[int]:
        """Select this batch's indices of the micro-batch, counted from the batch's start."""
        span = self.span
        return [i - span.start for i in of_micro_batch if span.start <= i < span.stop]

    def drop_before(self, offset: int) -> int:
        """Drop everything before an offset.

        Returns:
            the number of records dropped.
        """
        before = len(self.records) + len(self.rejected)
        applied = bisect_left(self.records, offset, key=lambda record: record.offset)
        del self.records[:applied]
        del self.transactions[:applied]
        del self.sent_ms[:applied]
        del self.timestamps_ms[:applied]
        del self.is_history[:applied]
        del self.rows[:applied]
        if self.merchant_raw is not None:
            self.merchant_raw = self.merchant_raw[applied:]
        self.rejected = [item for item in self.rejected if item[0].offset >= offset]
        self.forgets = [forget for forget in self.forgets if forget.offset >= offset]
        return before - len(self.records) - len(self.rejected)

    def keep_published(self, published: dict[int, LoggedScore]) -> None:
        """Take published scores; drop those of an earlier log, which had the same offsets."""
        if not published:
            self.published = published
            return
        pairs = zip(self.records, self.transactions, strict=True)
        ids = {record.offset: transaction.transaction_id for record, transaction in pairs}
        found = {offset: score.of(ids[offset]) for offset, score in published.items()}
        self.published = {offset: score for offset, score in found.items() if score is not None}


@dataclass(frozen=True)
class ComputedPoll:
    """A poll that is computed but not published and saved yet."""

    poll: Poll
    batches: list[PartitionBatch]
    scores: BatchScores
    micro_batch: MicroBatch


def micro_batch_of(
    batches: list[PartitionBatch],
    extra_fields: ExtraFields = NO_EXTRA_FIELDS,
    review: float = UNREACHABLE,
) -> MicroBatch:
    """Join the batches' transactions as columns, and set each batch's span in them.

    Args:
        extra_fields: the checkpoint's extra fields.
        review: the score that raises an alert.
    """
    transactions: list[Transaction] = []
    records: list[Record] = []
    rows: list[int] = []
    sent_ms: list[int] = []
    timestamps_ms: list[int] = []
    accounts = 0
    for batch in batches:
        batch.span = slice(len(records), len(records) + len(batch.records))
        transactions += batch.transactions
        records += batch.records
        sent_ms += batch.sent_ms
        timestamps_ms += batch.timestamps_ms
        rows += [row + accounts for row in batch.rows] if accounts else batch.rows
        accounts += len(batch.accounts)
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
        merchant_raw=_merchant_raw(batches),
        fields=extra_fields.columns(transactions),
        explain_from=_explain_from(batches, review),
    )


def _merchant_raw(batches: list[PartitionBatch]) -> NDArray[np.float32]:
    """Join merchants' features, float32[n, M]; those in a published score take precedence."""
    tables = [np.zeros((0, len(MERCHANT_FEATURES)), np.float32)]
    for batch in batches:
        if batch.merchant_raw is None:
            tables.append(np.zeros((len(batch.records), len(MERCHANT_FEATURES)), np.float32))
            continue
        if batch.published:
            for i, record in enumerate(batch.records):
                published = batch.published.get(record.offset)
                recorded = published.merchant_raw() if published is not None else None
                if recorded is not None:
                    batch.merchant_raw[i] = recorded
        tables.append(batch.merchant_raw)
    return np.concatenate(tables)


def _explain_from(batches: list[PartitionBatch], review: float) -> NDArray[np.float32]:
    """Return the lowest score of each transaction that may raise an alert, float32[n].

    A published score keeps its decision, whatever the computation gives now.
    """
    found = np.full(sum(len(batch.records) for batch in batches), review, np.float32)
    for batch in batches:
        if batch.published:
            for i, record in enumerate(batch.records, batch.span.start):
                published = batch.published.get(record.offset)
                if published is not None:
                    found[i] = UNREACHABLE if published.score.decision == APPROVE else 0.0
    return found
