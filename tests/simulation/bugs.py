"""Bugs planted by hand: each one breaks one thing that the worker does right.

They prove that the auditor finds bugs. docs/simulation.md lists how many runs each one needs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from unittest import mock

import msgspec
import numpy as np

from pipeline.kafka.polls import Chunk, Record
from pipeline.kafka.producer import AppendResult, Outgoing
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages import cloudevents
from pipeline.scoring import assembly, decoder, outputs, recovery, writer
from pipeline.scoring import partitions as ownership
from pipeline.scoring.answers import Answered, RecordAnswer, answer_all
from pipeline.scoring.computer import PollComputer
from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.ownership import ChunkFacts
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.recovery import PartitionRecovery
from pipeline.scoring.scorer import BatchScores, MicroBatch
from pipeline.scoring.stages import ComputedPoll, DecidedPart, DecodedPart
from pipeline.scoring.writer import PollWriter
from pipeline.storage.account_state import AccountStates
from pipeline.storage.keys import merchant_slot
from pipeline.storage.merchant_store import Counts, LabelOutcomes, MerchantLabel
from pipeline.storage.state_store import Save
from pipeline.storage.transaction_note import TransactionNote
from pipeline.storage.watermark import Watermark
from pipeline.worker.faust_transport import Delivery
from tests.simulation.chain import ChainScorer
from tests.simulation.group import Consumer
from tests.simulation.services import MerchantClient, PollClient, Publisher, ScoreLog, StateClient
from tests.simulation.worker import Parts, Worker


@dataclass(frozen=True)
class Bug:
    """A bug and the number of runs that find it.

    Attributes:
        name: short description of the bug.
        runs: how many runs the auditor needed to find it, from seed 0 on.
        runs_max: how many runs may be needed: at least twice ``runs``, or four times the average.
        parts: the wrong parts, which replace the right ones.
        patches: objects, names of their attributes, and the wrong values.
    """

    name: str
    runs: int
    runs_max: int
    parts: Parts = field(default_factory=Parts)
    patches: Sequence[tuple[object, str, object]] = ()

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Apply the patches within the block."""
        with ExitStack() as stack:
            for target, name, value in self.patches:
                stack.enter_context(mock.patch.object(target, name, value))
            yield


# the order of publish, save, ack ---------------------------------------------------------


class AckFirst(Worker):
    """Worker that acks a poll before it saves the states."""

    async def _conclude(self, computed: ComputedPoll, delivery: Delivery) -> None:
        for partition, chunk in computed.poll.chunks.items():
            computed.poll.applied[partition] = chunk.end
        self._consumer().ack(delivery)
        await super()._conclude(computed, delivery)


class PublishLater(Publisher):
    """Publisher that does not wait until the broker has the records."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        self._later = asyncio.ensure_future(super().publish(scores, alerts, rejected))
        return dict.fromkeys(scores, AppendResult(None, None))


class AlertsLater(Publisher):
    """Publisher that does not wait until the broker has the alerts."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        self._later = asyncio.ensure_future(super().publish({}, alerts, []))
        return await super().publish(scores, [], rejected)


class AckWhatIsNotSaved(PollWriter):
    """Writer that acks a poll although its save was refused."""

    async def conclude(self, computed: ComputedPoll) -> None:
        await super().conclude(computed)
        for partition, chunk in computed.poll.chunks.items():
            computed.poll.applied[partition] = chunk.end


# the store ---------------------------------------------------------------------------------


class SaveWithoutWatermark(StateClient):
    """Store client that saves without comparing the watermark."""

    def effects(self, request: Save) -> list[Callable[[], bool]]:
        return [partial(self._write, request)]

    def _write(self, request: Save) -> bool:
        standing = self.store.watermarks.get(request.partition)
        return self.store.write(msgspec.structs.replace(request, expected=standing))


class WatermarkApart(StateClient):
    """Store client that writes the states first and the watermark separately."""

    def effects(self, request: Save) -> list[Callable[[], bool]]:
        return [partial(self._states, request), partial(self._watermark, request)]

    def _states(self, request: Save) -> bool:
        stands = self.store.watermarks.get(request.partition) == request.expected
        if stands:
            unchanged = cast("bytes", request.expected)
            self.store.write(msgspec.structs.replace(request, watermark=unchanged))
        return stands

    def _watermark(self, request: Save) -> bool:
        return self.store.write(msgspec.structs.replace(request, account_ids=[], states=[]))


class AnswersApart(StateClient):
    """Store client that sets the answers with a command of their own."""

    def effects(self, request: Save) -> list[Callable[[], bool]]:
        write = partial(self.store.write, msgspec.structs.replace(request, answers=()))
        return [partial(self._answer, request), write]

    def _answer(self, request: Save) -> bool:
        for name, answer in request.answers:
            self.store.answers[request.partition, name] = answer
        self.store.changed.add(request.partition)
        return True


