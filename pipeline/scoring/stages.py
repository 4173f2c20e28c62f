"""Stages of a partition's part of a poll; each step makes the next one from the last.

    DecodedPart ── load ──▶ LoadedPart ── score ──▶ ScoredPart ── decide ──▶ DecidedPart

No stage changes. Lists and arrays in it are never written to once it is made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES
from model.transaction import Transaction
from pipeline.kafka.polls import Chunk, Poll, Record
from pipeline.kafka.producer import Outgoing
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.decision import APPROVE
from pipeline.messages.extra_fields import NO_EXTRA_FIELDS, ExtraFields
from pipeline.scoring.answers import RecordAnswer
from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.scorer import BatchScores, MicroBatch, id_hashes
from pipeline.storage.merchant_profile import transaction_hash
from pipeline.storage.transaction_note import ScoredNote
from pipeline.timestamps import are_record_times

UNREACHABLE = 2.0
"""A threshold that no score can reach."""


class ForgetRequest(msgspec.Struct, frozen=True):
    """A control record that asks to forget an account.

    Attributes:
        offset: offset of its record.
        row: row of the account from there on; its state starts empty.
    """

    offset: int
    row: int


class DecodedPart(msgspec.Struct, frozen=True, eq=False):
    """A partition's records, decoded.

    Attributes:
        records, transactions: the valid ones, in log order.
        sent_ms: event time of each transaction, as sent and published.
        timestamps_ms: event time of each transaction for the account's features and state.
        is_history: whether each record is marked as history.
        rows: index of each transaction's account in ``accounts``.
        accounts: distinct account ids, except that a forgotten account gets a second row.
        forgets: requests to forget an account.
        rejected: records that cannot be scored, each with reason and error.
        gateways: gateway of each record that asks for an answer, by offset.
    """

    partition: int
    chunk: Chunk
    records: Sequence[Record]
    transactions: Sequence[Transaction]
    sent_ms: Sequence[int]
    timestamps_ms: Sequence[int]
    is_history: Sequence[bool]
    rows: Sequence[int]
    accounts: list[str]
    forgets: Sequence[ForgetRequest]
    rejected: Sequence[tuple[Record, str, str]]
    gateways: dict[int, str]

    def since(self, offset: int) -> DecodedPart:
        """Return the part without what lies before an offset; its accounts stay."""
        applied = bisect_left(self.records, offset, key=lambda record: record.offset)
        return DecodedPart(
            self.partition,
            self.chunk,
            self.records[applied:],
            self.transactions[applied:],
            self.sent_ms[applied:],
            self.timestamps_ms[applied:],
            self.is_history[applied:],
            self.rows[applied:],
            self.accounts,
            [forget for forget in self.forgets if forget.offset >= offset],
            [item for item in self.rejected if item[0].offset >= offset],
            {at: gateway for at, gateway in self.gateways.items() if at >= offset},
        )

    @property
    def size(self) -> int:
        """Number of records, valid or rejected, without control records."""
        return len(self.records) + len(self.rejected)


class LoadedPart(msgspec.Struct, frozen=True, eq=False):
    """A part that continues its partition's states, with what its computation needs.

    Attributes:
        decoded: its records from ``begin`` on.
        owned: its partition.
        begin: the first offset that was not computed before.
        end: the first offset after this part.
        values: states of its accounts.
        loaded_rows: rows of ``values`` that came from the store; the others were in memory.
        merchant_raw: float32[n, M], merchants' features, those of published scores included;
            None if the checkpoint uses none.
        published: scores that were published before, by offset.
    """

    decoded: DecodedPart
    owned: OwnedPartition
    begin: int
    end: int
    values: Sequence[bytes | None]
    loaded_rows: Sequence[int]
    merchant_raw: NDArray[np.float32] | None
    published: dict[int, LoggedScore]


class ScoredPart(msgspec.Struct, frozen=True, eq=False):
    """A part whose states are computed.

    Attributes:
        start: index of its first transaction in the micro-batch.
        invalid_states: indices of the transactions whose account had an invalid state.
        changed: accounts and states to save; a state of None is deleted.
    """

    loaded: LoadedPart
    start: int
    invalid_states: Collection[int]
    changed: tuple[list[str], Sequence[bytes | None]]

    def indices(self, of_micro_batch: Iterable[int]) -> list[int]:
        """Select this part's indices of the micro-batch, counted from the part's start."""
        start = self.start
        stop = start + len(self.loaded.decoded.records)
        return [i - start for i in of_micro_batch if start <= i < stop]


class DecidedPart(msgspec.Struct, frozen=True, eq=False):
    """A part with everything that is to be written.

    Attributes:
        partition, owned, decoded, end: number and state of its partition, its records, and the
            first offset after it; the same as in its earlier stages.
        new: indices of the transactions that get their first score.
        scored_count: number of transactions with a score, old or new.
        scores, alerts, dead_letters: records to publish.
        notes: notes of transactions for their labels.
        answers: of the records that ask for one.
    """

    scored: ScoredPart
    partition: int
    owned: OwnedPartition
    decoded: DecodedPart
    end: int
    new: Sequence[int]
    scored_count: int
    scores: Sequence[Outgoing]
    alerts: Sequence[Outgoing]
    dead_letters: Sequence[Outgoing]
    notes: Sequence[ScoredNote]
    answers: Sequence[RecordAnswer]


class ComputedPoll(msgspec.Struct, frozen=True, eq=False):
    """A poll that is computed but not published and saved yet."""

    poll: Poll
    parts: Sequence[DecidedPart]
    scores: BatchScores
    micro_batch: MicroBatch


def micro_batch_of(
    parts: Sequence[DecodedPart],
    merchant_raw: Sequence[NDArray[np.float32] | None],
    explain_from: NDArray[np.float32] | None = None,
    extra_fields: ExtraFields = NO_EXTRA_FIELDS,
) -> MicroBatch:
    """Join the parts' transactions as columns.

    Args:
        merchant_raw: float32[n, M] of each part, the merchants' features; None for zeros.
        explain_from: float32[n], the lowest score that gets reasons; None to give none.
        extra_fields: the checkpoint's extra fields.
    """
    transactions: list[Transaction] = []
    records: list[Record] = []
    rows: list[int] = []
    sent_ms: list[int] = []
    timestamps_ms: list[int] = []
    accounts = 0
    for part in parts:
        transactions += part.transactions
        records += part.records
        sent_ms += part.sent_ms
        timestamps_ms += part.timestamps_ms
        rows += [row + accounts for row in part.rows] if accounts else part.rows
        accounts += len(part.accounts)
    amount = np.array([transaction.amount for transaction in transactions], np.float64)
    sent = np.array(sent_ms, np.int64)
    created = np.array([record.timestamp for record in records], np.int64)
    if explain_from is None:
        explain_from = np.full(len(records), UNREACHABLE, np.float32)
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
        merchant_raw=_joined(parts, merchant_raw),
        fields=extra_fields.columns(transactions),
        explain_from=explain_from,
    )


def _joined(
    parts: Sequence[DecodedPart], merchant_raw: Sequence[NDArray[np.float32] | None]
) -> NDArray[np.float32]:
    """Join merchants' features, float32[n, M]."""
    m = len(MERCHANT_FEATURES)
    tables = [np.zeros((0, m), np.float32)]
    for part, raw in zip(parts, merchant_raw, strict=True):
        tables.append(np.zeros((len(part.records), m), np.float32) if raw is None else raw)
    return np.concatenate(tables)


def explain_from(parts: Sequence[LoadedPart], review: float) -> NDArray[np.float32]:
    """Return the lowest score of each transaction that may raise an alert, float32[n].

    A published score keeps its decision, whatever the computation gives now.
    """
    found = np.full(sum(len(part.decoded.records) for part in parts), review, np.float32)
    start = 0
    for part in parts:
        records = part.decoded.records
        if part.published:
            for i, record in enumerate(records, start):
                published = part.published.get(record.offset)
                if published is not None:
                    found[i] = UNREACHABLE if published.score.decision == APPROVE else 0.0
        start += len(records)
    return found
