"""Exactly-once output on a real broker and Redis, for whoever reads what is committed.

The tests of the same promises on a broker in memory, at every step:
tests/pipeline/scoring/test_exactly_once.py.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.transaction import Transaction
from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.transactional_producer import TransactionalProducer
from pipeline.local.services import Kafka, Redis
from pipeline.local.workers import WorkerProcess
from pipeline.messages.scores import decode_alert
from pipeline.messages.transactions import encode_transaction
from tests.fakes.running_pipeline import (
    PipelineUnderTest,
    assert_scored_once,
    transactions,
    until,
)

SETTINGS: dict[str, Any] = {
    "processing_guarantee": "exactly_once",
    "kafka_session_timeout_seconds": 6.0,
    # So that there are alerts.
    "review_threshold": 0.02,
    "decline_threshold": 0.5,
}


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    return PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, **SETTINGS)


def records_of(sent: Sequence[Transaction]) -> list[tuple[bytes | None, bytes | None]]:
    """Records to send: every hundredth transaction is followed by one that is rejected."""
    records: list[tuple[bytes | None, bytes | None]] = []
    for i, transaction in enumerate(sent):
        key = transaction.account_id.encode()
        records.append((key, encode_transaction(transaction)))
        if i % 100 == 99:
            records.append((key, b"junk %d" % i))
    return records


async def assert_exactly_once(system: PipelineUnderTest, sent: Sequence[Transaction]) -> None:
    """A score for each transaction, an alert for each that is flagged, and a dead letter for
    each rejected record, for who reads with read_committed; states are the log, and the group's
    offsets are at its end.
    """
    await system.until_applied()
    scores = await system.scores()
    assert_scored_once(scores, sent)
    flagged = [score.source for score in scores if score.decision != "approve"]
    alerts = [decode_alert(record.value).source for record in await system.records("alerts")]
    assert flagged
    assert Counter(alerts) == Counter(flagged)
    letters = Counter(record.value for record in await system.records("dead_letter"))
    assert letters == Counter(b"junk %d" % i for i in range(99, len(sent), 100))
    await system.assert_states_are_the_log()
    committed = await committed_offsets(system.settings)
    assert committed == {p: mark.next_offset for p, mark in (await system.watermarks()).items()}


async def total(workers: Sequence[WorkerProcess], name: str) -> float:
    """A metric's sum over workers that are alive."""
    alive = [worker for worker in workers if worker.process.poll() is None]
    for worker in alive:
        await worker.refresh()
    return sum(worker.samples[name] for worker in alive)


def test_workers_that_are_killed_or_leave_say_nothing_twice(system: PipelineUnderTest) -> None:
    """Killed at a moment by chance, which may fall between the commit and the save; and without a
    zombie nobody is fenced.
    """
    sent = transactions(12_000, accounts=200)

    async def run() -> None:
        async with system.running(workers=2):
            feeding = asyncio.create_task(system.send_records(records_of(sent), rate=2_000))
            await asyncio.sleep(0.5 + random.random())
            system.workers[0].process.kill()
            await system.start_workers(1)
            assert await system.workers[1].stop() == 0
            await feeding
            await assert_exactly_once(system, sent)
            for name in ("recur_fenced_total", "recur_zombie_scores_total"):
                assert await total(system.workers, name) == 0

    asyncio.run(run())


def test_what_was_committed_when_a_worker_died_is_applied_though_no_record_comes(
    kafka: Kafka, tmp_path: Path
) -> None:
    """Redis takes no writes, so the death falls between commit and save for certain; the group's
    offset is at the log's end, and no record would show that states are behind.
    """
    sent = transactions(3_000, accounts=100)

    async def run(server: Redis) -> None:
        system = PipelineUnderTest(kafka.bootstrap, server.url, tmp_path, **SETTINGS)
        async with system.running(workers=1):
            records = records_of(sent)
            await system.send_records(records[:1_000])
            await system.until_applied()
            with server.client() as client:
                client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
                marks = await system.watermarks()
                await system.send_records(records[1_000:])

                async def is_ahead() -> bool:
                    committed = await committed_offsets(system.settings)
                    return any(committed[p] > marks[p].next_offset for p in marks)

                await until(is_ahead, "a commit past the watermark")
                system.workers[0].process.kill()
                system.workers[0].process.wait()
                client.execute_command("CLIENT", "UNPAUSE")
            assert await system.watermarks() == marks
            await system.start_workers(1)
            await assert_exactly_once(system, sent)

    with Redis() as server:
        asyncio.run(run(server))


def test_an_owner_that_is_fenced_asks_the_group_and_goes_on(system: PipelineUnderTest) -> None:
    """A zombie may take a partition late, and then it is the group's owner that is refused."""
    sent = transactions(6_000, accounts=200)

    async def run() -> None:
        async with system.running(workers=1):
            feeding = asyncio.create_task(system.send_records(records_of(sent), rate=2_000))
            await asyncio.sleep(1)
            zombie = TransactionalProducer(system.settings)
            for partition in range(system.settings.topic_partitions):
                await zombie.take(partition)
            await zombie.stop()
            await feeding
            await assert_exactly_once(system, sent)
            assert await total(system.workers, "recur_fenced_total") > 0

    asyncio.run(run())


def test_a_zombie_that_wakes_up_is_fenced_and_says_nothing(system: PipelineUnderTest) -> None:
    """Without transactions its scores stand beside the new owner's; see test_end_to_end."""
    sent = transactions(26_000, accounts=200)

    async def run() -> None:
        async with system.running(workers=2):
            feeding = asyncio.create_task(system.send_records(records_of(sent), rate=2_000))
            await asyncio.sleep(1.5)
            zombie = system.workers[0]
            zombie.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(9)
            zombie.process.send_signal(signal.SIGCONT)
            await feeding
            await assert_exactly_once(system, sent)
            assert await total(system.workers, "recur_zombie_scores_total") == 0

    asyncio.run(run())
