"""The job with Bytewax: its Kafka source, ``flat_map_batch``, and its Kafka sink.

    PEER_BROKER=... python -m bytewax.run "benchmarks.peers.bytewax_job:flow(2048)"

The source has a consumer for each partition and returns what is there, up to the given number of
records. The sink sends each batch and waits for its acknowledgements. Without a recovery
store, which slows Bytewax down, nothing is kept of the position in the log.
"""

from __future__ import annotations

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow

from benchmarks.peers.batch_scorer import BatchScorer, PeerSettings

SOURCE_OPTIONS = {"statistics.interval.ms": 0}
"""No statistics in JSON every second."""

SINK_OPTIONS = {"linger.ms": 0}


def flow(batch_size: int) -> Dataflow:
    """Make the dataflow.

    Args:
        batch_size: most records of a poll of one partition.
    """
    settings = PeerSettings.read()
    scorer = BatchScorer(settings)

    def score(batch: list[KafkaSourceMessage]) -> list[KafkaSinkMessage]:
        """Score a batch of one partition."""
        scored = scorer.score(
            [message.value for message in batch],
            [f"{message.topic}:{message.partition}:{message.offset}" for message in batch],
        )
        return [KafkaSinkMessage(key, value) for key, value in scored]

    source = KafkaSource(
        [settings.broker],
        [settings.transactions],
        batch_size=batch_size,
        add_config=SOURCE_OPTIONS,
    )
    made = Dataflow("bench")
    payments = op.input("transactions", made, source)
    scores = op.flat_map_batch("score", payments, score)
    op.output("scores", scores, KafkaSink([settings.broker], settings.scores, SINK_OPTIONS))
    return made
