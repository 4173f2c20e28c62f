"""A topic that was deleted and created again, on a real broker and Redis: no record is skipped."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from rich.console import Console

from model.transaction import Transaction
from pipeline.admin.rebuild_states import rebuild_lines
from pipeline.errors import StartupError
from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import TopicRole, ensure_topics, topic_ids
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.local.workers import WorkerProcess
from pipeline.messages.scores import decode_alert
from pipeline.messages.transactions import encode_transaction
from pipeline.replay.producer import Feed
from pipeline.settings import Settings
from pipeline.storage.state_store import RedisStateStore, Save
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import log_of, shown
from pipeline.worker import preflight as startup
from pipeline.worker.preflight import check_services
from tests.fakes import running_pipeline as pipeline_under_test
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions, until

pytestmark = pytest.mark.timeout(900)

SLOW_SECONDS = 300.0
"""A worker that starts beside others may take minutes; no test here measures it."""


@pytest.fixture
def system(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PipelineUnderTest:
    monkeypatch.setattr(pipeline_under_test, "READY_SECONDS", SLOW_SECONDS)
    return PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, topic_partitions=2)


async def delete(settings: Settings, role: TopicRole) -> None:
    """Delete a topic, and wait until it is gone."""
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    await admin.start()
    try:
        await admin.delete_topics([settings.topic(role)])
        await until(lambda: _is_gone(admin, settings.topic(role)), "the topic to go", SLOW_SECONDS)
    finally:
        await admin.close()


async def _is_gone(admin: AIOKafkaAdminClient, topic: str) -> bool:
    return topic not in await admin.list_topics()


async def make(settings: Settings, role: TopicRole) -> None:
    """Create a topic as it was before."""
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    await admin.start()
    try:
        await admin.create_topics([NewTopic(settings.topic(role), settings.topic_partitions, 1)])
    finally:
        await admin.close()


async def make_again(settings: Settings, role: TopicRole) -> tuple[bytes, bytes]:
    """Delete a topic and create it again; return its ids before and after."""
    before = (await topic_ids(settings))[settings.topic(role)]
    await delete(settings, role)
    await make(settings, role)
    await until(lambda: _is_there(settings, role), "the topic to be there", SLOW_SECONDS)
    return before, (await topic_ids(settings))[settings.topic(role)]


async def _is_there(settings: Settings, role: TopicRole) -> bool:
    return settings.topic(role) in await topic_ids(settings)


async def end_of(worker: WorkerProcess) -> tuple[int, str]:
    """Return exit status and log of a worker that ends by itself."""

    async def ended() -> bool:
        return worker.process.poll() is not None

    await until(ended, "the worker to end", SLOW_SECONDS)
    status = worker.process.poll()
    assert status is not None
    return status, worker.log_path.read_text()


async def send_anew(settings: Settings, sent: list[Transaction]) -> None:
    """Produce with a producer that does not know the earlier topic."""
    async with Feed(settings) as feed:
        await feed.send(
            [t.account_id.encode() for t in sent], [encode_transaction(t) for t in sent]
        )


def assert_told(log: str, topic: str, ids: tuple[bytes, bytes]) -> None:
    """Check that one line names the topic, both ids and the command."""
    (line,) = [line for line in log.splitlines() if "--new-log" in line]
    for words in (f"an earlier {topic}: ", *map(shown, ids), "recur state rebuild --new-log"):
        assert words in line
    assert "errors.StartupError" not in log  # no traceback


async def begin(system: PipelineUnderTest) -> str:
    """Return the output of `recur state rebuild --new-log`."""
    console = Console(file=StringIO())
    lines = await rebuild_lines(
        system.settings, None, dry_run=False, wait=True, console=console, new_log=True
    )
    return "\n".join(lines)


def test_a_topic_made_again_stops_workers_and_none_of_its_records_is_skipped(
    system: PipelineUnderTest,
) -> None:
    """This happens without workers, with more records than before, and beside a running one."""
    settings = system.settings
    topic = settings.topic("transactions")
    old, new, newer = (transactions(n, accounts=20, seed=n) for n in (100, 300, 60))

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(old)
            await system.until_applied(SLOW_SECONDS)
            await system.workers[0].stop()
            ids = await make_again(settings, "transactions")
            await send_anew(settings, new)

            with pytest.raises(StartupError) as refused:
                await check_services(settings, system.scorer.checkpoint)
            assert_told(str(refused.value), topic, ids)
            assert len(await system.scores()) == len(old)

            assert "states of the old log are deleted" in await begin(system)
            assert "nothing to do" in await begin(system)
            await system.start_workers(1)
            await system.until_applied(SLOW_SECONDS)
            assert_scored_once(await system.scores(), [*old, *new])

            ids = await make_again(settings, "transactions")
            await send_anew(settings, newer)
            status, log = await end_of(system.workers[-1])
            assert status != 0
            assert_told(log, topic, ids)
            assert_scored_once(await system.scores(), [*old, *new])

    asyncio.run(run())


def test_a_worker_that_may_begins_from_the_new_log_while_it_runs(
    system: PipelineUnderTest,
) -> None:
    """The new log is longer than the earlier one, or shorter."""
    system.use(on_new_log="begin")
    sent = [transactions(n, accounts=20, seed=n) for n in (200, 500, 50)]

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent[0])
            await system.until_applied(SLOW_SECONDS)
            for more in sent[1:]:
                await make_again(system.settings, "transactions")
                await send_anew(system.settings, more)
                await until(partial(_are_scored, system, more), "all scored", SLOW_SECONDS)
            assert_scored_once(await system.scores(), [t for some in sent for t in some])
            assert system.workers[0].process.poll() is None

    asyncio.run(run())


async def _are_scored(system: PipelineUnderTest, sent: list[Transaction]) -> bool:
    scored = {score.transaction_id for score in await system.scores()}
    return all(t.transaction_id in scored for t in sent)


def test_what_a_group_commits_tells_its_log_and_hides_no_alert_of_another(
    system: PipelineUnderTest, redis_server: Redis
) -> None:
    """After a loss of data, alerts are published again if the offset names another log."""
    system.use(review_threshold=0.0, decline_threshold=1.0)
    settings = system.settings
    topic = settings.topic("transactions")
    sent = transactions(40, accounts=10)

    async def committed_tells(log_id: bytes) -> bool:
        found = await committed_offsets(settings)
        return sum(found.values()) == len(sent) and {log_of(n) for n in found.values()} == {log_id}

    async def commit(place: TopicPartition, offset: int, log_id: bytes) -> None:
        consumer = AIOKafkaConsumer(
            **settings.kafka_client_options(),
            group_id=settings.kafka_group_id,
            enable_auto_commit=False,
        )
        await consumer.start()
        try:
            consumer.assign([place])
            await consumer.commit({place: (offset, shown(log_id))})
        finally:
            await consumer.stop()

    async def run() -> None:
        async with system.running(workers=1):
            log_id = (await topic_ids(settings))[topic]
            await system.send(sent)
            await system.until_applied(SLOW_SECONDS)
            await until(partial(committed_tells, log_id), "the commit", SLOW_SECONDS)
            await system.workers[0].stop()
            ends = await committed_offsets(settings)
            assert len(await system.records("alerts")) == len(sent)

            await commit(TopicPartition(topic, 1), ends[1], bytes(reversed(log_id)))
            with redis_server.client() as client:
                client.flushall()
            await system.start_workers(1)
            await system.until_applied(SLOW_SECONDS)
            await system.workers[-1].stop()

            alerts = [decode_alert(record.value) for record in await system.records("alerts")]
            said = Counter(alert.source.rsplit(":", 1)[0] for alert in alerts)
            assert said == {f"{topic}:0": ends[0], f"{topic}:1": 2 * ends[1]}
            assert_scored_once(await system.scores(), sent)

    asyncio.run(run())


@pytest.mark.parametrize("policy", ["begin", "stop"])
def test_a_topic_made_again_while_a_worker_starts_is_not_called_cut_off(
    system: PipelineUnderTest, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new log ends before the watermark of the earlier one."""
    system.use(on_new_log=policy)
    settings = system.settings
    topic = settings.topic("transactions")
    ids: list[tuple[bytes, bytes]] = []

    class MadeAgain(KafkaScoreLog):
        async def ends(self, topic: str, partitions: list[int]) -> dict[int, int]:
            if not ids:
                ids.append(await make_again(settings, "transactions"))
            return await super().ends(topic, partitions)

    monkeypatch.setattr(startup, "KafkaScoreLog", MadeAgain)

    async def run() -> None:
        await ensure_topics(settings)
        log_id = (await topic_ids(settings))[topic]
        store = RedisStateStore.from_settings(settings, system.scorer.checkpoint.digest)
        mark = Watermark(settings.topic_partitions, 5, 0, 1, log_id).to_bytes()
        try:
            assert await store.save([Save(0, None, mark, [], [])]) == [True]
        finally:
            await store.close()
        if policy == "begin":
            await check_services(settings, system.scorer.checkpoint)
            return
        with pytest.raises(StartupError) as refused:
            await check_services(settings, system.scorer.checkpoint)
        assert_told(str(refused.value), topic, ids[0])

    asyncio.run(run())
    assert len(ids) == 1


