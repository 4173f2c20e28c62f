"""Workers with names of their own in the group: one restarts and the others keep on."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.local.workers import WorkerProcess
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions

SESSION_SECONDS = 120.0
"""More than any restart takes here."""


def assignments(worker: WorkerProcess) -> list[str]:
    return re.findall(r"partitions assigned .*", worker.log_path.read_text())


def partitions(worker: WorkerProcess) -> str:
    (found,) = re.findall(r"\[[0-9, ]*\]", assignments(worker)[-1])
    return str(found)


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_a_named_worker_restarts_without_a_rebalance_and_no_transaction_is_lost_or_scored_twice(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, guarantee: str
) -> None:
    system = PipelineUnderTest(
        kafka.bootstrap,
        redis_server.url,
        tmp_path,
        kafka_session_timeout_seconds=SESSION_SECONDS,
        processing_guarantee=guarantee,
        kafka_group_instance_id="b",
    )
    sent = transactions(600, accounts=60)

    async def run() -> None:
        async with system.running(workers=1):
            system.use(kafka_group_instance_id="a")
            (restarted,) = await system.start_workers(1)
            other = system.workers[0]
            await system.send(sent[:200])
            await system.until_applied()
            before = len(assignments(other)), other.log_path.read_text().count("revoked")

            assert await restarted.stop() == 0
            await system.send(sent[200:400])
            (successor,) = await system.start_workers(1)
            await system.send(sent[400:])
            await system.until_applied()

            after = len(assignments(other)), other.log_path.read_text().count("revoked")
            assert after == before, "the other worker kept its partitions"
            assert partitions(successor) == partitions(restarted)
            assert len(assignments(successor)) == 1
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()

    asyncio.run(run())
