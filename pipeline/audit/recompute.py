"""Recomputation of a partition's states from its log, with the worker's decoder and scorer.

A state depends on the account's transactions in the order of the log, and on the features that
each merchant had then. The transaction's published score records these features, so they are
read from there. Everything else is computed. `recur verify` and `recur state at` use this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.features.account import ACCOUNT_FEATURES
from model.features.merchant import MERCHANT_FEATURES
from pipeline.audit.account_filter import AccountFilter, AllAccounts
from pipeline.audit.score_reader import ScoreReader
from pipeline.kafka.partition_reader import OpenReader, kafka_readers
from pipeline.kafka.polls import Chunk
from pipeline.messages.scores import SECONDS_SINCE_LAST, RecordedScore
from pipeline.scoring.decoder import BatchDecoder
from pipeline.scoring.scorer import BatchScores, Scorer
from pipeline.scoring.stages import DecodedPart, micro_batch_of
from pipeline.settings import Settings

MICRO_BATCH = 8_192
"""Number of records that are computed together; a larger number is no faster."""

FIRST_PAUSE = -1.0
"""Value of the pause feature at an account's first transaction."""

_PAUSE_COLUMN = ACCOUNT_FEATURES.index(SECONDS_SINCE_LAST)


@dataclass(frozen=True)
class RecomputedBatch:
    """Transactions of a micro-batch, with their recomputed and published scores.

    Attributes:
        row: intp[n], row of each transaction's account.
        offset: int64[n].
        applied: bool[n], whether a score is due: the record is neither a repeat nor a failure.
        score: float32[n], recomputed.
        recorded: n scores, as first published; None without one.
        begins: bool[n], whether the account had no state before.
        is_complete: bool[n], whether the log holds the account's history from its begin.
        is_sure: bool[n], whether it does, and all features that the score depends on are known.
        seen: int64[n], applied transactions of the account in the log before this micro-batch.
        unexpected: source and account key of scores whose record is a repeat or no transaction.
        end: first offset after the micro-batch.
        records: number of its records in the log.
    """

    row: NDArray[np.intp]
    offset: NDArray[np.int64]
    applied: NDArray[np.bool_]
    score: NDArray[np.float32]
    recorded: Sequence[RecordedScore | None]
    begins: NDArray[np.bool_]
    is_complete: NDArray[np.bool_]
    is_sure: NDArray[np.bool_]
    seen: NDArray[np.int64]
    unexpected: Sequence[tuple[int, bytes]]
    end: int
    records: int


