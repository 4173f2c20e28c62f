"""State of an owned partition in the worker's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from pipeline.kafka.score_log import LoggedScore


@dataclass
class ScoreRecovery:
    """Published scores of transactions that are not applied yet, read in step with these.

    Attributes:
        position: offset in the scores partition to continue from.
        end: end of the scores partition when the worker took the partition.
        published: by source offset: a lower bound of the score's own offset, and the score.
    """

    position: int
    end: int
    published: dict[int, tuple[int, LoggedScore]] = field(default_factory=dict)

    def forget_before(self, source: int) -> None:
        """Forget scores of transactions before an offset."""
        for applied in [offset for offset in self.published if offset < source]:
            del self.published[applied]

    @property
    def is_complete(self) -> bool:
        """Whether all published scores were read and their transactions applied."""
        return not self.published and self.position >= self.end


@dataclass
class OwnedPartition:
    """A partition that the worker owns, with its progress.

    Attributes:
        watermark: bytes of the watermark in the store.
        next_offset: the first offset whose state is not saved.
        computed_to: the first offset whose state is not computed.
        scores_next: the next offset of its scores partition, if no other worker writes there.
        scores_from: scores of transactions from ``next_offset`` on stand from here on.
        alerts_from: alerts and dead letters of records from here on are not published yet.
        committed: the group's committed offset, with this worker's own commits.
        producer_epoch: epoch of this worker's transactions; with exactly-once processing only.
        log_id, scores_log_id: ids of the topics that the offsets refer to.
        scores_begin: offset in its scores partition; earlier scores belong to another log.
        stale_to: committed offsets up to this one may refer to an earlier log, unless they
            name another.
        recovery: present until all published scores are read.
        neighbour: the watermark before it; during a save, the one after it.
        states: computed states of accounts (None: no state). The store has them, or gets them
            with the next save. The last used ones come last.
        seeking: a seek to ``computed_to`` is under way.
    """

    watermark: bytes
    next_offset: int
    computed_to: int
    scores_next: int
    scores_from: int
    alerts_from: int
    recovery: ScoreRecovery | None
    committed: int
    producer_epoch: int
    log_id: bytes
    scores_log_id: bytes
    scores_begin: int
    stale_to: int
    neighbour: bytes | None = None
    states: dict[str, bytes | None] = field(default_factory=dict)
    seeking: bool = False

    def expects(self, watermark: bytes | None) -> bool:
        """Return whether a watermark is the expected one, also while a save is under way."""
        return watermark is not None and watermark in (self.watermark, self.neighbour)

    def remember(self, accounts: Sequence[str], states: Sequence[bytes | None]) -> None:
        """Keep computed states in memory."""
        held = self.states
        for account, state in zip(accounts, states, strict=True):
            held.pop(account, None)
            held[account] = state

    def forget_states(self, most: int) -> None:
        """Keep only the last used states in memory."""
        for account in list(islice(self.states, max(0, len(self.states) - most))):
            del self.states[account]