def test_lag_counts_what_an_open_transaction_holds_back_and_a_topic_that_goes_ends_the_worker(
    system: PipelineUnderTest,
) -> None:
    """The log then ends with a transaction marker, which is neither a record nor lag."""
    system.use(topic_missing_seconds=2.0)
    settings = system.settings
    topic = settings.topic("transactions")
    sent = transactions(36, accounts=5)

    async def run() -> None:
        async with system.running(workers=1):
            (worker,) = system.workers

            async def shows(lag: float, held: float) -> bool:
                await worker.refresh()
                found = [
                    worker.samples.get(f'recur_{name}{{partition="0"}}')
                    for name in ("consumer_lag_records", "held_records")
                ]
                return found == [lag, held]

            for one in sent[:20]:
                await system.send_to(0, one)
            producer = AIOKafkaProducer(
                **settings.kafka_client_options(), transactional_id=f"{topic}-open"
            )
            await producer.start()
            try:
                async with producer.transaction():
                    for one in sent[20:25]:
                        value, key = encode_transaction(one), one.account_id.encode()
                        await producer.send_and_wait(topic, value, key, partition=0)
                    for one in sent[25:35]:
                        await system.send_to(0, one)
                    await until(partial(shows, 15.0, 15.0), "the lag to be told", SLOW_SECONDS)
                    await until(lambda: _tells(worker, "behind_offset=20"), "a line", SLOW_SECONDS)
                    assert await worker.ready()
                # Aborted, so that the log ends with invisible records and a marker.
                await producer.begin_transaction()
                value, key = encode_transaction(sent[35]), sent[35].account_id.encode()
                await producer.send_and_wait(topic, value, key, partition=0)
                await producer.abort_transaction()
            finally:
                await producer.stop()
            await until(partial(shows, 0.0, 0.0), "the lag to go", SLOW_SECONDS)
            assert_scored_once(await system.scores(), sent[:35])

            await delete(settings, "transactions")
            status, log = await end_of(worker)
            assert status != 0
            told = [line for line in log.splitlines() if f"topic {topic} was deleted" in line]
            assert "was not created again within 2 s" in told[-1]
            assert log.count("a topic was deleted; waiting") == 1

    asyncio.run(run())


async def _tells(worker: WorkerProcess, words: str) -> bool:
    return words in worker.log_path.read_text()