def _place_guessed(
    answers: Sequence[RecordAnswer],
    scores: Sequence[Outgoing],
    where: AppendResult | None,
    logged: Mapping[int, LoggedScore],
) -> Answered:
    """RecordAnswer as if a score that was published before stood where the new ones stand."""
    first = where.first if where is not None else None
    moved = [
        msgspec.structs.replace(one, published=dataclasses.replace(one.published, offset=first))
        if one.published is not None and first is not None
        else one
        for one in answers
    ]
    return answer_all(moved, scores, where, logged)


def _unknown_from_zero(
    answers: Sequence[RecordAnswer],
    scores: Sequence[Outgoing],
    where: AppendResult | None,
    logged: Mapping[int, LoggedScore],
) -> Answered:
    """RecordAnswer with offsets from 0 on if the broker does not tell where the scores stand."""
    if where is not None and where.first is None:
        where = AppendResult(0, len(scores))
    return answer_all(answers, scores, where, logged)


# the consumer ------------------------------------------------------------------------------


class LateAck(Consumer):
    """Consumer that accepts acks of polls from before a rebalance."""

    def ack(self, delivery: Delivery) -> bool:
        self._in_flight.add(delivery)
        return super().ack(delivery)


class LateAckOfAll(PollWriter):
    """Writer that acks a saved poll although its partition has a new owner."""

    async def _save(
        self, parts: Sequence[DecidedPart], appended: Mapping[int, AppendResult]
    ) -> list[DecidedPart]:
        await super()._save(parts, appended)
        return list(parts)

    def _ack(self, poll: Any, saved: Sequence[DecidedPart]) -> None:
        for part in saved:
            poll.applied[part.partition] = part.end


class PositionsKept(Consumer):
    """Consumer that keeps its positions over a rebalance and commits them."""

    def _reset(self) -> None:
        positions = dict(self._positions)
        super()._reset()
        self._positions.update(positions)


class DropWithoutSeek(Consumer):
    """Consumer that drops an overtaken fetch and does not seek back."""

    def _give_up(self, records: Mapping[Any, list[Any]]) -> None:
        """Do not seek back."""


class KeepAcrossReset(Consumer):
    """Consumer that accepts a fetch from before the new assignment."""

    @property
    def _resets(self) -> int:
        return 0

    @_resets.setter
    def _resets(self, value: int) -> None:
        """Ignore the count."""


# scores that were published ----------------------------------------------------------------


