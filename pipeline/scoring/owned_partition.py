"""State of an owned partition in the worker's memory; every change of it is a method here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final

from pipeline.kafka.polls import Record
from pipeline.kafka.score_log import LoggedScore


class ScoreRecovery:
    """Published scores of transactions that are not applied yet, read in step with these.

    Args:
        position: offset in the scores partition to continue from.
        end: end of the scores partition when the worker took the partition.
    """

    __slots__ = ("_end", "_position", "_published")

    def __init__(self, position: int, end: int) -> None:
        self._position = position
        self._end = end
        # By source offset: a lower bound of the score's own offset, and the score.
        self._published: dict[int, tuple[int, LoggedScore]] = {}

    def unread(self, last: int) -> tuple[int, int] | None:
        """Return the range of the scores partition to read for sources up to ``last``, or None."""
        if max(self._published, default=-1) < last and self._position < self._end:
            return self._position, self._end
        return None

    def add_read(self, scores: Mapping[int, LoggedScore], position: int) -> None:
        """Add scores by source offset that were read from here up to ``position``."""
        start, self._position = self._position, position
        for source, score in scores.items():
            _, first = found_before = self._published.setdefault(source, (start, score))
            if first is not score:
                self._published[source] = found_before[0], first.and_then(score)

    def add_later(self, scores: Mapping[int, LoggedScore], start: int) -> None:
        """Add scores that another worker published at or past the offset ``start``."""
        for source, score in scores.items():
            self._published.setdefault(source, (start, score))

    def of(self, records: Sequence[Record]) -> dict[int, LoggedScore]:
        """Return the scores of these records, by offset."""
        found = self._published
        return {r.offset: found[r.offset][1] for r in records if r.offset in found}

    def forget_before(self, source: int) -> None:
        """Forget scores of transactions before an offset."""
        for applied in [offset for offset in self._published if offset < source]:
            del self._published[applied]

    @property
    def is_complete(self) -> bool:
        """Whether all published scores were read and their transactions applied."""
        return not self._published and self._position >= self._end

    @property
    def begin(self) -> int:
        """Where the scores of transactions that are not applied start in the scores partition."""
        return min((start for start, _ in self._published.values()), default=self._position)


class OwnedPartition:
    """A partition that the worker owns, with its progress.

    A part of a poll changes it in this order:

        accepted    ``arrived``, or ``start_seek`` and ``skip_to``
        computed    ``keep_computed``
        published   ``note_appended``, ``keep_later_scores``; with transactions ``note_committed``
        saved       ``next_scores_from``, ``begin_save``, ``end_save``

    Args:
        watermark: bytes of the watermark in the store.
        next_offset: the first offset whose state is not saved.
        scores_from: scores of transactions from ``next_offset`` on stand from here on.
        scores_end: end of its scores partition.
        committed: the group's committed offset; None without one.
        producer_epoch: epoch of this worker's transactions; with exactly-once processing only.
        log_id, scores_log_id: ids of the topics that the offsets refer to.
        scores_begin: offset in its scores partition; earlier scores belong to another log.
        stale_to: committed offsets up to this one may refer to an earlier log, unless they
            name another.

    Attributes:
        alerts_from: alerts and dead letters of records from here on are not published yet.
    """

    __slots__ = (
        "_committed",
        "_computed_to",
        "_is_seeking",
        "_neighbour",
        "_next_offset",
        "_recovery",
        "_scores_from",
        "_scores_next",
        "_states",
        "_watermark",
        "alerts_from",
        "log_id",
        "producer_epoch",
        "scores_begin",
        "scores_log_id",
        "stale_to",
    )

    def __init__(
        self,
        *,
        watermark: bytes,
        next_offset: int,
        scores_from: int,
        scores_end: int,
        committed: int | None,
        producer_epoch: int,
        log_id: bytes,
        scores_log_id: bytes,
        scores_begin: int,
        stale_to: int,
    ) -> None:
        self.alerts_from: Final = max(next_offset, committed or 0)
        self.producer_epoch: Final = producer_epoch
        self.log_id: Final = log_id
        self.scores_log_id: Final = scores_log_id
        self.scores_begin: Final = scores_begin
        self.stale_to: Final = stale_to
        self._watermark = watermark
        # The watermark before it; during a save, the one after it.
        self._neighbour: bytes | None = None
        self._next_offset = next_offset
        self._computed_to = next_offset
        self._committed = committed or 0
        self._is_seeking = False
        # The next offset of its scores partition, if no other worker writes there.
        self._scores_next = scores_end
        self._scores_from = scores_from
        # Present until all published scores are read.
        self._recovery: ScoreRecovery | None = None
        if scores_from < scores_end:
            self._recovery = ScoreRecovery(scores_from, scores_end)
        # Computed states of accounts (None: no state). The store has them, or gets them with the
        # next save. The last used ones come last.
        self._states: dict[str, bytes | None] = {}

    # progress ----------------------------------------------------------------------------

    @property
    def watermark(self) -> bytes:
        """The last known watermark in the store."""
        return self._watermark

    @property
    def next_offset(self) -> int:
        """The first offset whose state is not saved."""
        return self._next_offset

    @property
    def computed_to(self) -> int:
        """The first offset whose state is not computed."""
        return self._computed_to

    @property
    def committed(self) -> int:
        """The group's committed offset, with this worker's own commits; 0 without one."""
        return self._committed

    @property
    def scores_next(self) -> int:
        """The next offset of its scores partition, if no other worker writes there."""
        return self._scores_next

    @property
    def states(self) -> Mapping[str, bytes | None]:
        """Computed states by account; None for an account without a state."""
        return self._states

    # accept ------------------------------------------------------------------------------

    def expects(self, watermark: bytes | None) -> bool:
        """Return whether a watermark is the expected one, also while a save is under way."""
        return watermark is not None and watermark in (self._watermark, self._neighbour)

    def start_seek(self) -> bool:
        """Start a seek to ``computed_to``; return False if one is under way already."""
        was_seeking, self._is_seeking = self._is_seeking, True
        return not was_seeking

    def arrived(self) -> None:
        """End a seek: records from ``computed_to`` on have come."""
        self._is_seeking = False

    @property
    def skips_uncommitted(self) -> bool:
        """Whether a seek under way skips records that are saved and not committed."""
        return self._is_seeking and self._next_offset > self._committed

    def skip_to(self, log_begin: int) -> int:
        """Skip the offsets before the log's begin; return their number."""
        skipped = max(0, log_begin - self._computed_to)
        self._computed_to += skipped
        return skipped

    # compute -----------------------------------------------------------------------------

    def unread_scores(self, last: int) -> tuple[int, int] | None:
        """Return the range of the scores partition to read for sources up to ``last``, or None."""
        return None if self._recovery is None else self._recovery.unread(last)

    def add_read_scores(self, scores: Mapping[int, LoggedScore], position: int) -> None:
        """Add the scores of :meth:`unread_scores` by source offset, read up to ``position``."""
        if self._recovery is not None:
            self._recovery.add_read(scores, position)

    def published_scores(self, records: Sequence[Record]) -> dict[int, LoggedScore]:
        """Return the known scores of these records that were published before, by offset."""
        return {} if self._recovery is None else self._recovery.of(records)

    def keep_computed(
        self, end: int, accounts: Sequence[str], states: Sequence[bytes | None]
    ) -> None:
        """Keep the states after everything before ``end``; the next poll continues from them."""
        self.remember(accounts, states)
        self._computed_to = end

    def remember(self, accounts: Sequence[str], states: Sequence[bytes | None]) -> None:
        """Keep computed states in memory."""
        held = self._states
        for account, state in zip(accounts, states, strict=True):
            held.pop(account, None)
            held[account] = state

    # publish -----------------------------------------------------------------------------

    def note_appended(self, first: int, end: int) -> tuple[int, int]:
        """Note where this worker's scores stand: in [first, end) of the scores partition.

        Returns:
            the range before them in which only another worker can have published.
        """
        before, self._scores_next = self._scores_next, end
        return before, first

    def keep_later_scores(self, scores: Mapping[int, LoggedScore], start: int, end: int) -> None:
        """Keep scores that another worker published in [start, end), by source offset."""
        if scores:
            if self._recovery is None:
                self._recovery = ScoreRecovery(end, end)
            self._recovery.add_later(scores, start)

    def note_committed(self, offset: int) -> None:
        """Note the offset that a transaction of this worker committed."""
        self._committed = offset

    # save --------------------------------------------------------------------------------

    def next_scores_from(self, next_offset: int, appended_end: int | None) -> int:
        """Return where scores of transactions from ``next_offset`` on will stand from.

        Args:
            appended_end: end of this worker's own scores; None if it is unknown.
        """
        recovery = self._recovery
        if recovery is not None:
            recovery.forget_before(next_offset)
            if recovery.is_complete:
                self._recovery = None
                self._scores_from = self._scores_next
            else:
                self._scores_from = recovery.begin
        elif appended_end is not None:
            self._scores_from = appended_end
        return self._scores_from

    def begin_save(self, watermark: bytes) -> None:
        """Expect this watermark, too, while it is being saved."""
        self._neighbour = watermark

    def end_save(self, watermark: bytes, next_offset: int, states_max: int) -> None:
        """Note that the watermark stands, with everything before ``next_offset``.

        Args:
            states_max: most states to keep in memory; the last used ones stay.
        """
        self._watermark, self._neighbour = watermark, self._watermark
        self._next_offset = next_offset
        for account in list(islice(self._states, max(0, len(self._states) - states_max))):
            del self._states[account]
