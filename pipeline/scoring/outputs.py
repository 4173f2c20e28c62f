"""Decide step: decisions on scores, and the scores, alerts, dead letters and notes to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from model.checkpoint import Checkpoint
from model.features.merchant import WEIGHT_MAX
from model.reasons import Explainer
from pipeline.kafka.polls import Record
from pipeline.kafka.producer import Outgoing
from pipeline.messages.cloudevents import EventHeaders
from pipeline.messages.decision import APPROVE, DECISIONS, DecisionThresholds
from pipeline.messages.replies import content_hash
from pipeline.messages.scores import (
    STATE_INVALID,
    ScoreEncoder,
    encode_alert,
    source_prefix,
    with_thresholds,
)
from pipeline.messages.trace_context import context_headers
from pipeline.messages.transactions import decode_transaction_id
from pipeline.scoring.answers import RecordAnswer
from pipeline.scoring.dead_letter import DeadLetters
from pipeline.scoring.decoder import is_warm_up
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.scorer import ID_CONFLICT, BatchScores
from pipeline.scoring.stages import DecidedPart, ScoredPart
from pipeline.storage.merchant_profile import transaction_hash
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS, ScoredNote


class _Draft:
    """A part while its output is built.

    Attributes:
        new: indices of the transactions that get their first score.
        scored_count: number of transactions with a score, old or new.
        scores, alerts, dead_letters, notes, answers: what it writes.
        rejected: records without a score, each with reason and error.
        alert_candidates: index, score and decision of each transaction that raises an alert.
    """

    __slots__ = (
        "alert_candidates",
        "alerts",
        "answers",
        "dead_letters",
        "new",
        "notes",
        "part",
        "rejected",
        "scored_count",
        "scores",
    )

    def __init__(self, part: ScoredPart, new: list[int]) -> None:
        self.part = part
        self.new = new
        self.scored_count = len(new)
        self.scores: list[Outgoing] = []
        self.alerts: list[Outgoing] = []
        self.dead_letters: list[Outgoing] = []
        self.alert_candidates: list[tuple[int, bytes, str]] = []
        self.notes: list[ScoredNote] = []
        self.rejected: list[tuple[Record, str, str]] = []
        self.answers: list[RecordAnswer] = []

    def finish(self) -> DecidedPart:
        """Return the part with its output."""
        loaded = self.part.loaded
        return DecidedPart(
            self.part,
            loaded.decoded.partition,
            loaded.owned,
            loaded.decoded,
            loaded.end,
            self.new,
            self.scored_count,
            self.scores,
            self.alerts,
            self.dead_letters,
            self.notes,
            self.answers,
        )


class OutputBuilder:
    """Decisions on a micro-batch, and the records and notes that follow from them.

    Args:
        topic: full name of the transactions topic.
        checkpoint: names of its features, reasons and digest.
        dead_letters: makes dead letters of rejected records.
        metrics: counts alerts and inputs out of range.
        clock_ms: wall clock, epoch milliseconds.
        score_events, alert_events: make the headers of scores and of alerts; None for none.
    """

    def __init__(
        self,
        topic: str,
        checkpoint: Checkpoint,
        dead_letters: DeadLetters,
        metrics: Metrics,
        clock_ms: Callable[[], int],
        *,
        score_events: EventHeaders | None = None,
        alert_events: EventHeaders | None = None,
    ) -> None:
        names = checkpoint.header.features.names
        self._topic = topic
        self._explainer = Explainer(checkpoint)
        self._names = np.array(names)
        self._encoder = ScoreEncoder(names, checkpoint.digest)
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._score_events = score_events
        self._alert_events = alert_events
        for name in names:
            metrics.out_of_range.labels(name)

    def decide(
        self, parts: Sequence[ScoredPart], scores: BatchScores, thresholds: DecisionThresholds
    ) -> list[DecidedPart]:
        """Decide on all transactions, and build what each part writes."""
        now_ms = self._clock_ms()
        unscored = {*scores.duplicate.nonzero()[0].tolist(), *scores.failed}
        drafts = []
        for part in parts:
            records, published = part.loaded.decoded.records, part.loaded.published
            skipped = set(part.indices(unscored))
            draft = _Draft(part, [i for i in range(len(records)) if i not in skipped])
            if scores.failed or part.loaded.decoded.rejected:
                self._reject(draft, scores)
            if published:
                draft.new = [i for i in draft.new if records[i].offset not in published]
                _follow_published(draft, skipped, thresholds, now_ms)
            if part.loaded.decoded.gateways:
                _answer(draft)
            drafts.append(draft)
        self._build_scores(drafts, scores, thresholds, now_ms)
        self._build_alerts(drafts, scores, now_ms)
        self._add_headers(drafts)
        return [draft.finish() for draft in drafts]

    def _reject(self, draft: _Draft, scores: BatchScores) -> None:
        """Make dead letters of rejected records and failed computations."""
        part, loaded = draft.part, draft.part.loaded
        rejected = draft.rejected
        rejected += loaded.decoded.rejected
        for i in part.indices(scores.failed):
            error = scores.failed[i + part.start]
            reason = "id_conflict" if error == ID_CONFLICT else "computation"
            rejected.append((loaded.decoded.records[i], reason, error))
        alerts_from = loaded.owned.alerts_from
        draft.dead_letters = [
            self._dead_letters.encode(loaded.decoded.partition, record, reason, error)
            for record, reason, error in rejected
            if record.offset >= alerts_from or record.offset in loaded.published
        ]

    def _build_scores(
        self,
        drafts: Sequence[_Draft],
        scores: BatchScores,
        thresholds: DecisionThresholds,
        now_ms: int,
    ) -> None:
        """Encode the first scores of transactions; the numbers of all parts together."""
        at = [i + draft.part.start for draft in drafts for i in draft.new]
        if not at:
            return
        # Views instead of copies if all transactions are new, as they almost always are.
        rows = at if len(at) < len(scores.score) else slice(None)
        score = scores.score[rows]
        choices = thresholds.decide(score).tolist()
        weights = scores.merchant_weight[rows].tolist()
        numbers = self._encoder.numbers(score, scores.raw[rows])
        outside = self._inputs_out_of_range(scores, at)
        encode = self._encoder.encode
        place = 0
        for draft in drafts:
            decoded, refused = draft.part.loaded.decoded, draft.part.invalid_states
            records, transactions, sent_ms = decoded.records, decoded.transactions, decoded.sent_ms
            prefix = source_prefix(self._topic, decoded.partition)
            for i in draft.new:
                record, weight = records[i], weights[place]
                decision = DECISIONS[choices[place]]
                value = encode(
                    transactions[i],
                    sent_ms[i],
                    f"{prefix}{record.offset}",
                    numbers[place],
                    decision,
                    None if decision == APPROVE else thresholds,
                    weight,
                    outside.get(place),
                    STATE_INVALID if i in refused else None,
                )
                headers = context_headers(record.headers) if record.headers else ()
                draft.scores.append(Outgoing(record.key, value, headers))
                if decision != APPROVE or weight < WEIGHT_MAX:
                    _follow(draft, i, value, decision, weight, now_ms)
                place += 1

    def _inputs_out_of_range(self, scores: BatchScores, at: list[int]) -> dict[int, list[str]]:
        """Name the inputs beyond the training data of each score that has some; count them."""
        if scores.outside is None:
            return {}
        outside = scores.outside[at]
        count = outside.sum(axis=0)
        for column in np.flatnonzero(count).tolist():
            self._metrics.out_of_range.labels(self._names[column]).inc(int(count[column]))
        return {
            i: self._names[outside[i]].tolist()
            for i in np.flatnonzero(outside.any(axis=1)).tolist()
        }

    def _build_alerts(self, drafts: Sequence[_Draft], scores: BatchScores, now_ms: int) -> None:
        """Encode alerts; their reasons are computed in one batch."""
        at = [i + draft.part.start for draft in drafts for i, _, _ in draft.alert_candidates]
        if not at:
            return
        before = np.array([scores.before[i] for i in at])
        reasons = iter(self._explainer.explain(scores.raw[at], before))
        decisions = []
        for draft in drafts:
            records = draft.part.loaded.decoded.records
            for i, score, decision in draft.alert_candidates:
                alert = encode_alert(score, next(reasons), now_ms)
                headers = context_headers(records[i].headers)
                draft.alerts.append(Outgoing(records[i].key, alert, headers))
                decisions.append(decision)
        for decision in set(decisions):
            self._metrics.alerts.labels(decision).inc(decisions.count(decision))

    def _add_headers(self, drafts: Sequence[_Draft]) -> None:
        """Add the events' headers to scores and alerts, after everything else about them."""
        for draft in drafts:
            if self._score_events is not None and draft.scores:
                draft.scores = _with_headers(self._score_events, draft, draft.new, draft.scores)
            if self._alert_events is not None and draft.alerts:
                at = [i for i, _, _ in draft.alert_candidates]
                draft.alerts = _with_headers(self._alert_events, draft, at, draft.alerts)