class FeaturesNotReused(ScoreLog):
    """Score log that loses the features in the scores."""

    async def read(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        found, position = await super().read(partition, start, end, until_source)
        for source, kept in found.items():
            score = msgspec.structs.replace(kept.score, features=None)
            found[source] = LoggedScore(kept.value, score, kept.offset)
        return found, position


class NothingKept(PartitionRecovery):
    """Recovery that does not find the scores that were published but not saved."""

    async def published_scores(
        self, partition: int, owned: OwnedPartition, records: Sequence[Record]
    ) -> dict[int, LoggedScore]:
        return {}


_follow_published = outputs._follow_published


def _no_alerts(draft: Any, *arguments: Any) -> None:
    """Write only the notes of scores that were published before."""
    _follow_published(draft, *arguments)
    draft.alert_candidates.clear()


def _no_notes(draft: Any, *arguments: Any) -> None:
    """Raise only the alerts of scores that were published before."""
    _follow_published(draft, *arguments)
    draft.notes.clear()


class GapNotRead(PartitionRecovery):
    """Recovery that does not read the scores of a zombie between its own."""

    async def check_zombie_scores(
        self, partition: int, owned: OwnedPartition, appended: AppendResult, next_offset: int
    ) -> dict[int, LoggedScore]:
        if appended.next is not None:
            owned.note_appended(appended.next, appended.next)
        return {}


class ScoresOffsetTooFar(PartitionRecovery):
    """Recovery whose watermark skips scores that are not applied."""

    def next_watermark(
        self, owned: OwnedPartition, next_offset: int, appended: AppendResult | None
    ) -> Watermark:
        mark = super().next_watermark(owned, next_offset, appended)
        return msgspec.structs.replace(
            mark, scores_offset=max(mark.scores_offset, owned.scores_next)
        )


# states ------------------------------------------------------------------------------------


class OldStates(PartitionManager):
    """Manager that reuses states from before it lost the partition."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._states: dict[int, dict[str, bytes | None]] = {}

    async def _take_over(
        self, partition: int, watermark: bytes | None, begin: int
    ) -> OwnedPartition:
        owned = await super()._take_over(partition, watermark, begin)
        owned._states = self._states.setdefault(partition, {})
        return owned


class AnyWatermark(PartitionManager):
    """Manager that accepts any watermark as the expected one."""

    async def accept(
        self, partition: int, chunk: Chunk, watermark: bytes | None
    ) -> OwnedPartition | None:
        owned = self.owned(partition)
        if owned is not None and watermark is not None:
            owned._watermark = watermark
        return await super().accept(partition, chunk, watermark)


class GapInLog(PartitionManager):
    """Manager that applies a poll although the one before it is missing."""

    async def seek_back(self, partition: int, owned: OwnedPartition) -> None:
        """Do not seek back."""


class ApplyAgain(PollComputer):
    """Computer that applies records before the watermark again."""

    def _drop_applied(self, part: DecodedPart, begin: int) -> DecodedPart:
        return part


class RepeatsApplied(ChainScorer):
    """Scorer that takes a duplicate for a new transaction."""

    def score(
        self, values: Sequence[bytes | None], batch: MicroBatch
    ) -> tuple[AccountStates, BatchScores, Any, int]:
        own = (batch.offset + 1).astype(np.uint64)
        return super().score(values, msgspec.structs.replace(batch, id_hash=own))


class ConflictsDropped(ChainScorer):
    """Scorer that takes a conflict of ids for a duplicate."""

    def score(
        self, values: Sequence[bytes | None], batch: MicroBatch
    ) -> tuple[AccountStates, BatchScores, Any, int]:
        alike = batch.id_hash & np.uint64(0xFFFF_FFFF_0000_0000)
        return super().score(values, msgspec.structs.replace(batch, id_hash=alike))


class AlwaysNew(PartitionRecovery):
    """Recovery that takes a store that lost everything for the store of a new group."""

    async def take_over(
        self, partition: int, watermark: bytes | None, begin: int, *, is_assigned: bool
    ) -> OwnedPartition:
        self._begin = begin
        return await super().take_over(partition, watermark, begin, is_assigned=is_assigned)

    async def _write_first_watermark(self, partition: int, begin: int | None) -> bytes | None:
        return await super()._write_first_watermark(partition, self._begin)


class StatesOfLogBefore(StateClient):
    """Store client that finds no states to delete when a log was made again."""

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        return
        yield


class FetchedOfLogBefore(PartitionManager):
    """Manager that accepts records fetched from an earlier log."""

    def _facts(
        self, partition: int, owned: OwnedPartition, chunk: Chunk, *, is_other_log: bool = False
    ) -> ChunkFacts:
        facts = super()._facts(partition, owned, chunk, is_other_log=is_other_log)
        return msgspec.structs.replace(
            facts, is_fetched_of_other_log=False, is_fetched_before_seek=False
        )


def _same(known: bytes, found: bytes) -> bool:
    """Treat all log ids as equal."""
    return False


def _any_log(
    committed: int | None, log_id: bytes, log_end: int, stale_to: int
) -> tuple[int | None, int]:
    """Accept a committed offset of any log."""
    return committed, stale_to


# rejected records, labels ------------------------------------------------------------------


class RejectedDropped(Publisher):
    """Publisher that drops rejected records."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        return await super().publish(scores, alerts, [])


class RecordedAgain(MerchantClient):
    """Merchant client that records labels again."""

    async def record_labels(
        self, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        for label in labels:
            place = partition, merchant_slot(label.merchant_id)
            self._store.recorded[place] = min(begin, self._store.recorded.get(place, 0))
        return await super().record_labels(partition, labels, begin, end)


class RecordedPastTheGap(MerchantClient):
    """Merchant client that records labels past a gap in the store."""

    async def record_labels(
        self, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        return await super().record_labels(partition, labels, 0, end)


class NotesLater(PollClient):
    """Store client that writes the notes after the states."""

    async def save(self, requests: Sequence[Save], counts: Counts) -> list[bool]:
        without = [msgspec.structs.replace(request, notes=()) for request in requests]
        stands = await super().save(without, counts)
        await self._merchants.add({}, [note for request in requests for note in request.notes])
        return stands


def _last_label(note: TransactionNote, labelled_ms: int, weight: int | None) -> TransactionNote:
    """Apply the label that arrives last, although it may be older."""
    if weight is not None:
        note = dataclasses.replace(note, weight=weight, has_label_weight=True)
    return dataclasses.replace(note, labelled_ms=labelled_ms)


_hours = itertools.count()


def _time_of_now(times_ms: Sequence[int]) -> list[bytes]:
    """Give events the time of their publication: another one each time."""
    return [f"2026-01-01T{next(_hours):02}:00:00Z".encode() for _ in times_ms]


def _nothing(*_: Iterable[Any]) -> None:
    """Do nothing."""


BUGS = [
    Bug("ack before save", 8, 16, Parts(worker=AckFirst)),
    Bug("ack of what was not saved", 28, 56, patches=[(assembly, "PollWriter", AckWhatIsNotSaved)]),
    Bug("save before publish", 2, 10, Parts(publisher=PublishLater)),
    Bug("save before alerts are published", 235, 667, Parts(publisher=AlertsLater)),
    Bug("a save without the watermark", 3, 58, Parts(state_client=SaveWithoutWatermark)),
    Bug(
        "a watermark that is not atomic with its states", 1, 10, Parts(state_client=WatermarkApart)
    ),
    Bug(
        "a late ack after a reset",
        100,
        334,
        Parts(consumer=LateAck),
        patches=[(assembly, "PollWriter", LateAckOfAll)],
    ),
    Bug("positions kept over a reset", 173, 500, Parts(consumer=PositionsKept)),
    Bug("a fetch across a reset dropped without a seek", 1, 10, Parts(consumer=DropWithoutSeek)),
    Bug("a fetch across a reset taken", 1228, 2456, Parts(consumer=KeepAcrossReset)),
    Bug("recorded features not reused", 32, 223, Parts(score_log=FeaturesNotReused)),
    Bug(
        "published scores repeated",
        28,
        75,
        patches=[(ownership, "PartitionRecovery", NothingKept)],
    ),
    Bug(
        "alerts not published again",
        394,
        2000,
        patches=[(outputs, "_follow_published", _no_alerts)],
    ),
    Bug(
        "the gap before a zombie's publish not read",
        2,
        36,
        patches=[(ownership, "PartitionRecovery", GapNotRead)],
    ),
    Bug(
        "the watermark's scores offset too far",
        776,
        1552,
        patches=[(ownership, "PartitionRecovery", ScoresOffsetTooFar)],
    ),
    Bug(
        "held states not dropped with the partition",
        54,
        250,
        patches=[(assembly, "PartitionManager", OldStates)],
    ),
    Bug(
        "computed states not held",
        2,
        10,
        patches=[(OwnedPartition, "remember", _nothing)],
    ),
    Bug(
        "any watermark taken for the expected one",
        86,
        172,
        patches=[(assembly, "PartitionManager", AnyWatermark)],
    ),
    Bug("no seek back to the states", 28, 250, patches=[(assembly, "PartitionManager", GapInLog)]),
    Bug("what is applied not dropped", 8, 34, patches=[(assembly, "PollComputer", ApplyAgain)]),
    Bug("a repeated transaction id not dropped", 4, 16, Parts(scorer=RepeatsApplied)),
    Bug("another payment with an id of before dropped", 3, 24, Parts(scorer=ConflictsDropped)),
    Bug(
        "a store that lost everything taken for a new one",
        3,
        334,
        patches=[(ownership, "PartitionRecovery", AlwaysNew)],
    ),
    Bug(
        "another log taken for the same",
        19,
        134,
        patches=[(ownership, "is_other", _same), (recovery, "is_other", _same)],
    ),
    Bug(
        "an offset committed of another log taken",
        264,
        2000,
        patches=[(recovery, "_committed_in_log", _any_log)],
    ),
    Bug("states kept over to another log", 19, 250, Parts(state_client=StatesOfLogBefore)),
    Bug(
        "records of a log before taken",
        25,
        59,
        patches=[(assembly, "PartitionManager", FetchedOfLogBefore)],
    ),
    Bug("an account not forgotten", 3, 14, patches=[(decoder, "_apply_control", _nothing)]),
    Bug("rejected records not published", 2, 10, Parts(publisher=RejectedDropped)),
    Bug("labels recorded again", 5, 125, Parts(merchant_client=RecordedAgain)),
    Bug("labels recorded past a gap", 87, 174, Parts(merchant_client=RecordedPastTheGap)),
    Bug("answers set outside the script", 1, 10, Parts(state_client=AnswersApart)),
    Bug(
        "answers name a place of another score",
        28,
        200,
        patches=[(writer, "answer_all", _place_guessed)],
    ),
    Bug(
        "answers name an unknown place",
        2,
        55,
        patches=[(writer, "answer_all", _unknown_from_zero)],
    ),
    Bug("notes written after the states", 8, 500, Parts(poll_client=NotesLater)),
    Bug(
        "notes of kept scores not written",
        38,
        134,
        patches=[(outputs, "_follow_published", _no_notes)],
    ),
    Bug(
        "an older label taken for the newest",
        3,
        44,
        patches=[(TransactionNote, "with_label", _last_label)],
    ),
    Bug(
        "events with the time of their publication",
        31,
        69,
        patches=[(cloudevents, "_rfc3339", _time_of_now)],
    ),
]