class RecomputedStates:
    """States of a partition's accounts, batch in memory as a worker advances them.

    Each account has a row. An account without a state has None, or an empty state (count 0).
    Memory: 0.6 kB for each account.

    Args:
        settings: limits of records.
        scorer: the model.
        is_whole: whether the log holds all histories from their begin, so that an account
            without a record so far had no transaction.

    Attributes:
        row_of: row of each account id.
        values: states as bytes, by row.
        lacks_features: bool[rows], whether a merchant's features were recorded nowhere, so that
            the state differs from a worker's.
    """

    def __init__(self, settings: Settings, scorer: Scorer, partition: int, is_whole: bool) -> None:
        self.row_of: dict[str, int] = {}
        self.values: list[bytes | None] = []
        self.lacks_features = np.zeros(0, bool)
        self._scorer = scorer
        self._decoder = BatchDecoder(settings, scorer.checkpoint)
        self._partition = partition
        self._is_whole = is_whole
        self._uses_merchants = scorer.checkpoint.header.features.uses_merchants
        self._begins_in_log = np.zeros(0, bool)
        self._seen = np.zeros(0, np.int64)

    def decode(self, chunk: Chunk) -> DecodedPart:
        """Decode records to transactions, by the worker's rules."""
        return self._decoder.decode(self._partition, chunk)

    def compute(self, part: DecodedPart, recorded: Sequence[RecordedScore | None]) -> Computation:
        """Compute the next states of a part's accounts, as a worker would, without keeping them."""
        m = len(MERCHANT_FEATURES)
        raw = np.zeros((len(part.records), m), np.float32)
        has_features = np.ones(len(part.records), bool)
        if self._uses_merchants and len(raw):
            found = [None if score is None else score.merchant_raw() for score in recorded]
            has_features[:] = [item is not None for item in found]
            known = [item for item in found if item is not None]
            raw[has_features] = np.array(known, np.float32).reshape(len(known), m)
        values = [self._value(account) for account in part.accounts]
        for forget in part.forgets:
            values[forget.row] = None
        batch = micro_batch_of([part], [raw], extra_fields=self._decoder.extra_fields)
        states, scored, _, _ = self._scorer.score(values, batch)
        after = self._scorer.codec.encode(states, np.arange(len(states)))
        return Computation(part, scored, after, has_features)

    def _value(self, account: str) -> bytes | None:
        row = self.row_of.get(account)
        return None if row is None else self.values[row]

    def keep(
        self, computed: Computation, recorded: Sequence[RecordedScore | None]
    ) -> RecomputedBatch:
        """Keep the computed states; return the transactions with their scores."""
        part, scored = computed.part, computed.scored
        # A forgotten account has two entries; its state is the last one.
        rows_of_part = [self.row_of.setdefault(a, len(self.row_of)) for a in part.accounts]
        self._grow()
        for index, value in zip(rows_of_part, computed.after, strict=True):
            self.values[index] = value
        row = np.array(rows_of_part, np.intp)[np.array(part.rows, np.intp)]
        applied = ~scored.duplicate
        applied[list(scored.failed)] = False
        begins = applied & (scored.raw[:, _PAUSE_COLUMN] == FIRST_PAUSE)
        seen = self._seen[row]
        is_complete, is_sure = self._judge(row, applied, begins, computed.has_features, recorded)
        np.add.at(self._seen, row[applied], 1)
        return RecomputedBatch(
            row=row,
            offset=np.array([record.offset for record in part.records], np.int64),
            applied=applied,
            score=scored.score,
            recorded=recorded,
            begins=begins,
            is_complete=is_complete,
            is_sure=is_sure,
            seen=seen,
            unexpected=(),
            end=part.chunk.end,
            records=len(part.chunk.records),
        )

    def _grow(self) -> None:
        more = len(self.row_of) - len(self.values)
        self.values += [None] * more
        if len(self.row_of) > len(self._seen):
            room = max(1024, len(self.row_of) - len(self._seen), len(self._seen))
            self.lacks_features = np.concatenate((self.lacks_features, np.zeros(room, bool)))
            whole = np.full(room, self._is_whole)
            self._begins_in_log = np.concatenate((self._begins_in_log, whole))
            self._seen = np.concatenate((self._seen, np.zeros(room, np.int64)))

    def _judge(
        self,
        row: NDArray[np.intp],
        applied: NDArray[np.bool_],
        begins: NDArray[np.bool_],
        has_features: NDArray[np.bool_],
        recorded: Sequence[RecordedScore | None],
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return ``is_complete`` and ``is_sure`` of :class:`RecomputedBatch`."""
        begun, lacks = self._begins_in_log, self.lacks_features
        if self._is_whole and has_features[applied].all() and not lacks[row].any():
            everything = np.ones(len(row), bool)
            return everything, everything
        complete, sure = np.zeros(len(row), bool), np.zeros(len(row), bool)
        for i in np.flatnonzero(applied).tolist():
            account = row[i]
            if begins[i]:
                lacks[account] = False
                score = recorded[i]
                begun[account] |= score is not None and score.begins
            lacks[account] |= not has_features[i]
            complete[i] = begun[account]
            sure[i] = begun[account] and not lacks[account]
        return complete, sure


@dataclass(frozen=True)
class Computation:
    """Result of computing a part.

    Attributes:
        after: next states of its accounts.
        has_features: bool[n], whether the merchant's features are recorded.
    """

    part: DecodedPart
    scored: BatchScores
    after: Sequence[bytes]
    has_features: NDArray[np.bool_]


class RecomputedPartition:
    """A partition's log, with the states recomputed from it up to any offset.

    An async context manager: it reads transactions and scores while it is open.

    Args:
        settings: address of the broker, names of the topics.
        scorer: the model.
        account_filter: selects the accounts to recompute; None selects all.
        open_reader: opens a reader of the log; None connects to the broker of the settings.
        scores_begin: offset in the scores partition before which scores are of another log.

    Attributes:
        begin: first offset from which the log holds all transactions and their scores. A history
            that begins before it cannot be computed.
        is_whole: whether no history can have begun before it.
        end: the offset up to which transactions may be read.
        next_offset: the offset up to which states are computed.
        states: states of the selected accounts.
    """

    def __init__(
        self,
        settings: Settings,
        scorer: Scorer,
        partition: int,
        account_filter: AccountFilter | None = None,
        open_reader: OpenReader | None = None,
        scores_begin: int = 0,
    ) -> None:
        self._settings = settings
        self._scorer = scorer
        self.partition = partition
        if isinstance(account_filter, AllAccounts):
            account_filter = None  # asking it of each record would only cost time
        self._admit = None if account_filter is None else account_filter.admit
        selects = None if account_filter is None else account_filter.selects
        open_reader = open_reader or kafka_readers(settings)
        self._records = open_reader(settings.topic("transactions"), partition, 0)
        self._scores = ScoreReader(settings, partition, selects, open_reader, scores_begin)
        self.begin = self.next_offset = self.end = 0

    async def __aenter__(self) -> RecomputedPartition:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._records)
            await stack.enter_async_context(self._scores)
            await self._find_begin()
            self._opened = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._opened.aclose()

    @property
    def scores(self) -> ScoreReader:
        """Scores of the partition."""
        return self._scores

    async def _find_begin(self) -> None:
        scores_begin = await self._scores.refresh_end()
        bounds = await self._records.bounds()
        self.begin = bounds.begin
        if scores_begin > 0 or self._settings.kafka_auto_offset_reset == "latest":
            # Retention has deleted scores, or no worker has read the first transactions.
            first = await self._scores.first_source()
            self.begin = max(self.begin, bounds.end if first is None else first)
        self.is_whole = self.begin == 0 and scores_begin == 0
        self.states = RecomputedStates(self._settings, self._scorer, self.partition, self.is_whole)
        self._records.skip_to(self.begin)
        self.next_offset, self.end = self.begin, bounds.end
        self._scores.set_sources(self.begin, max(self.begin, bounds.end))

    async def refresh_end(self) -> None:
        """Move the end to the current ends of the topics."""
        await self._scores.refresh_end()
        self.end = (await self._records.bounds()).end
        self._scores.set_sources(self.begin, max(self.begin, self.end))

    async def first_at(self, time_ms: int) -> int | None:
        """Return the first offset with this CreateTime or a later one; None without one."""
        return await self._records.first_at(time_ms)

    async def advance(self, until: int) -> AsyncIterator[RecomputedBatch]:
        """Compute the states up to the offset ``until``, and yield each micro-batch.

        Raises:
            PartitionReaderError: the broker does not answer.
            ScorerBrokenError: the computation fails for every transaction.
        """
        while self.next_offset < until:
            records = await self._records.read(min(until, self.end), MICRO_BATCH)
            end = min(until, self._records.position) if records else until
            read = len(records)
            if self._admit is not None:
                admit = self._admit
                records = [record for record in records if admit(record.key or b"")]
            part = self.states.decode(Chunk(self.next_offset, end, records))
            batch = await self._advance(part)
            self.next_offset = end
            yield replace(batch, records=read)

    async def _advance(self, part: DecodedPart) -> RecomputedBatch:
        sources = [record.offset for record in part.records]
        recorded = await self._scores.read(sources)
        computed = await asyncio.to_thread(self.states.compute, part, recorded)
        missed = [
            source
            for source, score, repeated in zip(
                sources, recorded, computed.scored.duplicate.tolist(), strict=True
            )
            if score is None and not repeated
        ]
        if missed and await self._scores.find_late(missed):
            recorded = await self._scores.read(sources)
            computed = await asyncio.to_thread(self.states.compute, part, recorded)
        batch = self.states.keep(computed, recorded)
        unexpected = self._scores.forget(part.chunk.end, batch.offset[batch.applied])
        return replace(batch, unexpected=unexpected)
