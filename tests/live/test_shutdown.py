"""A worker ends when it has to: told to, whatever is away; and where its group refuses it.

While it waits instead it tells so, once a minute.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka import errors as kafka_errors
from aiokafka.coordinator.assignors.range import RangePartitionAssignor

from pipeline.kafka.group_errors import group_refusal
from pipeline.kafka.topics import ensure_topics
from pipeline.local.services import HOST, Kafka, Redis
from pipeline.local.workers import WorkerProcess, start_worker
from pipeline.settings import load_settings
from pipeline.worker.shutdown import SECOND_SIGNAL_SECONDS, UNFINISHED_EXIT_CODE, ShutdownGuard
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions, until

END_SECONDS = 120.0
"""Far more than any end takes, on any machine; those that are not bounded take for ever."""

AWAY_SECONDS = 10.0

LINES_MAX = 12
"""An outage's own lines, those of a rebalance, and an error or two of a new kind."""


@pytest.fixture(scope="module")
def broker() -> Iterator[Kafka]:
    """A broker that tests stop for a while, with Kafka's own bounds of a session time-out."""
    with Kafka(properties={"group.min.session.timeout.ms": "6000"}) as kafka:
        yield kafka


def system(broker: Kafka, server: Redis, directory: Path, **settings: Any) -> PipelineUnderTest:
    return PipelineUnderTest(
        broker.bootstrap, server.url, directory, topic_partitions=2, shutdown_seconds=3, **settings
    )


def start(pipeline: PipelineUnderTest) -> WorkerProcess:
    """A worker that need not get ready."""
    environment = {f"RECUR_{k.upper()}": str(v) for k, v in pipeline.overrides.items()}
    return start_worker(0, pipeline.directory, environment | {"RECUR_LOG_FORMAT": "text"})


async def ended(worker: WorkerProcess) -> int:
    return await asyncio.to_thread(worker.process.wait, END_SECONDS)


async def until_said(worker: WorkerProcess, text: str) -> None:
    async def said() -> bool:
        return text in worker.log_path.read_text()

    await until(said, f"the worker to say {text!r}", END_SECONDS)


def last_line(worker: WorkerProcess) -> str:
    return worker.log_tail().splitlines()[-1]


# The group


def test_a_session_timeout_under_the_brokers_minimum_ends_the_worker_with_the_setting(
    broker: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    pipeline = system(broker, redis_server, tmp_path, kafka_session_timeout_seconds=2)

    async def run() -> None:
        with start(pipeline).process as process:
            assert await asyncio.to_thread(process.wait, END_SECONDS) == 1

    asyncio.run(run())
    said = (tmp_path / "worker-0.log").read_text()
    assert said.splitlines()[-1].startswith("recur: the group")
    assert "RECUR_KAFKA_SESSION_TIMEOUT_SECONDS is 2" in said.splitlines()[-1]


def test_a_group_that_shares_out_in_another_way_ends_the_worker_with_the_setting(
    broker: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    pipeline = system(broker, redis_server, tmp_path)

    async def run() -> None:
        await ensure_topics(pipeline.settings)
        other = AIOKafkaConsumer(
            pipeline.settings.topic("transactions"),
            bootstrap_servers=broker.bootstrap,
            group_id=pipeline.settings.kafka_group_id,
            partition_assignment_strategy=[RangePartitionAssignor],
        )
        await other.start()
        try:
            worker = start(pipeline)
            with worker.process:
                assert await ended(worker) == 1
                assert last_line(worker).startswith("recur: the group")
                assert "RECUR_KAFKA_GROUP_ID" in last_line(worker)
        finally:
            await other.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (kafka_errors.InvalidSessionTimeoutError(), "RECUR_KAFKA_SESSION_TIMEOUT_SECONDS is 10"),
        (kafka_errors.InconsistentGroupProtocolError(), "RECUR_KAFKA_GROUP_ID"),
        (kafka_errors.InvalidGroupIdError(), "RECUR_KAFKA_GROUP_ID"),
        (kafka_errors.GroupAuthorizationFailedError("recur"), "kafka-acls.sh"),
        (kafka_errors.TopicAuthorizationFailedError({"transactions"}), "kafka-acls.sh"),
        (kafka_errors.KafkaError("UnknownError()"), "group.max.size"),
    ],
)
def test_each_refusal_of_the_group_is_one_line_that_says_what_to_do(
    error: kafka_errors.KafkaError, names: str
) -> None:
    said = str(group_refusal(load_settings(), error))

    assert said.startswith("the group recur refuses this worker (")
    assert names in said
    assert "\n" not in said


# Told to stop


