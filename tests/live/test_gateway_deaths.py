"""A gateway that is killed, and a Redis that is away, lose nothing that was accepted."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.scores import Score
from tests.fakes.running_gateway import gateways
from tests.fakes.running_pipeline import PipelineUnderTest, transactions

ACCEPTED = 20


def test_what_a_killed_gateway_accepted_is_found_by_another(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    async def body() -> None:
        under_test = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path)
        sent = transactions(ACCEPTED, 5, seed=21)
        async with under_test.running(1), gateways(under_test, 2) as (killed, other):
            worker = under_test.workers[0].process.pid
            os.kill(worker, signal.SIGSTOP)
            answers = [await killed.score(t, "respond-async") for t in sent]
            assert {answer.status_code for answer in answers} == {202}
            await asyncio.to_thread(killed.process.kill)
            os.kill(worker, signal.SIGCONT)
            scores = {s.transaction_id: s for s in await _all_scores(under_test)}
            assert scores.keys() == {t.transaction_id for t in sent}
            for transaction, answer in zip(sent, answers, strict=True):
                path = answer.headers["location"]
                found = await other.client.get(path, headers={"Prefer": "wait=20"})
                assert found.status_code == 200, found.text
                assert found.json()["source"] == scores[transaction.transaction_id].source

    asyncio.run(body())


async def _all_scores(under_test: PipelineUnderTest) -> list[Score]:
    await under_test.until_applied()
    return await under_test.scores()


def test_without_redis_the_answer_is_503_until_it_is_back(kafka: Kafka, tmp_path: Path) -> None:
    async def body(redis: Redis) -> None:
        under_test = PipelineUnderTest(kafka.bootstrap, redis.url, tmp_path)
        first, second = transactions(2, 2, seed=22)
        async with under_test.running(1), gateways(under_test) as (gateway,):
            before = await gateway.score(first)
            assert before.status_code == 200
            redis.pause()
            try:
                answer = await gateway.score(second, "wait=1")
                assert answer.status_code == 503
                assert "retry-after" in answer.headers
            finally:
                redis.resume()
            await gateway.until_ready()
            assert (await gateway.score(first)).content == before.content
            assert (await gateway.score(second)).status_code in (200, 503)

    with Redis() as redis:
        asyncio.run(body(redis))
