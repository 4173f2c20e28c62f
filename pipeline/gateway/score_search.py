"""Places in the log that a gateway reads: scores by offset or id, transactions by id."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiokafka import TopicPartition

from pipeline.kafka.log_reader import LogReader
from pipeline.kafka.polls import LogUnavailableError
from pipeline.messages.decoding import NOT_JSON, encode_json
from pipeline.messages.scores import Score, decode_score
from pipeline.messages.transactions import decode_transaction_id
from pipeline.settings import Settings

SEARCHES_MAX = 2
"""Searches through recent records at once: they cost the most of all requests."""

LOG_READ_SECONDS = 20.0
"""Longest read of the transactions since an old claim."""


class ScoreSearch:
    """Reads of scores and transactions.

    Args:
        settings: names topics, and bounds searches.
        reader: reads the topics.
    """

    def __init__(self, settings: Settings, reader: LogReader) -> None:
        self._scores = settings.topic("scores")
        self._transactions = settings.topic("transactions")
        self._records_max = settings.gateway_search_records
        self._reader = reader
        self._searches = asyncio.Semaphore(SEARCHES_MAX)

    async def score_at(self, partition: int, offset: int, transaction_id: str) -> bytes | None:
        """Return the score at an offset; None if the log has no score of the transaction there.

        Raises:
            HeldBackError: the score is not shown yet.
            LogUnavailableError: the broker does not answer.
        """
        record = await self._reader.record_at(self._scores, partition, offset)
        if record is None or not _begins_with_id(record.value, transaction_id):
            return None
        value: bytes = record.value
        return value

    async def recent_score(
        self, partitions: Sequence[int], transaction_id: str
    ) -> tuple[int, int, bytes] | None:
        """Look for a score among the last records of partitions.

        Returns:
            its partition, offset and record; None if it is not there.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        found: tuple[int, int, bytes] | None = None
        for partition, record in await self._recent(partitions):
            if _begins_with_id(record.value, transaction_id):
                found = partition, record.offset, record.value
                break
        return found

    async def recent_of_account(self, partition: int, account_id: str, most: int) -> list[bytes]:
        """Return an account's scores among the last records of its partition, newest first.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        key = account_id.encode()
        values = [r.value for _, r in await self._recent([partition]) if r.key == key]
        return values[::-1][:most]

    async def _recent(self, partitions: Sequence[int]) -> list[tuple[int, Any]]:
        """Return the last records of partitions of the scores topic."""
        if not self._records_max:
            return []
        async with self._searches:
            bounds = await self._reader.bounds(self._scores, partitions)
            positions = {
                TopicPartition(self._scores, p): max(b.begin, b.end - self._records_max)
                for p, b in bounds.items()
                if b.end > b.begin
            }
            found: list[tuple[int, Any]] = []
            while positions:
                fetched = await self._reader.fetch(positions)
                for place, part in fetched.items():
                    found += [(place.partition, record) for record in part.records]
                    end = bounds[place.partition].end
                    if part.next_offset >= end or part.next_offset <= positions[place]:
                        del positions[place]
                    else:
                        positions[place] = part.next_offset
            return found

    async def has_transaction(
        self, partition: int, key: bytes | None, transaction_id: str, since_ms: int
    ) -> bool:
        """Tell whether the transactions topic has a transaction, among the records since a time.

        Args:
            key: the records' key; None: any.
            since_ms: epoch milliseconds.

        Raises:
            LogUnavailableError: the broker does not answer, or there is too much to read.
        """
        places = await self._reader.offsets_at(self._transactions, [partition], since_ms)
        start = places.get(partition)
        if start is None:
            return False
        end = (await self._reader.bounds(self._transactions, [partition]))[partition].end
        place = TopicPartition(self._transactions, partition)
        try:
            async with self._searches, asyncio.timeout(LOG_READ_SECONDS):
                while start < end:
                    part = (await self._reader.fetch({place: start}))[place]
                    for record in part.records:
                        if (
                            key in (None, record.key)
                            and decode_transaction_id(record.value) == transaction_id
                        ):
                            return True
                    if part.next_offset <= start:
                        break
                    start = part.next_offset
        except TimeoutError:
            raise LogUnavailableError("too many transactions since the claim") from None
        return False


def _begins_with_id(value: bytes | None, transaction_id: str) -> bool:
    """Tell whether a score's record is of a transaction; its id comes first in the record."""
    begin = b'{"transaction_id":' + encode_json(transaction_id) + b","
    return value is not None and value.startswith(begin)


def read_score(value: bytes) -> Score | None:
    """Decode a score; None for a record that no worker wrote."""
    try:
        return decode_score(value)
    except NOT_JSON:
        return None
