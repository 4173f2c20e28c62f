"""Answers of workers to gateways, given by the test while the worker cannot give them yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from pipeline.checkpoint import load_checkpoint
from pipeline.messages.replies import (
    Reply,
    StoredAnswer,
    content_hash,
    encode_replies,
    gateway_of,
)
from pipeline.messages.scores import decode_score
from pipeline.messages.transactions import decode_transaction_id
from pipeline.settings import Settings
from pipeline.storage.client import redis_client
from pipeline.storage.keys import Keys


@asynccontextmanager
async def answering(settings: Settings) -> AsyncIterator[None]:  # noqa: C901
    """Answer each record that asks for it, once its score or dead letter is there."""
    consumer = AIOKafkaConsumer(
        **settings.kafka_client_options(), auto_offset_reset="earliest", fetch_max_wait_ms=5
    )
    await consumer.start()
    topics = [settings.topic(n) for n in ("transactions", "scores", "dead_letter")]
    places = []
    for topic in topics:
        await consumer._client.set_topics(topics)
        places += [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)]
    consumer.assign(places)
    await consumer.seek_to_end(*places)
    keys = Keys(
        settings.redis_key_prefix, load_checkpoint(settings).digest, settings.topic("transactions")
    )
    redis = redis_client(settings)
    waiting: dict[tuple[int, int], Any] = {}
    done: dict[tuple[int, int], Any] = {}

    async def answer(place: tuple[int, int], kind: str, number: int, value: bytes) -> None:
        record = waiting.get(place)
        if record is None:
            done[place] = (kind, number, value)
            return
        gateway = gateway_of(record.headers)
        if gateway is None:
            return
        name = decode_transaction_id(record.value)
        stored = StoredAnswer(
            kind, content_hash(record.value), number, value.decode() if kind == "R" else ""
        )
        await redis.set(keys.answers(place[0], [name])[0], stored.to_bytes(), px=86_400_000)
        await redis.publish(
            keys.replies(gateway), encode_replies([Reply(name, kind, number, value)])
        )

    async def run() -> None:
        while True:
            for place, records in (await consumer.getmany(timeout_ms=50)).items():
                for r in records:
                    if place.topic == topics[0]:
                        at = place.partition, r.offset
                        waiting[at] = r
                        if at in done:
                            await answer(at, *done.pop(at))
                    elif place.topic == topics[1]:
                        _, p, o = decode_score(r.value).source.rsplit(":", 2)
                        await answer((int(p), int(o)), "A", r.offset, r.value)
                    else:
                        h = dict(r.headers)
                        at = int(h["partition"]), int(h["offset"])
                        await answer(at, "R", 0, h["reason"])

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await consumer.stop()
        await redis.aclose()
