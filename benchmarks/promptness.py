"""How soon something is told or ends, and how well a timetable is kept.

Tests hold what does not depend on the machine: that it is told, and never sooner than it is due.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition

from pipeline.errors import RecurError, ServiceError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka import Kafka
from pipeline.local.kafka_jars import jar_directory
from pipeline.local.redis import Redis
from pipeline.replay.producer import Block, Feed, encode_block
from pipeline.settings import Settings, load_settings

TOLD_MOST_SECONDS = 5.0
STOPPED_MOST_SECONDS = 10.0
STOPPED_AFTER_SECONDS = 0.3
RATE = 200.0
AT_RATE = 300
LEAST_MOMENTS = 101
DUE_SECONDS = (0.0, 0.3, 0.6)
LEAST_PAUSE_MS = 250

Row = tuple[str, str, str, bool]
"""Name, measured value, target, and whether it is met."""


async def rows(bootstrap: str, directory: Path) -> AsyncIterator[Row]:
    """All of them, on a broker that runs; a directory for services that do not start."""
    for what, start in (
        ("no broker is told within 1 s, after", _without_broker),
        ("a Java that does not run is told after", lambda: _broken_java(directory)),
        ("a Redis that dies at its start is told after", _broken_redis),
    ):
        seconds = await asyncio.to_thread(_seconds_of_refusal, start)
        yield _at_most(what, seconds, TOLD_MOST_SECONDS)
    yield _at_most("a feed told to stop ends after", await _stop(bootstrap), STOPPED_MOST_SECONDS)
    moments = len(set(await _stamps(bootstrap, AT_RATE, rate=RATE)))
    yield (
        f"moments at which a feed sends {AT_RATE} at {RATE:.0f}/s",
        f"{moments}",
        f"at least {LEAST_MOMENTS}",
        moments >= LEAST_MOMENTS,
    )
    stamps = await _stamps(bootstrap, len(DUE_SECONDS), due_seconds=np.array(DUE_SECONDS))
    pause_ms = float(np.diff(stamps).min())
    yield (
        "shortest pause of a timetable of 300 ms",
        f"{pause_ms:.0f} ms",
        f"at least {LEAST_PAUSE_MS}",
        pause_ms >= LEAST_PAUSE_MS,
    )


def _at_most(what: str, seconds: float, most: float) -> Row:
    return what, f"{seconds:.1f} s", f"{most:.0f}", seconds <= most


def _seconds_of_refusal(start: Callable[[], object]) -> float:
    began = time.monotonic()
    try:
        start()
    except (RecurError, ServiceError):
        return time.monotonic() - began
    raise SystemExit("what cannot start has started: nothing was measured")


def _without_broker() -> None:
    settings = load_settings(kafka_bootstrap_servers="127.0.0.1:9", startup_timeout_seconds=1)
    asyncio.run(ensure_topics(settings))


def _broken_java(directory: Path) -> None:
    java = directory / "java"
    java.write_text("#!/bin/sh\nexit 127\n")
    java.chmod(0o755)
    jar_directory()
    Kafka(directory=directory / "kafka", java=java).start()


def _broken_redis() -> None:
    with Redis(options={"maxmemory": "plenty"}):
        pass


async def _topics(bootstrap: str) -> Settings:
    prefix = f"{uuid.uuid4().hex[:8]}-"
    settings = load_settings(
        kafka_bootstrap_servers=bootstrap, topic_prefix=prefix, topic_partitions=1
    )
    await ensure_topics(settings)
    return settings


async def _block(count: int, due_seconds: np.ndarray | None = None) -> AsyncIterator[Block]:
    names = [str(number) for number in range(count)]
    times = [1_534_334_400_000] * count
    yield encode_block(
        names, names, names, [1.5] * count, ["EUR"] * count, times, due_seconds=due_seconds
    )


async def _stop(bootstrap: str) -> float:
    settings = await _topics(bootstrap)
    stop = asyncio.Event()
    async with Feed(settings) as feed:
        asyncio.get_running_loop().call_later(STOPPED_AFTER_SECONDS, stop.set)
        began = time.monotonic()
        await feed.run(_block(100_000), rate=100, stop=stop)
    return time.monotonic() - began


async def _stamps(
    bootstrap: str,
    count: int,
    *,
    rate: float | None = None,
    due_seconds: np.ndarray | None = None,
) -> list[int]:
    """When each record was sent, in order, ms."""
    settings = await _topics(bootstrap)
    async with Feed(settings) as feed:
        await feed.run(_block(count, due_seconds), rate=rate)
    place = TopicPartition(settings.topic("transactions"), 0)
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap) as consumer:
        consumer.assign([place])
        consumer.seek(place, 0)
        return [(await consumer.getone()).timestamp for _ in range(count)]
