"""Reader of one partition's scores, which keeps pace with its transactions.

Workers publish scores in the order of the log. There are two exceptions: scores that a zombie
publishes late, and scores published again after the topic lost them. So the reader reads some way
ahead of the transactions. It searches the rest of the topic only when a score is missing.
Memory: four bytes for each transaction of the partition, and the scores read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kafka.partition_reader import OpenReader
from pipeline.messages.scores import RecordedScore, decode_recorded, source_offset, source_prefix
from pipeline.settings import Settings

LOOKAHEAD = 20_000
"""Number of offsets by which scores are read ahead of transactions. A later score is late."""

READ_MAX = 8_192
"""Most records of one read."""

NO_SOURCE = -1
"""Stands for the source of a record that is no score of this partition's log."""


@dataclass(frozen=True)
class FurtherScore:
    """A further score of a source.

    Attributes:
        source: offset of the transaction.
        key: account id in UTF-8.
        differs: whether the score differs from the first one.
    """

    source: int
    key: bytes
    differs: bool


class ScoreReader:
    """Reader of the first score of each transaction, found by the transaction's offset.

    Args:
        settings: names of the topics.
        selects: checks whether to read the scores of the account with this key; None reads all.
        open_reader: opens a reader of the log.
        begin: offset before which scores are of another log.

    Attributes:
        further: further scores of transactions, in the order of the topic.
        unknown_records: number of records that are no scores of this partition.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        selects: Callable[[bytes], bool] | None,
        open_reader: OpenReader,
        begin: int = 0,
    ) -> None:
        self.further: list[FurtherScore] = []
        self.unknown_records = 0
        self._open = partial(open_reader, settings.topic("scores"), partition)
        self._prefix = source_prefix(settings.topic("transactions"), partition)
        self._selects = selects
        self._first_offset = begin
        self._reader = self._open(begin)
        self._end = 0
        self._begin = 0
        self._published = np.empty(0, np.float32)  # by source, from _begin on; NaN without a score
        self._newest = NO_SOURCE
        self._first: dict[int, tuple[bytes, RecordedScore]] = {}
        self._late: dict[int, tuple[bytes, RecordedScore, int]] = {}
        self._late_taken: set[int] = set()
        self._late_end = 0
        self._late_newest = NO_SOURCE

    async def __aenter__(self) -> ScoreReader:
        await self._reader.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._reader.__aexit__(*error)

    async def refresh_end(self) -> int:
        """Move the end of reading to the current end of the topic.

        Returns:
            the topic's first offset; 0 if no score of this log is deleted.
        """
        bounds = await self._reader.bounds()
        self._end = bounds.end
        return bounds.begin if bounds.begin > self._first_offset else 0

    def set_sources(self, begin: int, end: int) -> None:
        """Accept scores of transactions in [begin, end) only: the log holds no others."""
        published = np.full(end - begin, np.nan, np.float32)
        published[: len(self._published)] = self._published
        self._begin, self._published = begin, published

    async def first_source(self) -> int | None:
        """Return the smallest source among the topic's first scores; None without scores.

        Call it before :meth:`read`; it opens a reader of its own.
        """
        least: int | None = None
        seen = 0
        async with self._open(self._first_offset) as reader:
            while seen < LOOKAHEAD and (records := await reader.read(self._end, READ_MAX)):
                seen += len(records)
                for record in records:
                    score = decode_recorded(record.value)
                    source = source_offset(score.source, self._prefix) if score else None
                    if source is not None:
                        least = source if least is None else min(least, source)
        return least

    async def read(self, sources: Sequence[int]) -> list[RecordedScore | None]:
        """Return the first scores of these ascending sources; None for a score not read yet."""
        if not sources:
            return []
        while self._newest < sources[-1] + LOOKAHEAD:
            records = await self._reader.read(self._end, READ_MAX)
            if not records:
                break
            for record in records:
                if record.offset not in self._late_taken and self._is_selected(record):
                    self._add(record)
            # Scores of other accounts count here, too: they show the position in the topic.
            source, _ = self._decode(records[-1])
            self._newest = max(self._newest, source)
        found = [self._first.get(source) for source in sources]
        return [None if item is None else item[1] for item in found]

    def _is_selected(self, record: Any) -> bool:
        return self._selects is None or self._selects(record.key or b"")

    def _decode(self, record: Any) -> tuple[int, RecordedScore | None]:
        """Decode a record to source and score; NO_SOURCE if it is of another log."""
        score = decode_recorded(record.value)
        source = None if score is None else source_offset(score.source, self._prefix)
        if source is None:
            return NO_SOURCE, None
        if not 0 <= source - self._begin < len(self._published):
            return NO_SOURCE, score
        return source, score

    def _add(self, record: Any) -> None:
        source, score = self._decode(record)
        if score is None:
            self.unknown_records += 1
        if score is None or source == NO_SOURCE:
            return
        self._newest = max(self._newest, source)
        index = source - self._begin
        number, before = np.float32(score.score), self._published[index]
        if np.isnan(before):
            self._published[index] = number
            self._first[source] = (record.key or b"", score)
        else:
            self.further.append(FurtherScore(source, record.key or b"", bool(before != number)))

    async def find_late(self, sources: Sequence[int]) -> bool:
        """Search for late scores of these sources.

        The rest of the topic is read once for all late scores.

        Returns:
            whether there was one; :meth:`read` then returns it.
        """
        await self._read_late()
        found = False
        for source in sources:
            item = self._late.pop(source, None)
            if item is not None:
                key, score, offset = item
                self._first[source] = (key, score)
                self._published[source - self._begin] = np.float32(score.score)
                self._late_taken.add(offset)
                found = True
        return found

    async def _read_late(self) -> None:
        start = max(self._late_end, self._reader.position)
        if start >= self._end:
            return
        newest = max(self._late_newest, self._newest)
        async with self._open(start) as reader:
            while records := await reader.read(self._end, READ_MAX):
                for record in records:
                    source, score = self._decode(record)
                    if score is None or source == NO_SOURCE:
                        continue
                    is_late = source < newest - LOOKAHEAD
                    newest = max(newest, source)
                    if is_late and self._is_selected(record) and self._is_unpublished(source):
                        self._late.setdefault(source, (record.key or b"", score, record.offset))
        self._late_end, self._late_newest = self._end, newest

    def _is_unpublished(self, source: int) -> bool:
        return bool(np.isnan(self._published[source - self._begin]))

    async def read_rest(self) -> None:
        """Read to the end, for further scores; call no other method afterwards."""
        while records := await self._reader.read(self._end, READ_MAX):
            for record in records:
                if record.offset not in self._late_taken and self._is_selected(record):
                    self._add(record)
            self._first.clear()

    def forget(self, end: int, applied: NDArray[np.int64]) -> list[tuple[int, bytes]]:
        """Discard the scores of transactions before ``end``.

        Args:
            applied: int64[n], offsets whose score is due.

        Returns:
            source and key of each score that is not due.
        """
        for source in applied.tolist():
            self._first.pop(source, None)
        left = [source for source in self._first if source < end]
        return [(source, self._first.pop(source)[0]) for source in left]
