"""The scores of one partition, read in step with its transactions.

Workers publish scores in the order of the log, but for what a zombie writes late and for scores
that were published anew after the topic had lost them. So a partition's scores are read some way
ahead of the transactions, and what may stand further on is looked for only once it is missed.
Memory: four bytes for each transaction of the partition, and what is read ahead.
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
"""Scores are read this many sources ahead of the transactions, offsets; those of a source that
come later than that are late."""

READ_MOST = 8_192

NO_SOURCE = -1


@dataclass(frozen=True)
class Again:
    """A further score of a source.

    Attributes:
        key: of its record: the account.
        differs: whether it is another number than the first one.
    """

    source: int
    key: bytes
    differs: bool


class ScoresInStep:
    """Scores by the offset of their transaction, the first one of each.

    Args:
        settings: name the topics.
        wants: whether the scores of the account with this key are looked at; None: all are.
        open_reader: of the log.
        begin: scores before this offset are of another log.

    Attributes:
        again: further scores of sources, in the order of the topic.
        strangers: records of the topic that are no scores of this partition.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        wants: Callable[[bytes], bool] | None,
        open_reader: OpenReader,
        begin: int = 0,
    ) -> None:
        self.again: list[Again] = []
        self.strangers = 0
        self._open = partial(open_reader, settings.topic("scores"), partition)
        self._prefix = source_prefix(settings.topic("transactions"), partition)
        self._wants = wants
        self._first_offset = begin
        self._reader = self._open(begin)
        self._end = 0
        self._begin = 0
        self._said = np.empty(0, np.float32)  # by source, from _begin on; NaN: none yet
        self._newest = NO_SOURCE
        self._first: dict[int, tuple[bytes, RecordedScore]] = {}
        self._late: dict[int, tuple[bytes, RecordedScore, int]] = {}
        self._late_taken: set[int] = set()
        self._late_to = 0
        self._late_newest = NO_SOURCE

    async def __aenter__(self) -> ScoresInStep:
        await self._reader.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._reader.__aexit__(*error)

    async def see_end(self) -> int:
        """Read up to where the topic ends now.

        Returns:
            the first offset that is still there; 0 where none of this log's scores is gone.
        """
        bounds = await self._reader.bounds()
        self._end = bounds.end
        return bounds.begin if bounds.begin > self._first_offset else 0

    def see_sources(self, begin: int, end: int) -> None:
        """Scores of transactions in [begin, end) count: the log has no others."""
        said = np.full(end - begin, np.nan, np.float32)
        said[: len(self._said)] = self._said
        self._begin, self._said = begin, said

    async def first_source(self) -> int | None:
        """The least source among the first scores that are there; None where there are none.

        To be asked before anything is read: a reader of its own reads them.
        """
        least: int | None = None
        seen = 0
        async with self._open(self._first_offset) as reader:
            while seen < LOOKAHEAD and (records := await reader.read(self._end, READ_MOST)):
                seen += len(records)
                for record in records:
                    score = decode_recorded(record.value)
                    source = source_offset(score.source, self._prefix) if score else None
                    if source is not None:
                        least = source if least is None else min(least, source)
        return least

    async def read(self, sources: Sequence[int]) -> list[RecordedScore | None]:
        """The first scores of these sources, which ascend; None for one that is not seen yet."""
        if not sources:
            return []
        while self._newest < sources[-1] + LOOKAHEAD:
            records = await self._reader.read(self._end, READ_MOST)
            if not records:
                break
            for record in records:
                if record.offset not in self._late_taken and self._is_wanted(record):
                    self._see(record)
            # Of one that nobody wants, too: it tells how far the topic is.
            source, _ = self._read(records[-1])
            self._newest = max(self._newest, source)
        found = [self._first.get(source) for source in sources]
        return [None if item is None else item[1] for item in found]

    def _is_wanted(self, record: Any) -> bool:
        return self._wants is None or self._wants(record.key or b"")

    def _read(self, record: Any) -> tuple[int, RecordedScore | None]:
        """Source and score in a record; NO_SOURCE where it is not one of this partition's log."""
        score = decode_recorded(record.value)
        source = None if score is None else source_offset(score.source, self._prefix)
        if source is None:
            return NO_SOURCE, None
        if not 0 <= source - self._begin < len(self._said):
            return NO_SOURCE, score
        return source, score

    def _see(self, record: Any) -> None:
        source, score = self._read(record)
        if score is None:
            self.strangers += 1
        if score is None or source == NO_SOURCE:
            return
        self._newest = max(self._newest, source)
        place = source - self._begin
        number, before = np.float32(score.score), self._said[place]
        if np.isnan(before):
            self._said[place] = number
            self._first[source] = (record.key or b"", score)
        else:
            self.again.append(Again(source, record.key or b"", bool(before != number)))

    async def look_further(self, sources: Sequence[int]) -> bool:
        """Look for scores of these sources that were published late.

        The rest of the topic is read once for all that are late.

        Returns:
            whether one was found; :meth:`read` has it then.
        """
        await self._read_late()
        found = False
        for source in sources:
            item = self._late.pop(source, None)
            if item is not None:
                key, score, offset = item
                self._first[source] = (key, score)
                self._said[source - self._begin] = np.float32(score.score)
                self._late_taken.add(offset)
                found = True
        return found

    async def _read_late(self) -> None:
        start = max(self._late_to, self._reader.position)
        if start >= self._end:
            return
        newest = max(self._late_newest, self._newest)
        async with self._open(start) as reader:
            while records := await reader.read(self._end, READ_MOST):
                for record in records:
                    source, score = self._read(record)
                    if score is None or source == NO_SOURCE:
                        continue
                    is_late = source < newest - LOOKAHEAD
                    newest = max(newest, source)
                    if is_late and self._is_wanted(record) and self._is_unsaid(source):
                        self._late.setdefault(source, (record.key or b"", score, record.offset))
        self._late_to, self._late_newest = self._end, newest

    def _is_unsaid(self, source: int) -> bool:
        return bool(np.isnan(self._said[source - self._begin]))

    async def read_rest(self) -> None:
        """Read to the end for further scores of what was computed; nothing may be asked after."""
        while records := await self._reader.read(self._end, READ_MOST):
            for record in records:
                if record.offset not in self._late_taken and self._is_wanted(record):
                    self._see(record)
            self._first.clear()

    def forget(self, end: int, applied: NDArray[np.int64]) -> list[tuple[int, bytes]]:
        """Let go of the scores of transactions before ``end``.

        Args:
            applied: int64[n], of which offsets a score is expected.

        Returns:
            source and key of scores that none is expected of.
        """
        for source in applied.tolist():
            self._first.pop(source, None)
        left = [source for source in self._first if source < end]
        return [(source, self._first.pop(source)[0]) for source in left]
