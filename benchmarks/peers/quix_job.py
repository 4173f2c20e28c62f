"""The job with Quix Streams: a sink that scores what came between two checkpoints.

    PEER_BROKER=... python -m benchmarks.peers.quix_job 2048 1.0

Quix Streams hands records over one by one. Its sinks collect them, and a checkpoint flushes them:
after the given number of records, or the given time in seconds. A checkpoint commits the offsets.
The sink takes the records of all partitions in one batch, unlike ``BatchingSink``, which takes one
partition at a time.
"""

from __future__ import annotations

import sys
from typing import Any

from confluent_kafka import Producer
from quixstreams import Application
from quixstreams.sinks import BaseSink

from benchmarks.peers.batch_scorer import BatchScorer, PeerSettings

POLL_SECONDS = 0.005
"""Longest wait for a record, after which the age of the checkpoint is looked at."""


class ScoringSink(BaseSink):  # type: ignore[misc]
    """Scores the collected records and publishes the scores when it is flushed."""

    def __init__(self, settings: PeerSettings) -> None:
        super().__init__()
        self._scorer = BatchScorer(settings)
        self._producer = Producer({"bootstrap.servers": settings.broker, "linger.ms": 0})
        self._topic = settings.scores
        self._values: list[bytes] = []
        self._sources: list[str] = []

    def add(
        self,
        value: bytes,
        key: Any,
        timestamp: int,
        headers: Any,
        topic: str,
        partition: int,
        offset: int,
    ) -> None:
        """Collect a record."""
        self._values.append(value)
        self._sources.append(f"{topic}:{partition}:{offset}")

    def flush(self) -> None:
        """Score and publish, and wait for the acknowledgements."""
        if not self._values:
            return
        for key, value in self._scorer.score(self._values, self._sources):
            self._producer.produce(self._topic, value, key)
            self._producer.poll(0)
        self._producer.flush()
        self._values, self._sources = [], []


def main(checkpoint_records: int, checkpoint_seconds: float) -> None:
    """Run until a signal."""
    settings = PeerSettings.read()
    application = Application(
        broker_address=settings.broker,
        consumer_group=settings.group,
        auto_offset_reset="earliest",
        auto_create_topics=False,
        commit_interval=checkpoint_seconds,
        commit_every=checkpoint_records,
        consumer_poll_timeout=POLL_SECONDS,
        loglevel="WARNING",
    )
    payments = application.topic(
        settings.transactions, key_deserializer="bytes", value_deserializer="bytes"
    )
    application.dataframe(payments).sink(ScoringSink(settings))
    application.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
