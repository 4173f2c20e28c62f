"""Batches that would fill the memory once decompressed are refused and reported."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import uuid
from pathlib import Path
from typing import Any

import aiokafka.codec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.record.util import calc_crc32c

from pipeline.kafka import decompression_limit as bounded_batches
from pipeline.kafka.decompression_limit import (
    GZIP,
    LZ4,
    SNAPPY,
    ZSTD,
    PollBudget,
    RefusedBatch,
    cramjam,
    uncompressed_size,
)
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.settings import load_settings
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions

MIB = 1 << 20

COMPRESS: dict[str, tuple[int, Any]] = {
    "gzip": (GZIP, gzip.compress),
    "gzip of two members": (GZIP, lambda d: gzip.compress(d[:7]) + gzip.compress(d[7:])),
    "snappy": (SNAPPY, cramjam.snappy.compress_raw),
    "snappy in blocks": (SNAPPY, aiokafka.codec.snappy_encode),
    "lz4": (LZ4, aiokafka.codec.lz4_encode),
    "zstd": (ZSTD, aiokafka.codec.zstd_encode),
}


# size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("data", [b"", b"a", bytes(3 * MIB), bytes(range(256)) * 700])
def test_the_measured_size_is_right_and_the_limit_is_exact(name: str, data: bytes) -> None:
    codec, compress = COMPRESS[name]
    payload = memoryview(bytes(compress(data)))

    assert uncompressed_size(codec, payload, 4 * MIB) == len(data)
    assert uncompressed_size(codec, payload, max(1, len(data))) == len(data)
    if len(data) > 1:
        assert uncompressed_size(codec, payload, len(data) - 1) is None


@pytest.mark.parametrize("name", COMPRESS)
def test_measuring_damaged_or_truncated_bytes_ends(name: str) -> None:
    codec, compress = COMPRESS[name]
    payload = bytes(compress(bytes(range(256)) * 50))

    for at in range(0, len(payload), 1 + len(payload) // 40):
        uncompressed_size(codec, memoryview(payload[:at]), MIB)
        damaged = bytes([*payload[:at], payload[at] ^ 0xFF, *payload[at + 1 :]])
        uncompressed_size(codec, memoryview(damaged), MIB)


# consumer --------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    number <<= 1  # zigzag encoding of a number that is not negative
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def batch_of_zeros(records: int, bytes_each: int) -> bytes:
    """Build a batch of zeros without holding its uncompressed records."""
    compressor = cramjam.zstd.Compressor()
    for number in range(records):
        head = b"\0\0" + varint(number) + b"\x01" + varint(bytes_each)
        compressor.compress(varint(len(head) + bytes_each + 1) + head)
        compressor.compress(bytes(bytes_each))
        compressor.compress(b"\0")
    payload = bytes(compressor.finish())
    now_ms = 1_700_000_000_000
    counted = struct.pack(
        ">hiqqqhii", ZSTD, records - 1, now_ms, now_ms, -1, -1, -1, records
    )  # fmt: skip
    crc = calc_crc32c(counted + payload)
    length = 9 + len(counted) + len(payload)
    return struct.pack(">qiibI", 0, length, -1, 2, crc) + counted + payload


class Ready:
    """A finished batch in the form that aiokafka's producer sends."""

    def __init__(self, batch: bytes, records: int) -> None:
        self._batch, self._records = batch, records

    def _build(self) -> bytes:
        return self._batch

    def close(self) -> None:
        """Do nothing: the batch is closed."""

    def closed(self) -> bool:
        return True

    def size(self) -> int:
        return len(self._batch)

    def record_count(self) -> int:
        return self._records


async def send_zeros(bootstrap: str, topic: str, records: int, bytes_each: int) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        batch: Any = Ready(batch_of_zeros(records, bytes_each), records)
        await (await producer.send_batch(batch, topic, partition=0))


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lower the limit so that a test reaches it at little cost."""
    monkeypatch.setattr(bounded_batches, "BATCH_MAX_BYTES", MIB)
    monkeypatch.setattr(bounded_batches, "POLL_MAX_BYTES", MIB)
    return MIB


def test_one_record_stands_for_a_batch_over_the_limit_and_its_neighbours_are_read(
    kafka: Kafka, limit: int
) -> None:
    settings = load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:12]}-",
        topic_partitions=1,
    )
    topic = settings.topic("transactions")
    place = TopicPartition(topic, 0)

    async def run() -> None:
        await ensure_topics(settings)
        async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap) as producer:
            await producer.send_and_wait(topic, b"before", b"A", 0)
            await send_zeros(kafka.bootstrap, topic, 40, limit // 40)
            await producer.send_and_wait(topic, b"after", b"A", 0)
        consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([place])
            found: list[Any] = []
            while await consumer.position(place) < 42:
                found += (await consumer.getmany(place, timeout_ms=1000)).get(place, [])
        finally:
            await consumer.stop()
        assert [r.offset for r in found] == [0, 40, 41]
        assert [r.value for r in found[::2]] == [b"before", b"after"]
        assert isinstance(found[1].value, RefusedBatch)
        assert json.loads(found[1].value)["refused_batch"] | {"compressed_bytes": 0} == {
            "first_offset": 1,
            "last_offset": 40,
            "records": 40,
            "compressed_bytes": 0,
            "limit_bytes": limit,
        }

    asyncio.run(run())


def test_a_poll_decompresses_up_to_its_limit_and_leaves_the_rest_for_the_next(
    kafka: Kafka, limit: int
) -> None:
    settings = load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:12]}-",
        topic_partitions=1,
    )
    topic = settings.topic("transactions")
    place = TopicPartition(topic, 0)

    async def run() -> None:
        await ensure_topics(settings)
        for _ in range(5):
            await send_zeros(kafka.bootstrap, topic, 10, limit // 16)
        consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([place])
            polls: list[list[int]] = []
            while await consumer.position(place) < 50:
                with PollBudget():
                    records = (await consumer.getmany(place, timeout_ms=1000)).get(place, [])
                if records:
                    polls.append([record.offset for record in records])
        finally:
            await consumer.stop()
        assert [offset for poll in polls for offset in poll] == list(range(50))
        assert max(map(len, polls)) <= 20, "two batches exceed the limit"

    asyncio.run(run())


# worker ----------------------------------------------------------------------------------


def peak_mb(pid: int) -> float:
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) / 1024


def test_300_mb_in_a_batch_are_dead_lettered_as_one_and_the_worker_goes_on(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    pipeline = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, topic_partitions=1)
    sent = transactions(400, accounts=40)

    async def run() -> None:
        async with pipeline.running(workers=1):
            (worker,) = pipeline.workers
            await pipeline.send(sent[:200])
            await pipeline.until_applied()
            before_mb = peak_mb(worker.process.pid)
            topic = pipeline.settings.topic("transactions")
            await send_zeros(kafka.bootstrap, topic, 5_000, 60_000)
            await pipeline.send(sent[200:])
            await pipeline.until_applied()
            assert worker.death is None
            assert peak_mb(worker.process.pid) - before_mb < 150
            assert_scored_once(await pipeline.scores(), sent)
            await worker.refresh()
            rejected = 'recur_rejected_total{reason="batch_too_large"}'
            assert worker.samples[rejected] == 5_000
        (letter,) = await pipeline.records("dead_letter")
        assert json.loads(letter.value)["refused_batch"]["records"] == 5_000
        assert "offsets 200 to 5199" in dict(letter.headers)["error"].decode()
        assert "first_offset=200  last_offset=5199" in worker.log_path.read_text()

    asyncio.run(run())