def _with_headers(
    events: EventHeaders, draft: _Draft, at: Sequence[int], records: Sequence[Outgoing]
) -> list[Outgoing]:
    """Add the headers of the transactions at these indices to the records."""
    loaded = draft.part.loaded
    decoded = loaded.decoded
    headers = events.of(
        decoded.partition,
        loaded.owned.log_id,
        [decoded.records[i].offset for i in at],
        [decoded.sent_ms[i] for i in at],
        [decoded.transactions[i].transaction_id for i in at],
    )
    return [
        Outgoing(record.key, record.value, record.headers + of_record)
        for record, of_record in zip(records, headers, strict=True)
    ]


def _answer(draft: _Draft) -> None:
    """Add the answers to the records that ask for one; a record without an id gets none."""
    loaded = draft.part.loaded
    decoded, gateways, published = loaded.decoded, loaded.decoded.gateways, loaded.published
    reasons = {record.offset: reason for record, reason, _ in draft.rejected}
    new = {decoded.records[i].offset: place for place, i in enumerate(draft.new)}
    ids = {
        record.offset: transaction.transaction_id
        for record, transaction in zip(decoded.records, decoded.transactions, strict=True)
    }
    asking = [*decoded.records, *(record for record, _, _ in decoded.rejected)]
    for record in asking:
        at = record.offset
        gateway = gateways.get(at)
        if gateway is None:
            continue
        name = ids.get(at) or decode_transaction_id(record.value)
        if name:
            content = content_hash(record.value)
            draft.answers.append(
                RecordAnswer(
                    gateway, at, name, content, reasons.get(at), published.get(at), new.get(at)
                )
            )


