"""Decide step: decisions on scores, and the scores, alerts, dead letters and notes to write."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

import numpy as np

from model.checkpoint import Checkpoint
from model.features.merchant import WEIGHT_MAX
from model.reasons import Explainer
from pipeline.kafka.producer import Outgoing
from pipeline.messages.decision import APPROVE, DECISIONS, DecisionThresholds
from pipeline.messages.scores import (
    STATE_INVALID,
    ScoreEncoder,
    encode_alert,
    source_prefix,
    with_thresholds,
)
from pipeline.scoring.batch import PartitionBatch
from pipeline.scoring.dead_letter import DeadLetters
from pipeline.scoring.decoder import is_warm_up
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.scorer import ID_CONFLICT, BatchScores
from pipeline.storage.merchant_profile import transaction_hash
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS, ScoredNote


class OutputBuilder:
    """Decisions on a micro-batch, and the records and notes that follow from them.

    Args:
        topic: full name of the transactions topic.
        checkpoint: names of its features, reasons and digest.
        dead_letters: makes dead letters of rejected records.
        metrics: counts alerts and inputs out of range.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self,
        topic: str,
        checkpoint: Checkpoint,
        dead_letters: DeadLetters,
        metrics: Metrics,
        clock_ms: Callable[[], int],
    ) -> None:
        names = checkpoint.header.features.names
        self._topic = topic
        self._explainer = Explainer(checkpoint)
        self._names = np.array(names)
        self._encoder = ScoreEncoder(names, checkpoint.digest)
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._clock_ms = clock_ms
        for name in names:
            metrics.out_of_range.labels(name)

    def build(
        self, batches: list[PartitionBatch], scores: BatchScores, thresholds: DecisionThresholds
    ) -> None:
        """Decide on all transactions, and fill in what each batch publishes."""
        now_ms = self._clock_ms()
        unscored = {*scores.duplicate.nonzero()[0].tolist(), *scores.failed}
        for batch in batches:
            skipped = set(batch.indices(unscored))
            new = [i for i in range(len(batch.records)) if i not in skipped]
            batch.scored_count = len(new)
            if scores.failed or batch.rejected:
                self._reject(batch, scores)
            if batch.published:
                new = [i for i in new if batch.records[i].offset not in batch.published]
                _follow_published(batch, skipped, thresholds, now_ms)
            batch.new = new
        self._build_scores(batches, scores, thresholds, now_ms)
        self._build_alerts(batches, scores, now_ms)

    def _reject(self, batch: PartitionBatch, scores: BatchScores) -> None:
        """Make dead letters of rejected records and failed computations."""
        for i in batch.indices(scores.failed):
            error = scores.failed[i + batch.span.start]
            reason = "id_conflict" if error == ID_CONFLICT else "computation"
            batch.rejected.append((batch.records[i], reason, error))
        alerts_from = batch.partition_owned.alerts_from
        batch.dead_letters = [
            self._dead_letters.encode(batch.partition, record, reason, error)
            for record, reason, error in batch.rejected
            if record.offset >= alerts_from or record.offset in batch.published
        ]

    def _build_scores(
        self,
        batches: list[PartitionBatch],
        scores: BatchScores,
        thresholds: DecisionThresholds,
        now_ms: int,
    ) -> None:
        """Encode the first scores of transactions; the numbers of all batches together."""
        at = [i + batch.span.start for batch in batches for i in batch.new]
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
        for batch in batches:
            prefix = source_prefix(self._topic, batch.partition)
            refused = batch.invalid_states
            for i in batch.new:
                record, weight = batch.records[i], weights[place]
                decision = DECISIONS[choices[place]]
                value = encode(
                    batch.transactions[i],
                    batch.sent_ms[i],
                    f"{prefix}{record.offset}",
                    numbers[place],
                    decision,
                    None if decision == APPROVE else thresholds,
                    weight,
                    outside.get(place),
                    STATE_INVALID if i in refused else None,
                )
                batch.scores.append(Outgoing(record.key, value))
                if decision != APPROVE or weight < WEIGHT_MAX:
                    _follow(batch, i, value, decision, weight, now_ms)
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

    def _build_alerts(
        self, batches: list[PartitionBatch], scores: BatchScores, now_ms: int
    ) -> None:
        """Encode alerts; their reasons are computed in one batch."""
        at = [i + batch.span.start for batch in batches for i, _, _ in batch.alert_candidates]
        if not at:
            return
        before = np.array([scores.before[i] for i in at])
        reasons = iter(self._explainer.explain(scores.raw[at], before))
        decisions = []
        for batch in batches:
            for i, score, decision in batch.alert_candidates:
                alert = encode_alert(score, next(reasons), now_ms)
                batch.alerts.append(Outgoing(batch.records[i].key, alert))
                decisions.append(decision)
        for decision in set(decisions):
            self._metrics.alerts.labels(decision).inc(decisions.count(decision))


def _follow_published(
    batch: PartitionBatch, skipped: AbstractSet[int], thresholds: DecisionThresholds, now_ms: int
) -> None:
    """Add alerts and notes of transactions whose score was published before.

    Redis may have lost their notes, or a worker may have died before it wrote them.

    Args:
        skipped: indices of the transactions without a score.
    """
    for i, record in enumerate(batch.records):
        published = batch.published.get(record.offset)
        if published is None or i in skipped:
            continue
        score, value = published.score, published.value
        if score.decision != APPROVE and score.thresholds is None:
            # An older version published this score without its thresholds.
            value = with_thresholds(value, thresholds)
        _follow(batch, i, value, score.decision, score.weight, now_ms)


def _follow(
    batch: PartitionBatch, i: int, value: bytes, decision: str, weight: int, now_ms: int
) -> None:
    """Add the alert and the note that follow from a score, unless it needs none.

    Args:
        value: the score's record.
        weight: stored merchant weight.
    """
    record = batch.records[i]
    if is_warm_up(record):  # it raises no alert
        decision = APPROVE
    if decision != APPROVE and record.offset >= batch.partition_owned.alerts_from:
        batch.alert_candidates.append((i, value, decision))
    if decision == APPROVE and weight == WEIGHT_MAX:
        return
    if now_ms - record.timestamp <= NOTE_EXPIRY_MS:
        transaction = batch.transactions[i]
        id_hash = transaction_hash(transaction.transaction_id)
        batch.notes.append(ScoredNote(transaction.merchant_id, id_hash, decision, weight))
