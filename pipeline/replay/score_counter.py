"""Counts what came out: was each transaction scored, once, and how?

    async with TopicReader(settings, "scores", partitions) as scores:  # from its end on
        ... transactions are sent ...
        tally.add(await scores.read())
    tally.missing, tally.repeated

Reads topics without a consumer group, so that counting disturbs nobody.
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
"""Records that one read returns at most."""

REQUEST_TIMEOUT_SECONDS = 10.0
"""The broker says nothing for so long: it is away."""

NOT_SCORED = -1
"""A transaction's place in DECISIONS while it has none."""

IndexOf = Callable[[Sequence[str]], NDArray[np.int64]]
"""Transaction ids to their numbers 0 to n - 1; -1 for one that was not sent."""


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What counting needs of a score."""

    transaction_id: str
    score: float
    decision: str


_decode = msgspec.json.Decoder(Outcome).decode
_DECISION_INDEX = {name: index for index, name in enumerate(DECISIONS)}


class ScoreCounter:
    """The scores of n transactions that were sent.

    Attributes:
        times: uint8[n], how often each was scored, up to 255.
        scores: float32[n], the first one of each; NaN before it.
        decisions: int8[n], index into DECISIONS; -1 before the first score.
        strangers: scores of transactions that are not among the n.
        contradictions: scores that differ from the first one of the same transaction.
        last_ms: CreateTime of the latest score, epoch milliseconds.
    """

    def __init__(self, transactions: int, index_of: IndexOf) -> None:
        self.times = np.zeros(transactions, np.uint8)
        self.scores = np.full(transactions, np.nan, np.float32)
        self.decisions = np.full(transactions, NOT_SCORED, np.int8)
        self.strangers = 0
        self.contradictions = 0
        self.last_ms = 0
        self._index_of = index_of

    def add(self, records: Sequence[Any]) -> NDArray[np.int64]:
        """Count records of the scores topic; numbers of those scored for the first time."""
        if not records:
            return np.empty(0, np.int64)
        outcomes = [_decode(record.value) for record in records]
        self.last_ms = max(self.last_ms, max(record.timestamp for record in records))
        index = self._index_of([outcome.transaction_id for outcome in outcomes])
        score = np.array([outcome.score for outcome in outcomes], np.float32)
        decision = np.array([_DECISION_INDEX[outcome.decision] for outcome in outcomes], np.int8)
        known = index >= 0
        self.strangers += int((~known).sum())
        index, score, decision = index[known], score[known], decision[known]
        numbers, first, counts = np.unique(index, return_index=True, return_counts=True)
        new = self.times[numbers] == 0
        fresh: NDArray[np.int64] = numbers[new]
        place = first[new]
        self.scores[fresh] = score[place]
        self.decisions[fresh] = decision[place]
        self.times[numbers] = np.minimum(self.times[numbers].astype(np.int64) + counts, 255)
        self.contradictions += int((self.scores[index] != score).sum())
        return fresh

    @property
    def scored(self) -> int:
        """Transactions with a score."""
        return int(np.count_nonzero(self.times))

    @property
    def missing(self) -> int:
        """Transactions without one."""
        return len(self.times) - self.scored

    @property
    def repeated(self) -> int:
        """Transactions with more than one."""
        return int((self.times > 1).sum())

    @property
    def flagged(self) -> NDArray[np.bool_]:
        """bool[n]: the decision is not to approve."""
        return self.decisions > 0


class TopicReader:
    """Reads what is written to a topic from now on.

    Args:
        partitions: how many the topic has; :func:`pipeline.kafka.topics.ensure_topics` tells.

    Raises:
        RecurError: the broker is away.
    """

    def __init__(self, settings: Settings, role: TopicRole, partitions: int) -> None:
        self.topic = settings.topic(role)
        self.read_records = 0
        self._settings = settings
        self._consumer: Any = None
        self._ends: Any = None  # asks for offsets; a fetch that waits would hold them up
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
            raise self._away(error) from error
        self._start = sum(ends.values())
        self._consumer.assign(self._partitions)  # and at once, before it looks for a position:
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
            except asyncio.CancelledError:  # aiokafka's own, of a fetch that waits for a broker
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise

    async def published(self) -> int:
        """Records written since the start, and markers of transactions; one cheap request."""
        return sum((await self._end_offsets()).values()) - self._start

    async def read(self, timeout_seconds: float = 0.0) -> list[Any]:
        """Some records that were not read yet; waits so long for the first."""
        try:
            found = await self._consumer.getmany(
                timeout_ms=round(timeout_seconds * 1000), max_records=READ_MAX_RECORDS
            )
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            raise self._away(error) from error
        records = [record for part in found.values() for record in part]
        self.read_records += len(records)
        return records

    async def to_end(self) -> AsyncIterator[list[Any]]:
        """Everything that is there now and was not read yet, some records at a time."""
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
            raise self._away(error) from error
        return ends

    def _away(self, error: BaseException) -> RecurError:
        return RecurError(
            f"cannot read topic {self.topic} at {self._settings.kafka_bootstrap_servers}"
            f" ({type(error).__name__}): see that the broker is up"
        )