def _follow_published(
    draft: _Draft, skipped: AbstractSet[int], thresholds: DecisionThresholds, now_ms: int
) -> None:
    """Add alerts and notes of transactions whose score was published before.

    Redis may have lost their notes, or a worker may have died before it wrote them.

    Args:
        skipped: indices of the transactions without a score.
    """
    loaded = draft.part.loaded
    for i, record in enumerate(loaded.decoded.records):
        published = loaded.published.get(record.offset)
        if published is None or i in skipped:
            continue
        score, value = published.score, published.value
        if score.decision != APPROVE and score.thresholds is None:
            # An older version published this score without its thresholds.
            value = with_thresholds(value, thresholds)
        _follow(draft, i, value, score.decision, score.weight, now_ms)


def _follow(draft: _Draft, i: int, value: bytes, decision: str, weight: int, now_ms: int) -> None:
    """Add the alert and the note that follow from a score, unless it needs none.

    Args:
        value: the score's record.
        weight: stored merchant weight.
    """
    loaded = draft.part.loaded
    record = loaded.decoded.records[i]
    if is_warm_up(record):  # it raises no alert
        decision = APPROVE
    if decision != APPROVE and record.offset >= loaded.owned.alerts_from:
        draft.alert_candidates.append((i, value, decision))
    if decision == APPROVE and weight == WEIGHT_MAX:
        return
    if now_ms - record.timestamp <= NOTE_EXPIRY_MS:
        transaction = loaded.decoded.transactions[i]
        id_hash = transaction_hash(transaction.transaction_id)
        draft.notes.append(ScoredNote(transaction.merchant_id, id_hash, decision, weight))
