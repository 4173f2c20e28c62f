"""The latency of each score, read from the two topics after a measurement.

It is the time from the CreateTime of a payment's record to the LogAppendTime of its score: the
broker stamps a score when it appends it to the log. The source of a score names its payment. This
is the same for every contender and costs none of them anything while it is measured. The
acknowledgement comes a trip to the broker later, about a millisecond.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from numpy.typing import NDArray

from pipeline.settings import Settings

Offsets = dict[int, int]
"""Offset by partition."""

READ_TIMEOUT_MS = 2000
"""Time without records after which the end of a topic counts as reached."""


class ScoreView(msgspec.Struct, frozen=True, gc=False):
    """The part of a score that every contender writes."""

    source: str
    score: float


class ScoreTimes(NamedTuple):
    """n scored payments in order of their creation, times in epoch milliseconds."""

    created_ms: NDArray[np.int64]
    scored_ms: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def latency_ms(self) -> NDArray[np.int64]:
        """Return the n latencies."""
        return self.scored_ms - self.created_ms


async def ends(settings: Settings, topic: str) -> Offsets:
    """Return the next offset of each partition of a topic."""
    async with AIOKafkaConsumer(**settings.kafka_client_options()) as consumer:
        places = _places(settings, topic)
        return {p.partition: end for p, end in (await consumer.end_offsets(places)).items()}


async def read_score_times(settings: Settings, payments: Offsets, scores: Offsets) -> ScoreTimes:
    """Read what came since these offsets of the two topics; unscored payments are left out."""
    created: dict[int, dict[int, int]] = {partition: {} for partition in payments}
    async for record in _records(settings, settings.topic("transactions"), payments):
        created[record.partition][record.offset] = record.timestamp
    decode = msgspec.json.Decoder(ScoreView).decode
    rows = []
    async for record in _records(settings, settings.topic("scores"), scores):
        score = decode(record.value)
        _, partition, offset = score.source.rsplit(":", 2)
        at = created[int(partition)].pop(int(offset), None)
        if at is not None:
            rows.append((at, record.timestamp, score.score))
    rows.sort()
    table = np.array(rows, np.float64).reshape(-1, 3)
    return ScoreTimes(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2])


def _places(settings: Settings, topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for number in range(settings.topic_partitions)]


async def _records(settings: Settings, topic: str, start: Offsets) -> AsyncIterator[Any]:
    """Read all records of a topic from these offsets on."""
    async with AIOKafkaConsumer(
        **settings.kafka_client_options(), isolation_level="read_committed"
    ) as consumer:
        places = _places(settings, topic)
        left = await consumer.end_offsets(places)
        consumer.assign(places)
        for place in places:
            consumer.seek(place, start[place.partition])
        while any([await consumer.position(place) < end for place, end in left.items()]):
            found = await consumer.getmany(timeout_ms=READ_TIMEOUT_MS)
            if not found:
                return
            for records in found.values():
                for record in records:
                    yield record
