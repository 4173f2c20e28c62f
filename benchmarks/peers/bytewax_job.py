"""The job with Bytewax: its Kafka source, ``flat_map_batch``, and its Kafka sink.

    PEER_BROKER=... PEER_REDIS_URL=... ... python -m bytewax.run benchmarks.peers.bytewax_job:flow

The source has a consumer for each partition and returns what is there, up to
:data:`BATCH_SIZE`. The sink sends each batch and waits for its acknowledgements. Without a recovery
store, which slows Bytewax down, nothing is kept of the position in the log.
"""

from __future__ import annotations

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow

from benchmarks.peers.batch_scorer import BatchScorer, PeerSettings

BATCH_SIZE = 2000
"""Most records of a poll of one partition; 1,000 and 5,000 were not faster."""

SOURCE_OPTIONS = {"statistics.interval.ms": 0}
"""No statistics in JSON every second."""

SINK_OPTIONS = {"linger.ms": 0}

settings = PeerSettings.read()
scorer = BatchScorer(settings)


def score(batch: list[KafkaSourceMessage]) -> list[KafkaSinkMessage]:
    """Score a batch of one partition."""
    scored = scorer.score(
        [message.value for message in batch],
        [f"{message.topic}:{message.partition}:{message.offset}" for message in batch],
    )
    return [KafkaSinkMessage(key, value) for key, value in scored]


flow = Dataflow("bench")
payments = op.input(
    "transactions",
    flow,
    KafkaSource(
        [settings.broker],
        [settings.transactions],
        batch_size=BATCH_SIZE,
        add_config=SOURCE_OPTIONS,
    ),
)
scores = op.flat_map_batch("score", payments, score)
op.output("scores", scores, KafkaSink([settings.broker], settings.scores, SINK_OPTIONS))
