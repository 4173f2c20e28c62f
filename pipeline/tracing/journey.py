"""One transaction's way through the topics, read from its records.

    transactions ──▶ scores ──▶ alerts ──▶ labels        or   transactions ──▶ dead-letter

A score names the offset of its transaction. So only the scores are searched for the id, from now
backwards; the transactions are searched if there is no score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from model.transaction import epoch_ms
from pipeline.errors import RecurError
from pipeline.kafka.partitioner import key_partition
from pipeline.messages.decision import APPROVE
from pipeline.messages.decoding import NOT_JSON, encode_json
from pipeline.messages.replies import gateway_of
from pipeline.messages.trace_context import trace_of
from pipeline.messages.transactions import WARM_HEADER
from pipeline.settings import Settings
from pipeline.timestamps import is_record_time
from pipeline.tracing.topic_search import Matches, TopicSearch

CLOCK_SLACK_MS = 1_000
"""Alerts and labels are searched from this long before the score: their producers have clocks."""

NO_TIME = -1
"""Time of a stage whose record has none, or is deleted."""


class JourneyStage(msgspec.Struct, frozen=True):
    """A stage of the way.

    Attributes:
        stage: its name.
        time_ms: epoch milliseconds; :data:`NO_TIME` if it is not known.
        place: ``topic:partition:offset`` of its record; None for a time that a payload holds.
        note: what else is known.
    """

    stage: str
    time_ms: int
    place: str | None = None
    note: str = ""


class Journey(msgspec.Struct, frozen=True):
    """The way of one transaction.

    Attributes:
        transaction_id: its id.
        trace_id: id of its trace in hex, and whether that is sampled; None without one.
        decision: of the score; None without a score.
        stages: in the order of processing.
        notes: what a reader should know about it.
    """

    transaction_id: str
    trace_id: str | None
    is_sampled: bool
    decision: str | None
    stages: Sequence[JourneyStage]
    notes: Sequence[str] = ()


class _ScoreView(msgspec.Struct, frozen=True):
    """The part of a score or an alert that is shown."""

    transaction_id: str
    account_id: str
    timestamp: int
    decision: str
    source: str
    created_at: int = NO_TIME


class _TransactionView(msgspec.Struct, frozen=True):
    """The part of a transaction or a label that is shown."""

    transaction_id: str
    account_id: str = ""
    timestamp: int | datetime = NO_TIME
    label: str = ""


_decode_score = msgspec.json.Decoder(_ScoreView).decode
_decode_transaction = msgspec.json.Decoder(_TransactionView).decode


async def find_journey(
    settings: Settings,
    search: TopicSearch,
    transaction_id: str,
    *,
    since_ms: int,
    now_ms: int,
    account_id: str | None = None,
) -> Journey:
    """Find the records of a transaction.

    Args:
        settings: names the topics.
        search: reads them.
        transaction_id: the id to look for; of several transactions with it the newest is taken.
        since_ms: records before this time are not searched, epoch milliseconds.
        now_ms: the time now.
        account_id: the transaction's account, which says in which partition to search first.

    Raises:
        RecurError: there is no such record, or the broker does not answer.
    """
    finder = _Finder(settings, search, transaction_id, account_id, since_ms, now_ms)
    return await finder.journey()


class _Finder:
    """A search for one transaction."""

    def __init__(
        self,
        settings: Settings,
        search: TopicSearch,
        transaction_id: str,
        account_id: str | None,
        since_ms: int,
        now_ms: int,
    ) -> None:
        self._settings = settings
        self._search = search
        self._id = transaction_id
        self._account_id = account_id
        self._since_ms = since_ms
        self._now_ms = now_ms
        # A value without the id in one of its two usual forms is not decoded.
        self._texts = {encode_json(transaction_id), json.dumps(transaction_id).encode()}

    async def journey(self) -> Journey:
        """See :func:`find_journey`."""
        scores = await self._newest("scores", lambda record: self._score(record) is not None)
        if scores:
            return await self._scored(scores)
        sent = await self._newest("transactions", lambda r: self._transaction(r) is not None)
        if sent:
            return await self._unscored(sent[-1])
        topics = [self._settings.topic("scores"), self._settings.topic("transactions")]
        for topic in topics:
            if not await self._search.partitions(topic):
                raise RecurError(
                    f"there is no topic {topic} at {self._settings.kafka_bootstrap_servers}:"
                    " correct RECUR_TOPIC_PREFIX or the name of the topic"
                )
        raise RecurError(
            f"no record of this transaction in {' and '.join(topics)} at"
            f" {self._settings.kafka_bootstrap_servers} in the time that was searched: search"
            " further back with --since, and see that the id"
            f"{'' if self._account_id is None else ' and the account'} and RECUR_TOPIC_PREFIX are"
            " right"
        )

    async def _scored(self, found: Sequence[Any]) -> Journey:
        """Follow the newest of these scores."""
        record = found[-1]
        score = self._score(record)
        assert score is not None
        notes = []
        if len({self._source_of(other) for other in found}) > 1:
            notes.append("several transactions have this id; the newest is shown: see --account")
        topic, partition, offset = score.source.rsplit(":", 2)
        sent = await self._search.at(topic, int(partition), int(offset))
        if sent is not None and self._transaction(sent) is None:
            sent = None  # the topic was made again
        stages = [JourneyStage("event", score.timestamp, None, "by the payment's own clock")]
        if sent is None:
            note = "the record is deleted"
            stages.append(JourneyStage("transaction", NO_TIME, score.source, note))
        else:
            stages.append(_sent_stage(sent))
        alert = await self._alert(record, score, sent)
        if isinstance(alert, str):
            notes.append(alert)
        else:
            created_ms = _decode_score(alert.value).created_at
            stages.append(JourneyStage("decision", created_ms, None, "by the worker's clock"))
        stages.append(_stage("score", record, score.decision))
        if not isinstance(alert, str):
            stages.append(_stage("alert", alert))
        stages += await self._label(record, score)
        trace = trace_of(record.headers) or (sent is not None and trace_of(sent.headers)) or None
        return self._journey(trace, score.decision, stages, notes)

    async def _alert(self, record: Any, score: _ScoreView, sent: Any | None) -> Any | str:
        """Find the alert of a score; return a note if there is none."""
        if score.decision == APPROVE:
            return "an approval raises no alert"
        if sent is not None and any(name == WARM_HEADER for name, _ in sent.headers):
            return "a warm-up record raises no alert"
        topic = self._settings.topic("alerts")

        def matches(other: Any) -> bool:
            found = self._score(other)
            return found is not None and found.source == score.source

        since_ms = record.timestamp - CLOCK_SLACK_MS
        alerts = await self._search.since(topic, matches, since_ms=since_ms)
        return alerts[0] if alerts else f"{topic} has no alert of this score"

    async def _label(self, record: Any, score: _ScoreView) -> list[JourneyStage]:
        """Find the last label of a scored transaction."""
        found = await self._search.since(
            self._settings.topic("labels"),
            lambda other: self._transaction(other, score.account_id) is not None,
            since_ms=record.timestamp - CLOCK_SLACK_MS,
            first_only=False,
        )
        if not found:
            return []
        label = self._transaction(found[-1])
        return [_stage("label", found[-1], "" if label is None else label.label)]

    async def _unscored(self, sent: Any) -> Journey:
        """Tell about a transaction without a score."""
        transaction = self._transaction(sent)
        assert transaction is not None
        time = transaction.timestamp
        event_ms = epoch_ms(time) if isinstance(time, datetime) else time
        stages = [
            JourneyStage("event", event_ms, None, "by the payment's own clock"),
            _sent_stage(sent),
        ]
        place = {
            "topic": sent.topic.encode(),
            "partition": str(sent.partition).encode(),
            "offset": str(sent.offset).encode(),
        }
        dead_letters = await self._search.since(
            self._settings.topic("dead_letter"),
            lambda record: place.items() <= dict(record.headers).items(),
            since_ms=sent.timestamp - CLOCK_SLACK_MS,
        )
        notes = []
        if dead_letters:
            reason = dict(dead_letters[0].headers).get("reason", b"").decode(errors="replace")
            stages.append(_stage("dead letter", dead_letters[0], reason))
        else:
            notes.append(
                "it has no score: workers have not reached it, or it is a duplicate of an earlier"
                " transaction"
            )
        return self._journey(trace_of(sent.headers), None, stages, notes)

    def _journey(
        self,
        trace: tuple[str, bool] | None,
        decision: str | None,
        stages: Sequence[JourneyStage],
        notes: Sequence[str],
    ) -> Journey:
        trace_id, is_sampled = trace or (None, False)
        return Journey(self._id, trace_id, is_sampled, decision, stages, notes)

    async def _newest(self, role: Any, matches: Matches) -> list[Any]:
        """Search a topic backwards, in the account's partition first if the account is known."""
        topic = self._settings.topic(role)
        count = await self._search.partitions(topic)
        parts: list[set[int] | None] = [None]
        if self._account_id is not None and count > 1:
            expected = {key_partition(self._account_id.encode(), count)}
            parts = [expected, set(range(count)) - expected]
        for partitions in parts:
            found = await self._search.newest(
                topic,
                matches,
                since_ms=self._since_ms,
                now_ms=self._now_ms,
                partitions=partitions,
            )
            if found:
                return found
        return []

    def _score(self, record: Any) -> _ScoreView | None:
        """Decode a score or an alert of the transaction; None for another record."""
        found = self._decoded(record, _decode_score)
        return found if isinstance(found, _ScoreView) else None

    def _transaction(self, record: Any, account_id: str = "") -> _TransactionView | None:
        """Decode a transaction or a label of the transaction; None for another record."""
        found = self._decoded(record, _decode_transaction, account_id)
        return found if isinstance(found, _TransactionView) else None

    def _decoded(self, record: Any, decode: Any, account_id: str = "") -> Any:
        value = record.value
        if value is None or not any(text in value for text in self._texts):
            return None
        try:
            found = decode(value)
        except NOT_JSON:
            return None
        wanted = account_id or self._account_id
        is_wanted = found.transaction_id == self._id and wanted in (None, found.account_id)
        return found if is_wanted else None

    def _source_of(self, record: Any) -> str:
        score = self._score(record)
        return "" if score is None else score.source


def _sent_stage(record: Any) -> JourneyStage:
    """Make the stage of a transaction's record, with the gateway that produced it."""
    gateway = gateway_of(record.headers)
    return _stage("transaction", record, f"by gateway {gateway}" if gateway else "")


def _stage(name: str, record: Any, note: str = "") -> JourneyStage:
    """Make the stage of a record."""
    place = f"{record.topic}:{record.partition}:{record.offset}"
    time_ms = record.timestamp if is_record_time(record.timestamp) else NO_TIME
    if record.timestamp_type == 1:
        note = f"{note}, time of the broker" if note else "time of the broker"
    return JourneyStage(name, time_ms, place, note)
