"""Decide step: decisions on scores, and the scores, alerts, dead letters and notes to write."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.features.merchant import WEIGHT_MAX
from model.reasons import Explainer
from pipeline.kafka.producer import Outgoing
from pipeline.messages.decision import DECISIONS, DecisionThresholds
from pipeline.messages.scores import (
    ScoreEncoder,
    encode_alert,
    source_prefix,
    with_merchant_weight,
    with_out_of_range,
    with_refused_state,
    with_thresholds,
)
from pipeline.scoring.batch import APPROVE, PartitionBatch
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
        for batch in batches:
            unscored = self._reject_failed(batch, scores)
            batch.new = np.flatnonzero(~unscored).tolist()
            batch.scored_count = len(batch.new)
            if batch.published:
                batch.new = [i for i in batch.new if batch.records[i].offset not in batch.published]
                self._add_alert_candidates(
                    batch, self._published_before(batch, unscored, thresholds)
                )
                self._note_published_before(batch, unscored)
        self._build_scores(batches, scores, thresholds)
        self._build_alerts(batches, scores)

    def _reject_failed(self, batch: PartitionBatch, scores: BatchScores) -> NDArray[np.bool_]:
        """Make dead letters of rejected records and failed computations.

        Returns:
            bool[n], the transactions without a score: duplicates and failures.
        """
        unscored: NDArray[np.bool_] = scores.duplicate[batch.span].copy()
        for i in batch.indices(scores.failed):
            unscored[i] = True
            error = scores.failed[i + batch.span.start]
            reason = "id_conflict" if error == ID_CONFLICT else "computation"
            batch.rejected.append((batch.records[i], reason, error))
        alerts_from = batch.partition_owned.alerts_from
        batch.dead_letters = [
            self._dead_letters.encode(batch.partition, record, reason, error)
            for record, reason, error in batch.rejected
            if record.offset >= alerts_from or record.offset in batch.published
        ]
        return unscored

    def _build_scores(
        self, batches: list[PartitionBatch], scores: BatchScores, thresholds: DecisionThresholds
    ) -> None:
        """Encode the first scores of transactions, of all batches together."""
        at = np.array([i + batch.span.start for batch in batches for i in batch.new], np.intp)
        choices = thresholds.decide(scores.score[at]).tolist()
        decisions = [DECISIONS[choice] for choice in choices]
        values = self._encoder.encode(
            [batch.transactions[i] for batch in batches for i in batch.new],
            [batch.sent_ms[i] for batch in batches for i in batch.new],
            [
                prefix + str(batch.records[i].offset)
                for batch in batches
                for prefix in [source_prefix(self._topic, batch.partition)]
                for i in batch.new
            ],
            scores.score[at],
            decisions,
            scores.raw[at],
        )
        for i in np.flatnonzero(choices).tolist():
            values[i] = with_thresholds(values[i], thresholds)
        weights = scores.merchant_weight[at]
        for i in np.flatnonzero(weights < WEIGHT_MAX).tolist():
            values[i] = with_merchant_weight(values[i], int(weights[i]))
        self._mark_out_of_range(values, scores, at)
        start = 0
        for batch in batches:
            stop = start + len(batch.new)
            for i in batch.invalid_states:
                place = start + bisect_left(batch.new, i)
                if place < stop and batch.new[place - start] == i:
                    values[place] = with_refused_state(values[place])
            records = [batch.records[i] for i in batch.new]
            batch.scores = [
                Outgoing(record.key, value)
                for record, value in zip(records, values[start:stop], strict=True)
            ]
            if any(choices[start:stop]):
                scored = zip(batch.new, values[start:stop], decisions[start:stop], strict=True)
                self._add_alert_candidates(batch, scored)
            for i in np.flatnonzero(
                (weights[start:stop] < WEIGHT_MAX) | np.array(choices[start:stop], bool)
            ).tolist():
                weight = int(weights[start + i])
                self._add_note(batch, batch.new[i], decisions[start + i], weight)
            start = stop

    def _mark_out_of_range(
        self, values: list[bytes], scores: BatchScores, at: NDArray[np.intp]
    ) -> None:
        """Mark scores whose inputs are beyond the training data, and count such inputs."""
        if scores.outside is None:
            return
        outside = scores.outside[at]
        for i in np.flatnonzero(outside.any(axis=1)).tolist():
            values[i] = with_out_of_range(values[i], self._names[outside[i]].tolist())
        count = outside.sum(axis=0)
        for column in np.flatnonzero(count).tolist():
            self._metrics.out_of_range.labels(self._names[column]).inc(int(count[column]))

    def _published_before(
        self, batch: PartitionBatch, unscored: NDArray[np.bool_], thresholds: DecisionThresholds
    ) -> Iterator[tuple[int, bytes, str]]:
        """Yield index, score and decision of transactions whose score was published before."""
        for i, (record, skip) in enumerate(zip(batch.records, unscored.tolist(), strict=True)):
            published = batch.published.get(record.offset)
            if published is not None and not skip:
                value, decision = published.value, published.score.decision
                if decision != APPROVE and published.score.thresholds is None:
                    # An older version published this score without its thresholds.
                    value = with_thresholds(value, thresholds)
                yield i, value, decision

    def _note_published_before(self, batch: PartitionBatch, unscored: NDArray[np.bool_]) -> None:
        """Write notes again for transactions whose score was published before.

        Redis may have lost their notes, or a worker may have died before it wrote them.
        """
        for i, (record, skip) in enumerate(zip(batch.records, unscored.tolist(), strict=True)):
            published = batch.published.get(record.offset)
            if published is not None and not skip:
                decision, weight = published.score.decision, published.score.weight
                if decision != APPROVE or weight < WEIGHT_MAX:
                    self._add_note(batch, i, decision, weight)

    def _add_note(self, batch: PartitionBatch, i: int, decision: str, weight: int) -> None:
        """Add a note of a transaction, unless its time to live is already over."""
        record, transaction = batch.records[i], batch.transactions[i]
        if self._clock_ms() - record.timestamp > NOTE_EXPIRY_MS:
            return
        if is_warm_up(record):  # it raised no alert
            decision = APPROVE
            if weight == WEIGHT_MAX:
                return
        id_hash = transaction_hash(transaction.transaction_id)
        batch.notes.append(ScoredNote(transaction.merchant_id, id_hash, decision, weight))

    def _add_alert_candidates(
        self, batch: PartitionBatch, scored: Iterable[tuple[int, bytes, str]]
    ) -> None:
        """Select the scores that raise an alert: not approved, and not of a warm-up."""
        alerts_from = batch.partition_owned.alerts_from
        for i, score, decision in scored:
            record = batch.records[i]
            if decision != APPROVE and record.offset >= alerts_from and not is_warm_up(record):
                batch.alert_candidates.append((i, score, decision))

    def _build_alerts(self, batches: list[PartitionBatch], scores: BatchScores) -> None:
        """Encode alerts; their reasons are computed in one batch."""
        at = [i + batch.span.start for batch in batches for i, _, _ in batch.alert_candidates]
        if not at:
            return
        before = np.stack([scores.before[i] for i in at])
        reasons = iter(self._explainer.explain(scores.raw[at], before))
        for batch in batches:
            for i, score, decision in batch.alert_candidates:
                record = batch.records[i]
                self._metrics.alerts.labels(decision).inc()
                alert = encode_alert(score, next(reasons), self._clock_ms())
                batch.alerts.append(Outgoing(record.key, alert))
