"""Count the scores of transactions: missing, single, duplicate, contradicting.

    async with TopicReader(settings, "scores", partitions) as scores:  # starts at the end
        ... transactions are sent ...
        counter.add(await scores.read())
    counter.missing, counter.duplicates

The readers do not use a consumer group, so they cannot disturb one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka_errors
from numpy.typing import NDArray

from pipeline.errors import RecurError
from pipeline.kafka.topics import TopicRole
from pipeline.messages.decision import DECISIONS
from pipeline.settings import Settings

READ_MAX_RECORDS = 4096
"""Limit of the records that one read returns."""

REQUEST_TIMEOUT_SECONDS = 10.0
"""Time without a reply after which the broker counts as unreachable."""

NOT_SCORED = -1
"""Index into DECISIONS of a transaction without a score."""

IndexOf = Callable[[Sequence[str]], NDArray[np.int64]]
"""Function from transaction ids to their numbers 0 to n - 1, or -1 for unknown ids."""


class ScoreFields(msgspec.Struct, frozen=True, gc=False):
    """Fields of a score that counting needs."""

    transaction_id: str
    score: float
    decision: str


_decode = msgspec.json.Decoder(ScoreFields).decode
_DECISION_INDEX = {name: index for index, name in enumerate(DECISIONS)}


class ScoreCounter:
    """Counter of the scores of n transactions that were sent.

    Attributes:
        times: uint8[n], number of scores of each transaction, up to 255.
        scores: float32[n], first score of each transaction; NaN before it.
        decisions: int8[n], index into DECISIONS; -1 before the first score.
        unknown: number of scores of transactions that are not among the n.
        contradictions: number of scores that differ from their transaction's first score.
        last_ms: CreateTime of the latest score, epoch milliseconds.
    """

    def __init__(self, transactions: int, index_of: IndexOf) -> None:
        self.times = np.zeros(transactions, np.uint8)
        self.scores = np.full(transactions, np.nan, np.float32)
        self.decisions = np.full(transactions, NOT_SCORED, np.int8)
        self.unknown = 0
        self.contradictions = 0
        self.last_ms = 0
        self._index_of = index_of

    def add(self, records: Sequence[Any]) -> NDArray[np.int64]:
        """Count records of the scores topic; return the newly scored transactions' numbers."""
        if not records:
            return np.empty(0, np.int64)
        scores = [_decode(record.value) for record in records]
        self.last_ms = max(self.last_ms, max(record.timestamp for record in records))
        index = self._index_of([score.transaction_id for score in scores])
        values = np.array([score.score for score in scores], np.float32)
        decision = np.array([_DECISION_INDEX[score.decision] for score in scores], np.int8)
        known = index >= 0
        self.unknown += int((~known).sum())
        index, values, decision = index[known], values[known], decision[known]
        numbers, first, counts = np.unique(index, return_index=True, return_counts=True)
        new = self.times[numbers] == 0
        fresh: NDArray[np.int64] = numbers[new]
        place = first[new]
        self.scores[fresh] = values[place]
        self.decisions[fresh] = decision[place]
        self.times[numbers] = np.minimum(self.times[numbers].astype(np.int64) + counts, 255)
        self.contradictions += int((self.scores[index] != values).sum())
        return fresh

    @property
    def scored(self) -> int:
        """Number of transactions with a score."""
        return int(np.count_nonzero(self.times))

    @property
    def missing(self) -> int:
        """Number of transactions without a score."""
        return len(self.times) - self.scored

    @property
    def duplicates(self) -> int:
        """Number of transactions with more than one score."""
        return int((self.times > 1).sum())

    @property
    def flagged(self) -> NDArray[np.bool_]:
        """Transactions whose decision is not to approve, as bool[n]."""
        return self.decisions > 0


class TopicReader:
    """A reader of the records that are written to a topic after its start.

    Args:
        partitions: number of the topic's partitions, as
            :func:`pipeline.kafka.topics.ensure_topics` returns it.

    Raises:
        RecurError: the broker is unreachable.
    """

    def __init__(self, settings: Settings, role: TopicRole, partitions: int) -> None:
        self.topic = settings.topic(role)
        self.read_records = 0
        self._settings = settings
        self._consumer: Any = None
        self._ends: Any = None  # for offsets: they would wait behind a fetch
        self._partitions = [TopicPartition(self.topic, number) for number in range(partitions)]
        self._start = 0

    async def __aenter__(self) -> TopicReader:
        options = self._settings.kafka_client_options()
        options["request_timeout_ms"] = round(REQUEST_TIMEOUT_SECONDS * 1000)
        self._ends = AIOKafkaConsumer(**options, enable_auto_commit=False)
        self._consumer = AIOKafkaConsumer(
            **options,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        )
        try:
            await self._ends.start()
            await self._consumer.start()
            ends = await self._ends.end_offsets(self._partitions)
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            await self._stop()
            raise self._unreachable_error(error) from error
        self._start = sum(ends.values())
        self._consumer.assign(self._partitions)  # seek at once, before it looks up a position:
        for partition, end in ends.items():
            self._consumer.seek(partition, end)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        for consumer in (self._consumer, self._ends):
            try:
                await consumer.stop()
            except asyncio.CancelledError:  # from aiokafka, for a fetch that waits for a broker
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise

    async def published(self) -> int:
        """Count the records and transaction markers since the start, with one cheap request."""
        return sum((await self._end_offsets()).values()) - self._start

    async def read(self, timeout_seconds: float = 0.0) -> list[Any]:
        """Read some new records; wait up to the timeout for the first one."""
        try:
            found = await self._consumer.getmany(
                timeout_ms=round(timeout_seconds * 1000), max_records=READ_MAX_RECORDS
            )
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            raise self._unreachable_error(error) from error
        records = [record for part in found.values() for record in part]
        self.read_records += len(records)
        return records

    async def to_end(self) -> AsyncIterator[list[Any]]:
        """Read all new records up to the present end, some at a time."""
        ends = await self._end_offsets()
        while await self._behind(ends):
            yield await self.read(timeout_seconds=0.2)

    async def _behind(self, ends: dict[TopicPartition, int]) -> bool:
        for partition, end in ends.items():
            if await self._consumer.position(partition) < end:
                return True
        return False

    async def _end_offsets(self) -> dict[TopicPartition, int]:
        try:
            ends: dict[TopicPartition, int] = await self._ends.end_offsets(self._partitions)
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            raise self._unreachable_error(error) from error
        return ends

    def _unreachable_error(self, error: BaseException) -> RecurError:
        return RecurError(
            f"cannot read topic {self.topic} at {self._settings.kafka_bootstrap_servers}"
            f" ({type(error).__name__}): see that the broker is up"
        )