def test_told_to_stop_whatever_is_away_it_ends_in_time_and_nothing_is_lost(
    broker: Kafka, tmp_path: Path
) -> None:
    sent = transactions(4_000, accounts=100)

    async def run(server: Redis) -> None:
        pipeline = system(broker, server, tmp_path, redis_timeout_seconds=1)
        async with pipeline.running(workers=1):
            await pipeline.send(sent[:1_000])
            await pipeline.until_applied()
            server.pause()
            try:
                await pipeline.send(sent[1_000:2_000])
                await until_said(pipeline.workers[0], "does not answer")
                pipeline.workers[0].process.send_signal(signal.SIGTERM)
                assert await ended(pipeline.workers[0]) in (0, UNFINISHED_EXIT_CODE)
            finally:
                server.resume()

            (worker,) = await pipeline.start_workers(1)
            feeding = asyncio.create_task(pipeline.send(sent[2_000:]))
            await asyncio.sleep(0)
            broker.pause()
            try:
                worker.process.send_signal(signal.SIGTERM)
                assert await ended(worker) == UNFINISHED_EXIT_CODE
                assert "RECUR_SHUTDOWN_SECONDS" in last_line(worker)
            finally:
                broker.resume()
            await feeding

            pipeline.use(shutdown_seconds=600)
            (worker,) = await pipeline.start_workers(1)
            broker.pause()
            try:
                worker.process.send_signal(signal.SIGINT)
                await until_said(worker, "told to stop")
                await asyncio.sleep(SECOND_SIGNAL_SECONDS + 0.1)
                worker.process.send_signal(signal.SIGTERM)
                assert await ended(worker) == UNFINISHED_EXIT_CODE
                assert "a second time" in last_line(worker)
            finally:
                broker.resume()

            (worker,) = await pipeline.start_workers(1)
            await pipeline.until_applied()
            worker.process.send_signal(signal.SIGINT)
            assert await ended(worker) == 0
            assert_scored_once(await pipeline.scores(), sent)
            await pipeline.assert_states_are_the_log()

    with Redis() as server:
        asyncio.run(run(server))


def test_told_to_stop_while_it_waits_for_a_broker_at_its_start_it_ends(
    redis_server: Redis, tmp_path: Path
) -> None:
    with socket.create_server((HOST, 0)) as silent:
        address = "{}:{}".format(*silent.getsockname())
        pipeline = PipelineUnderTest(
            address, redis_server.url, tmp_path, startup_timeout_seconds=600
        )
        worker = start(pipeline)
        with worker.process:
            silent.settimeout(END_SECONDS)
            connection, _ = silent.accept()
            with connection:
                worker.process.send_signal(signal.SIGTERM)
                assert asyncio.run(ended(worker)) == 0
    assert "told to stop before it began" in worker.log_path.read_text()


def test_an_end_that_takes_too_long_is_made_whatever_holds_up_the_loop(tmp_path: Path) -> None:
    codes: list[int] = []
    ending = ShutdownGuard(0.05, tmp_path / "own", end_process=codes.append)
    (tmp_path / "own").mkdir()

    ending.begin()
    deadline = time.monotonic() + END_SECONDS
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)

    assert codes == [UNFINISHED_EXIT_CODE]
    assert not (tmp_path / "own").exists()


def test_a_signal_sent_twice_by_a_shell_is_one(tmp_path: Path) -> None:
    codes: list[int] = []
    now = 100.0
    ending = ShutdownGuard(600, tmp_path, end_process=codes.append, clock=lambda: now)
    try:
        ending.told(signal.SIGINT)
        now += SECOND_SIGNAL_SECONDS / 2
        ending.told(signal.SIGINT)
        assert codes == []
        now += SECOND_SIGNAL_SECONDS
        ending.told(signal.SIGINT)
        assert codes == [UNFINISHED_EXIT_CODE]
    finally:
        ending.cancel()


# Waiting


def test_a_broker_that_is_away_is_told_of_in_a_few_lines(
    broker: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    pipeline = system(broker, redis_server, tmp_path)

    async def run() -> None:
        async with pipeline.running(workers=1):
            (worker,) = pipeline.workers
            before = len(worker.log_path.read_text().splitlines())
            await asyncio.to_thread(broker.kill)
            await until_said(worker, "a service does not answer")
            await asyncio.sleep(AWAY_SECONDS)
            await asyncio.to_thread(broker.start)
            await until_said(worker, "it answers again")
            lines = worker.log_path.read_text().splitlines()[before:]
            (away,) = [line for line in lines if "a service does not answer" in line]
            (back,) = [line for line in lines if "it answers again" in line]
            assert "service=kafka" in away
            left_out = sum(map(int, re.findall(r"lines=(\d+)", "\n".join(lines))))
            assert left_out > 50, "libraries say a lot; otherwise this test shows nothing"
            minutes = float(re.findall(r"seconds=([\d.]+)", back)[0]) / 60
            assert len(lines) <= LINES_MAX + 2 * minutes, "\n".join(lines)

    asyncio.run(run())
