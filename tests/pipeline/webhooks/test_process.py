"""`recur webhooks` on a real broker and Redis, at receivers that fail, hang and go away."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from pipeline.errors import RecurError
from pipeline.kafka.topics import NO_COORDINATOR_YET, admin_client, ensure_topics, topic_ids
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.scoring.health import Health
from pipeline.settings import Settings, load_settings
from pipeline.webhooks.commands import Replay, list_lines, send_test, switch_endpoint
from pipeline.webhooks.endpoints import configured_endpoints
from pipeline.webhooks.metrics import WebhookMetrics
from pipeline.webhooks.partition_progress import CommittedProgress
from pipeline.webhooks.process import WebhookProcess
from pipeline.webhooks.runner import committed_progress, group_of
from pipeline.webhooks.schedule import RetrySchedule
from tests.fakes.running_pipeline import until
from tests.fakes.running_webhooks import webhooks_process
from tests.pipeline.webhooks.receiver import SECRET, Receiver, endpoint_table, hang, raw, status

QUICK = (0.0, 0.2, 0.2, 0.2)
ROOT = Path(__file__).resolve().parents[3]


class Site:
    """Topics of a test's own, a file of endpoints, and a receiver."""

    def __init__(self, kafka: Kafka, redis: Redis, folder: Path, receiver: Receiver) -> None:
        name = uuid.uuid4().hex[:8]
        self.receiver = receiver
        self.file = folder / "webhooks.toml"
        self.options: dict[str, Any] = {
            "kafka_bootstrap_servers": kafka.bootstrap,
            "redis_url": redis.url,
            "redis_key_prefix": f"recur-{name}",
            "topic_prefix": f"{name}-",
            "kafka_group_id": f"group-{name}",
            "topic_partitions": 2,
            "kafka_commit_interval_seconds": 0.2,
            "webhooks_file": str(self.file),
            "webhooks_timeout_seconds": 5.0,
            "http_port": 0,
        }
        self.settings: Settings = load_settings(**self.options)
        self.sent: list[str] = []

    def configure(self, *names: str, **fields: Any) -> None:
        """Write endpoints; the path of each is its name."""
        fields = {"start": "earliest"} | fields
        tables = [endpoint_table(n, self.receiver.url(f"/{n}"), **fields) for n in names]
        self.file.write_text("\n".join(tables))

    async def raise_alerts(self, count: int, **fields: Any) -> list[str]:
        """Produce alerts, and return their transactions' ids."""
        ids = [f"t-{len(self.sent) + i}-{uuid.uuid4().hex[:6]}" for i in range(count)]
        options = self.settings.kafka_client_options()
        async with AIOKafkaProducer(**options, acks="all") as producer:
            for i, one in enumerate(ids):
                row = {
                    "transaction_id": one, "account_id": "A1", "score": 0.9, "decision": "decline",
                    "source": f"{self.settings.topic('transactions')}:{i % 2}:{len(self.sent) + i}",
                    "created_at": 1_700_000_000_000,
                } | fields  # fmt: skip
                topic = self.settings.topic("alerts")
                await producer.send_and_wait(topic, json.dumps(row).encode(), b"A1", i % 2)
        self.sent += ids
        return ids

    async def dead_letters(self) -> list[Any]:
        """Read the dead-letter topic."""
        topic = self.settings.topic("dead_letter")
        async with AIOKafkaConsumer(**self.settings.kafka_client_options()) as consumer:
            places = [TopicPartition(topic, p) for p in range(2)]
            consumer.assign(places)
            await consumer.seek_to_beginning()
            ends = await consumer.end_offsets(places)
            found: list[Any] = []
            while len(found) < sum(ends.values()):
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    found += records
            return found

    async def until_got(self, name: str, ids: Sequence[str]) -> None:
        """Wait until an endpoint was asked to take each of these."""

        async def has_all() -> bool:
            return set(ids) <= set(self.receiver.ids(f"/{name}"))

        await until(has_all, f"all alerts at {name}")

    async def progress(self, name: str) -> dict[TopicPartition, CommittedProgress]:
        """Read what an endpoint has committed."""
        try:
            return (await committed_progress(self.settings, group_of(self.settings, name)))[1]
        except NO_COORDINATOR_YET:
            return {}

    async def until_position_holds_all(self, name: str) -> None:
        """Wait until the committed position is past all alerts, without retries."""

        async def is_past() -> bool:
            found = await self.progress(name)
            position = sum(at.position for at in found.values())
            return position == len(self.sent) and not any(at.retries for at in found.values())

        await until(is_past, f"the position of {name}")

    @asynccontextmanager
    async def delivering(
        self, delays_seconds: Sequence[float] = QUICK
    ) -> AsyncIterator[WebhookMetrics]:
        """Deliver in this process; stop and wait at the end."""
        metrics = WebhookMetrics()
        _, endpoints = configured_endpoints(self.settings)
        process = WebhookProcess(
            self.settings, endpoints, Health(60.0), metrics, RetrySchedule(delays_seconds)
        )
        task = asyncio.create_task(process.run())
        try:
            yield metrics
        finally:
            process.stop()
            await task


