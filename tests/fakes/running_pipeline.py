"""A pipeline of real processes on the shared broker and Redis, with checks of its output."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from model.features.account import HISTORY_COLUMNS
from model.features.merchant import MERCHANT_FEATURES
from model.transaction import Transaction
from pipeline.checkpoint import load_checkpoint
from pipeline.kafka.polls import Chunk
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import ensure_topics
from pipeline.local.workers import WorkerProcess, start_worker, stop_all, until_ready
from pipeline.messages.scores import Score, decode_score
from pipeline.messages.transactions import encode_transaction
from pipeline.scoring.decoder import BatchDecoder
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.stages import micro_batch_of
from pipeline.settings import load_settings
from pipeline.storage.account_state import AccountStates
from pipeline.storage.client import redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.watermark import Watermark

READY_SECONDS = 240.0
DAY_MS = 86_400_000
EVENT_TIME_MS = 1_700_000_000_000

HIDDEN_TOLERANCE = 2e-3
"""Hidden states that differ by at most this count as equal.

The last bits of a matrix product depend on its size; float16 sometimes rounds them to another
number, half of 2^-10 away."""


def transactions(count: int, accounts: int, seed: int = 0) -> list[Transaction]:
    """Make transactions with ascending event time, of accounts drawn evenly."""
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, accounts, count)
    amounts = np.round(rng.gamma(2.0, 30.0, count), 2)
    run = uuid.uuid4().hex[:8]
    return [
        Transaction(
            transaction_id=f"{run}-{i}",
            account_id=f"A{owner:06d}",
            merchant_id=f"M{i % 997:06d}",
            amount=float(amount),
            currency="EUR",
            timestamp=EVENT_TIME_MS + i * 20_000,
        )
        for i, (owner, amount) in enumerate(zip(owners.tolist(), amounts.tolist(), strict=True))
    ]


class PipelineUnderTest:
    """Separate topics, group and keys on a broker and a Redis."""

    def __init__(self, bootstrap: str, redis_url: str, directory: Path, **settings: Any) -> None:
        name = uuid.uuid4().hex[:8]
        self.overrides: dict[str, Any] = {
            "kafka_bootstrap_servers": bootstrap,
            "redis_url": redis_url,
            "topic_prefix": f"{name}-",
            "redis_key_prefix": f"recur-{name}",
            "kafka_group_id": f"group-{name}",
            "topic_partitions": 4,
            **settings,
        }
        self.settings = load_settings(**self.overrides)
        self.directory = directory
        self.workers: list[WorkerProcess] = []
        self.scorer = Scorer(load_checkpoint(self.settings), ttl_ms=30 * DAY_MS)
        self._producer: AIOKafkaProducer | None = None

    def use(self, **settings: Any) -> None:
        """Change settings for workers that start from now on."""
        self.overrides |= settings
        self.settings = load_settings(**self.overrides)

    async def send_to(self, partition: int, transaction: Transaction) -> None:
        """Produce a transaction into a partition, as a producer with outdated metadata does."""
        assert self._producer is not None
        await self._producer.send_and_wait(
            self.settings.topic("transactions"),
            encode_transaction(transaction),
            transaction.account_id.encode(),
            partition,
        )

    @asynccontextmanager
    async def running(self, workers: int) -> AsyncIterator[PipelineUnderTest]:
        """Create the topics and start workers; stop everything at the end."""
        await ensure_topics(self.settings)
        self._producer = AIOKafkaProducer(
            **self.settings.kafka_client_options(),
            linger_ms=5,
            max_batch_size=200_000,
            max_request_size=4_000_000,
        )
        await self._producer.start()
        try:
            await self.start_workers(workers)
            yield self
        finally:
            await self._producer.stop()
            await stop_all(self.workers)

    async def start_workers(self, count: int) -> list[WorkerProcess]:
        """Start more workers, and wait until they are ready."""
        environment = {f"RECUR_{k.upper()}": str(v) for k, v in self.overrides.items()}
        environment["RECUR_LOG_FORMAT"] = "text"
        new = [
            start_worker(len(self.workers) + i, self.directory, environment) for i in range(count)
        ]
        self.workers += new
        await until_ready(new, READY_SECONDS)
        return new

    async def send(self, sent: Iterable[Transaction], rate: float | None = None) -> None:
        """Produce transactions with acknowledgement, at ``rate`` a second if given."""
        await self.send_records(
            ((t.account_id.encode(), encode_transaction(t)) for t in sent), rate
        )

    async def send_compressed(self, sent: Iterable[Transaction], compression: str) -> None:
        """Produce transactions with compression."""
        async with AIOKafkaProducer(
            **self.settings.kafka_client_options(),
            compression_type=compression,
            linger_ms=5,
        ) as producer:
            for t in sent:
                topic = self.settings.topic("transactions")
                await producer.send(topic, encode_transaction(t), t.account_id.encode())

    async def send_records(
        self,
        records: Iterable[tuple[bytes | None, bytes | None]],
        rate: float | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Produce records with acknowledgement."""
        assert self._producer is not None
        start = time.monotonic()
        pending = []
        for i, (key, value) in enumerate(records):
            if rate is not None and i % 50 == 0:
                await asyncio.sleep(max(0.0, start + i / rate - time.monotonic()))
            topic = self.settings.topic("transactions")
            if key is None and value is None:  # send() rejects it, though Kafka allows it
                batch = self._producer.create_batch()
                batch.append(timestamp=None, key=None, value=None)
                batch.close()
                pending.append(await self._producer.send_batch(batch, topic, partition=0))
            else:
                pending.append(await self._producer.send(topic, value, key, headers=list(headers)))
        await asyncio.gather(*pending)

    async def records(self, role: str) -> list[Any]:
        """Return all records of a topic, partition by partition."""
        topic = self.settings.topic(role)  # type: ignore[arg-type]
        consumer = AIOKafkaConsumer(
            **self.settings.kafka_client_options(),
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        await consumer.start()
        try:
            counts = await ensure_topics(self.settings)
            places = [TopicPartition(topic, p) for p in range(counts.get(role, 1))]  # type: ignore[call-overload]
            consumer.assign(places)
            ends = await consumer.end_offsets(places)
            found: dict[TopicPartition, list[Any]] = {place: [] for place in places}
            while any([await consumer.position(p) < ends[p] for p in places]):
                for place, fetched in (await consumer.getmany(timeout_ms=1000)).items():
                    found[place] += fetched
        finally:
            await consumer.stop()
        return [record for place in places for record in found[place]]

    async def scores(self) -> list[Score]:
        """Return all published scores."""
        return [decode_score(record.value) for record in await self.records("scores")]

    async def until_applied(self, timeout_seconds: float = 60.0) -> None:
        """Wait until every partition's watermark is at the end of its log."""
        await until(self._is_applied, "the workers to apply the whole log", timeout_seconds)

    async def _is_applied(self) -> bool:
        topic = self.settings.topic("transactions")
        score_log = KafkaScoreLog(self.settings)
        await score_log.start()
        try:
            ends = await score_log.ends(topic, list(range(self.settings.topic_partitions)))
        finally:
            await score_log.stop()
        marks = await self.watermarks()
        return all(
            end == 0 or (partition in marks and marks[partition].next_offset >= end)
            for partition, end in ends.items()
        )

    async def watermarks(self) -> dict[int, Watermark]:
        """Return the watermarks in Redis, by partition."""
        keys = self._keys()
        client = redis_client(self.settings)
        try:
            found = {}
            for partition in range(self.settings.topic_partitions):
                value = await client.get(keys.watermark(partition))
                if value is not None:
                    found[partition] = Watermark.from_bytes(value)
            return found
        finally:
            await client.aclose()

    def _keys(self) -> Keys:
        return Keys(
            self.settings.redis_key_prefix,
            self.scorer.checkpoint.digest,
            self.settings.topic("transactions"),
        )

    async def assert_states_are_the_log(self) -> None:
        """Check that each account's state in Redis equals the one computed from its whole log.

        Merchants' features are the ones that the first score of each transaction records.
        """
        recorded: dict[str, Score] = {}
        for score in await self.scores():
            recorded.setdefault(score.source, score)
        by_partition: dict[int, list[Any]] = {}
        for record in await self.records("transactions"):
            by_partition.setdefault(record.partition, []).append(record)
        keys = self._keys()
        client = redis_client(self.settings)
        try:
            for partition, records in by_partition.items():
                accounts, expected = self._computed(partition, records, recorded)
                values = await client.mget(keys.accounts(partition, accounts))
                actual, loaded, refused = self.scorer.codec.decode(values)
                assert refused == 0
                wanted = expected.history.count > 0  # the other accounts are forgotten
                assert not (loaded & ~wanted).any(), "states that should be forgotten"
                assert loaded[wanted].all(), f"{int((~loaded[wanted]).sum())} states are missing"
                _assert_equal(actual, expected)
        finally:
            await client.aclose()

    def _computed(
        self, partition: int, records: list[Any], recorded: dict[str, Score]
    ) -> tuple[list[str], AccountStates]:
        decoder = BatchDecoder(self.settings, self.scorer.checkpoint)
        part = decoder.decode(partition, Chunk(0, len(records), records))
        topic = self.settings.topic("transactions")
        scores = [recorded[f"{topic}:{partition}:{r.offset}"] for r in part.records]
        raw = np.array([score.raw(MERCHANT_FEATURES) for score in scores], np.float32).reshape(
            len(scores), len(MERCHANT_FEATURES)
        )
        batch = micro_batch_of([part], [raw])
        states, _, _, _ = self.scorer.score([None] * len(part.accounts), batch)
        # A forgotten account has two rows: its state is the last one.
        row_of = {account: row for row, account in enumerate(part.accounts)}
        values = self.scorer.codec.encode(states, np.array(list(row_of.values()), np.intp))
        states, _, _ = self.scorer.codec.decode(values)
        return list(row_of), states


def _assert_equal(actual: AccountStates, expected: AccountStates) -> None:
    for name in ("first_offset", "last_offset", "last_record_ms", "recent_ids"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    for name in HISTORY_COLUMNS:
        assert np.array_equal(getattr(actual.history, name), getattr(expected.history, name)), name
    difference = np.abs(actual.hidden.astype("f4") - expected.hidden.astype("f4")).max()
    assert difference <= HIDDEN_TOLERANCE


async def until(
    condition: Callable[[], Awaitable[bool]],
    what: str,
    timeout_seconds: float = 60.0,
    pause_seconds: float = 0.1,
) -> None:
    """Wait for a condition; fail if it does not come true in time."""
    deadline = time.monotonic() + timeout_seconds
    while not await condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s for {what}"
        await asyncio.sleep(pause_seconds)


def assert_scored_once(scores: Sequence[Score], sent: Sequence[Transaction]) -> None:
    """Check that every transaction has exactly one score."""
    counts = Counter(score.transaction_id for score in scores)
    missing = [t.transaction_id for t in sent if t.transaction_id not in counts]
    assert not missing, f"{len(missing)} transactions without a score"
    repeated = {i: n for i, n in counts.items() if n > 1}
    assert not repeated, f"{len(repeated)} transactions with several scores"
    assert len(counts) == len(sent)


def assert_none_conflicts(scores: Sequence[Score], sent: Sequence[Transaction]) -> None:
    """Check that every transaction has a score; several scores of one source must be equal."""
    said: dict[str, set[tuple[str, float]]] = {}
    for score in scores:
        said.setdefault(score.transaction_id, set()).add((score.source, score.score))
    assert {t.transaction_id for t in sent} == said.keys()
    conflicts = {i: values for i, values in said.items() if len(values) > 1}
    assert not conflicts, f"{len(conflicts)} transactions with different scores"
