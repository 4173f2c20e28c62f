"""Exactly-once output on a real broker and Redis, for whoever reads what is committed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.services import Kafka, Redis
from tests.pipeline_under_test import (
    PipelineUnderTest,
    assert_scored_once,
    transactions,
)


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    return PipelineUnderTest(
        kafka.bootstrap,
        redis_server.url,
        tmp_path,
        transactional=True,
        kafka_session_timeout_seconds=6.0,
    )


def test_clean(system: PipelineUnderTest) -> None:
    sent = transactions(20_000, accounts=500)

    async def run() -> None:
        async with system.running(workers=2):
            await system.send(sent)
            await system.until_applied()
            scores = await system.scores()
            assert_scored_once(scores, sent)
            await system.assert_states_are_the_log()

    asyncio.run(run())