Test = Callable[[Site], Any]


@pytest.fixture
def on_site(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> Callable[[Test], None]:
    """Run a test with topics and a receiver."""

    def run(test: Test) -> None:
        async def with_site() -> None:
            async with Receiver().running() as receiver:
                site = Site(kafka, redis_server, tmp_path, receiver)
                await ensure_topics(site.settings)
                await test(site)

        asyncio.run(with_site())

    return run


def value_of(metrics: WebhookMetrics, name: str, endpoint: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, {"endpoint": endpoint, **labels}) or 0.0


def test_no_endpoint_holds_up_another_and_each_ends_as_its_answers_say(
    on_site: Callable[[Test], None],
) -> None:
    names = ("good", "hangs", "redirects", "lies", "fails-first", "gone")

    async def test(site: Site) -> None:
        site.configure(*names)
        answers = site.receiver.answers
        answers["/hangs"] = hang()
        answers["/redirects"] = status(302, f"Location: {site.receiver.url('/elsewhere')}")
        answers["/lies"] = raw(b"HTTP/1.1 2OO OK\r\n\r\n")
        answers["/fails-first"] = status(500)
        answers["/gone"] = status(410)
        ids = await site.raise_alerts(20)
        async with site.delivering() as metrics:
            await site.until_got("good", ids)
            await site.until_got("fails-first", ids[:1])
            answers["/fails-first"] = status(200)
            await site.until_got("fails-first", ids)
            await site.until_position_holds_all("fails-first")
            for name in ("redirects", "lies"):
                await site.until_position_holds_all(name)

            async def is_gone() -> bool:
                return value_of(metrics, "recur_webhooks_state", "gone", state="gone") == 1

            await until(is_gone, "the endpoint to be disabled")
            assert any("gone" in line.split() for line in (await list_lines(site.settings))[1:])
            answers["/gone"] = status(200)
            await switch_endpoint(site.settings, "gone", None)
            await site.until_position_holds_all("gone")
            await site.until_got("gone", ids)
            await site.until_position_holds_all("good")
            assert sorted(site.receiver.ids("/good")) == sorted(ids)  # each of them once
            assert value_of(metrics, "recur_webhooks_delivered_total", "good") == 20
            assert value_of(metrics, "recur_webhooks_delivered_total", "hangs") == 0

        for request in site.receiver.of("/good"):
            standardwebhooks.Webhook(SECRET).verify(request.body, request.headers)
        assert not site.receiver.of("/elsewhere")
        dead = [dict(record.headers) for record in await site.dead_letters()]
        for name in ("redirects", "lies"):
            assert sum(d["endpoint"] == name.encode() for d in dead) == 20
            assert len(site.receiver.of(f"/{name}")) == 20 * len(QUICK)
        assert {d["reason"] for d in dead} == {b"webhook_failed"}
        assert {d["endpoint"] for d in dead} <= {b"redirects", b"lies", b"hangs"}

    on_site(test)


def test_a_killed_process_that_starts_again_delivers_all_and_its_position_holds(
    on_site: Callable[[Test], None], tmp_path: Path
) -> None:
    log = tmp_path / "webhooks.log"

    async def test(site: Site) -> None:
        site.configure("cases", "slow")
        site.receiver.answers["/slow"] = hang()
        ids = await site.raise_alerts(60)
        async with webhooks_process(site.options, log) as process:
            await site.until_got("cases", ids[:1])
            process.send_signal(signal.SIGKILL)
            await process.wait()
        more = await site.raise_alerts(20)
        site.receiver.answers.clear()
        async with webhooks_process(site.options, log) as process:
            for name in ("cases", "slow"):
                await site.until_got(name, [*ids, *more])
                await site.until_position_holds_all(name)
            process.terminate()
            assert await process.wait() == 0
        before = len(site.receiver.requests)
        (last,) = await site.raise_alerts(1)
        async with webhooks_process(site.options, log):
            for name in ("cases", "slow"):
                await site.until_got(name, [last])
                await site.until_position_holds_all(name)
        assert len(site.receiver.requests) == before + 2  # nothing but the new one
        shown = await asyncio.to_thread(log.read_text)
        assert "webhooks start" in shown
        for secret in (SECRET, site.receiver.url("/cases"), ids[0], "A1"):
            assert secret not in shown

    on_site(test)


def test_retries_survive_a_kill_and_are_not_early(
    on_site: Callable[[Test], None], tmp_path: Path
) -> None:
    """The second attempt of the schedule is due 5 s after the first, whoever makes it."""
    log = tmp_path / "webhooks.log"

    async def test(site: Site) -> None:
        site.configure("cases")
        site.receiver.answers["/cases"] = status(500)
        ids = await site.raise_alerts(4)
        failed_at = time.time()

        async def all_wait() -> bool:
            found = await site.progress("cases")
            return sum(len(at.retries) for at in found.values()) == len(ids)

        async with webhooks_process(site.options, log):
            await until(all_wait, "the retries to be committed")
        site.receiver.answers.clear()
        site.receiver.requests.clear()
        found = await site.progress("cases")
        assert {retry.failed for at in found.values() for retry in at.retries} == {1}
        assert min(r.due for at in found.values() for r in at.retries) >= int(failed_at) + 5
        async with site.delivering((0.0, 5.0, 300.0)):
            await site.until_got("cases", ids)
            await site.until_position_holds_all("cases")
        assert time.time() >= failed_at + 5
        assert len(site.receiver.requests) == len(ids)

    on_site(test)


def test_filters_a_pause_a_replay_and_a_test_event(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        site.configure("cases", decisions=["decline"], min_score=0.8, categories=["5411"])
        await switch_endpoint(site.settings, "cases", "paused")
        async with site.delivering() as metrics:
            begin_ms = time.time_ns() // 1_000_000
            wanted = await site.raise_alerts(4, category="5411")
            await site.raise_alerts(2, category="5411", decision="review")
            await site.raise_alerts(2, category="5411", score=0.5)
            await site.raise_alerts(2, category="7995")

            async def is_paused() -> bool:
                return value_of(metrics, "recur_webhooks_state", "cases", state="paused") == 1

            await until(is_paused, "the pause")
            assert "paused" in (await list_lines(site.settings))[1]
            assert not site.receiver.requests
            await switch_endpoint(site.settings, "cases", None)
            await site.until_position_holds_all("cases")
            assert sorted(site.receiver.ids("/cases")) == sorted(wanted)
            assert value_of(metrics, "recur_webhooks_filtered_total", "cases") == 6
        first = {request.message_id for request in site.receiver.requests}

        lines, is_done = await Replay(site.settings, "cases", begin_ms, None).run()

        assert is_done, lines
        assert "4 delivered, 6 left out by its filters, 0 failed" in lines[0]
        assert [r.message_id in first for r in site.receiver.requests] == [True] * 8
        assert "delivered" in await send_test(site.settings, "cases")
        site.receiver.answers["/cases"] = status(500)
        with pytest.raises(RecurError, match="server_error"):
            await send_test(site.settings, "cases")
        lines, is_done = await Replay(
            site.settings, "cases", begin_ms, None, delays_seconds=(0.0, 0.1)
        ).run()
        assert not is_done
        assert "0 delivered" in lines[0]
        assert len(lines) == 5

    on_site(test)


def test_a_changed_file_counts_without_a_restart_and_a_wrong_one_changes_nothing(
    on_site: Callable[[Test], None],
) -> None:
    async def test(site: Site) -> None:
        site.configure("one")
        async with site.delivering() as metrics:
            first = await site.raise_alerts(2)
            await site.until_got("one", first)
            site.file.write_text("[[endpoints")

            async def is_refused() -> bool:
                return metrics.registry.get_sample_value("recur_webhooks_file_valid") == 0

            await until(is_refused, "the file to be refused")
            second = await site.raise_alerts(2)
            await site.until_got("one", second)
            site.configure("one", "two")
            await site.until_got("two", [*first, *second])

    on_site(test)


def test_the_category_of_an_alert_is_that_of_its_transaction(
    on_site: Callable[[Test], None],
) -> None:
    async def test(site: Site) -> None:
        topic = site.settings.topic("transactions")
        async with AIOKafkaProducer(**site.settings.kafka_client_options()) as producer:
            for category in ("5411", "7995"):
                await producer.send_and_wait(
                    topic, b'{"category":"%b"}' % category.encode(), b"A1", 0
                )
        site.configure("cases", categories=["5411"])
        wanted, *others = [
            (await site.raise_alerts(1, source=f"{topic}:0:{offset}"))[0] for offset in (0, 1, 2)
        ]
        async with site.delivering():
            await site.until_position_holds_all("cases")

        assert site.receiver.ids("/cases") == [wanted]
        assert len(others) == 2  # another category, and a transaction that is not there

    on_site(test)


def test_a_second_process_takes_partitions_over_and_nothing_is_lost_or_repeated(
    on_site: Callable[[Test], None],
) -> None:
    async def test(site: Site) -> None:
        site.configure("cases")
        async with site.delivering() as first:
            ids = await site.raise_alerts(10)
            await site.until_got("cases", ids)
            async with site.delivering() as second:

                async def both_deliver() -> bool:
                    ids.extend(await site.raise_alerts(4))
                    await site.until_got("cases", ids)
                    name = "recur_webhooks_delivered_total"
                    return value_of(second, name, "cases") > 0 < value_of(first, name, "cases")

                await until(both_deliver, "the second process to deliver")
            ids += await site.raise_alerts(10)
            await site.until_got("cases", ids)
            await site.until_position_holds_all("cases")

        assert sorted(site.receiver.ids("/cases")) == sorted(ids)

    on_site(test)


def test_a_topic_that_was_made_again_hides_no_alert(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        site.configure("cases")
        async with site.delivering():
            await site.raise_alerts(4)
            await site.until_position_holds_all("cases")
        topic = site.settings.topic("alerts")
        async with admin_client(site.settings) as admin:
            await admin.delete_topics([topic])

        async def is_made() -> bool:
            try:
                await ensure_topics(site.settings)
            except RecurError:
                return False  # the broker still deletes it
            return (await topic_ids(site.settings, ("alerts",))).get(topic) is not None

        await until(is_made, "the topic")
        site.sent.clear()
        ids = await site.raise_alerts(6)  # more than before: no offset tells
        async with site.delivering():
            await site.until_got("cases", ids)
            await site.until_position_holds_all("cases")

    on_site(test)
