"""The running system on a real broker and Redis: its output, and ends that it survives.

Faults under load, and their measures, are in `faults`; `test_faults.py` does some of them.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import DefaultPartitioner

from model.transaction import Transaction
from pipeline.audit.verifier import VerifyOptions, verify
from pipeline.local.kafka import Kafka
from pipeline.local.ports import free_port
from pipeline.local.redis import Redis, RedisCluster
from pipeline.local.workers import WorkerProcess
from pipeline.messages.scores import decode_alert
from pipeline.messages.transactions import WARM_HEADER, encode_transaction
from pipeline.storage.account_state import STATE_FORMAT
from pipeline.storage.client import RIGHTS
from pipeline.storage.keys import MerchantKeys
from tests.fakes.memory_verify import NoBar
from tests.fakes.running_pipeline import (
    PipelineUnderTest,
    assert_scored_once,
    transactions,
    until,
)


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    return PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path)


async def metric(worker: WorkerProcess, name: str) -> float:
    await worker.refresh()
    return worker.samples[name]


def status(worker: WorkerProcess, path: str) -> int:
    url = f"http://{worker.host}:{worker.port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_each_transaction_is_scored_exactly_once_in_a_clean_run(system: PipelineUnderTest) -> None:
    sent = transactions(20_000, accounts=500)

    async def run() -> None:
        async with system.running(workers=2):
            await system.send(sent)
            await system.until_applied()
            scores = await system.scores()
            assert_scored_once(scores, sent)
            await system.assert_states_are_the_log()
            by_id = {t.transaction_id: t for t in sent}
            for score in scores:
                transaction = by_id[score.transaction_id]
                assert score.account_id == transaction.account_id
                assert score.amount == transaction.amount == score.features["amount"] or (
                    abs((score.features["amount"] or 0.0) - transaction.amount) < 1e-3
                )
                assert 0 <= score.score <= 1
            alerts = [decode_alert(record.value) for record in await system.records("alerts")]
            flagged = {score.source for score in scores if score.decision != "approve"}
            assert {alert.source for alert in alerts} == flagged
            assert len(alerts) == len(flagged)
            shares = [await metric(w, "recur_transactions_total") for w in system.workers]
            assert sum(shares) == len(sent)
            assert min(shares) > 0, "both workers share the partitions"

    asyncio.run(run())


def test_sigterm_finishes_the_micro_batch_and_publishes_nothing_twice(
    system: PipelineUnderTest,
) -> None:
    sent = transactions(40_000, accounts=500)

    async def run() -> None:
        async with system.running(workers=2):
            feeding = asyncio.create_task(system.send(sent, rate=8_000))
            leaver = system.workers[0]

            async def works() -> bool:
                return await metric(leaver, "recur_transactions_total") > 3_000

            await until(works, "the worker to be in mid-stream")
            assert await leaver.stop() == 0
            await feeding
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()

    asyncio.run(run())


def test_a_worker_that_joins_publishes_nothing_twice(system: PipelineUnderTest) -> None:
    sent = transactions(40_000, accounts=500)

    async def run() -> None:
        async with system.running(workers=1):
            feeding = asyncio.create_task(system.send(sent, rate=5_000))
            await asyncio.sleep(1)
            await system.start_workers(1)
            await feeding
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()

    asyncio.run(run())


def test_redis_away_for_ten_seconds_loses_nothing(kafka: Kafka, tmp_path: Path) -> None:
    sent = transactions(20_000, accounts=300)

    async def run(server: Redis) -> None:
        system = PipelineUnderTest(kafka.bootstrap, server.url, tmp_path)
        async with system.running(workers=1):
            feeding = asyncio.create_task(system.send(sent, rate=1_500))
            await asyncio.sleep(2)
            (worker,) = system.workers
            assert status(worker, "/ready") == 200
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(5)
            assert status(worker, "/ready") == 503
            assert status(worker, "/live") == 200
            await asyncio.sleep(5)
            await asyncio.to_thread(server.start)

            async def is_ready() -> bool:
                return status(worker, "/ready") == 200

            await until(is_ready, "/ready after Redis came back")
            await feeding
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()
            assert await metric(worker, "recur_redis_errors_total") > 0

    with Redis() as server:
        asyncio.run(run(server))


def bad_records() -> dict[str, tuple[bytes | None, bytes | None]]:
    """Return invalid records with their reasons; some reasons have several records."""
    good = json.loads(encode_transaction(transactions(1, 1)[0]))

    def changed(**fields: object) -> bytes:
        return json.dumps(good | fields).encode()

    key = good["account_id"].encode()
    far = 4_102_444_800_000  # the year 2100
    return {
        "not_json": (key, b"\x00\xff not json"),
        "not_json 2": (key, b""),
        "not_json 3": (key, changed(amount=float("nan"))),
        "not_json 4": (key, changed(amount=float("inf"))),
        "amount": (key, changed(amount=-1)),
        "amount 2": (key, changed().replace(str(good["amount"]).encode(), b"1e999")),
        "wrong_type": (key, changed(amount="12.50")),
        "wrong_type 2": (key, b"[1,2]"),
        "missing_field": (key, b'{"transaction_id":"t"}'),
        "id": (key, changed(merchant_id="")),
        "id 2": (b"A" * 10_000, changed(account_id="A" * 10_000)),
        "too_large": (key, changed(note="x" * 1_000_000)),
        "null_value": (key, None),
        "null_value 2": (None, None),
        "key_mismatch": (b"another", changed()),
        "key_mismatch 2": (None, changed()),
        "currency": (key, changed(currency="USD")),
        "timestamp": (key, changed(timestamp="2018-08-15T10:00:00")),
        "future_timestamp": (key, changed(timestamp=far)),
    }


def test_invalid_records_become_dead_letters_and_valid_ones_are_scored(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path)
    sent = transactions(2_000, accounts=100)
    bad = bad_records()

    async def run() -> None:
        async with system.running(workers=1):
            mixed: list[tuple[bytes | None, bytes | None]] = []
            wrong = list(bad.values())
            for i, transaction in enumerate(sent):
                mixed.append((transaction.account_id.encode(), encode_transaction(transaction)))
                if i % 100 == 50 and wrong:
                    mixed.append(wrong.pop())
            assert not wrong
            await system.send_records(mixed)
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            letters = await system.records("dead_letter")
            reasons = Counter(dict(letter.headers)["reason"].decode() for letter in letters)
            assert reasons == Counter(name.split()[0] for name in bad)
            values = {value for _, value in bad.values()}
            for letter in letters:
                headers = dict(letter.headers)
                assert headers["topic"].decode() == system.settings.topic("transactions")
                assert headers.keys() >= {"partition", "offset", "reason", "error", "time"}
                if "truncated" in headers:
                    assert any(v and letter.value and v.startswith(letter.value) for v in values)
                else:
                    assert letter.value in values
            (worker,) = system.workers
            for reason, count in reasons.items():
                assert await metric(worker, f'recur_rejected_total{{reason="{reason}"}}') == count

    asyncio.run(run())


def test_a_duplicate_transaction_is_dropped_and_counted(system: PipelineUnderTest) -> None:
    sent = transactions(1_000, accounts=50)

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(t for transaction in sent for t in (transaction, transaction))
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            assert await metric(system.workers[0], "recur_duplicate_transactions_total") == len(
                sent
            )

    asyncio.run(run())


def test_warm_up_records_build_states_and_raise_no_alert(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    system = PipelineUnderTest(
        kafka.bootstrap, redis_server.url, tmp_path, review_threshold=0.0, decline_threshold=1.0
    )
    sent = transactions(400, accounts=20)

    async def run() -> None:
        async with system.running(workers=1):
            records = [(t.account_id.encode(), encode_transaction(t)) for t in sent]
            await system.send_records(records[:300], headers=[(WARM_HEADER, b"1")])
            await system.send_records(records[300:])
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            alerts = [decode_alert(record.value) for record in await system.records("alerts")]
            assert {a.transaction_id for a in alerts} == {t.transaction_id for t in sent[300:]}
            await system.assert_states_are_the_log()

    asyncio.run(run())


def test_an_invalid_state_counts_as_absent_is_counted_and_marks_its_scores(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    """A worker with an empty cache finds flipped bits, another version and another size."""
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path)
    sent = transactions(600, accounts=12)
    damaged: dict[str, Callable[[bytes], bytes]] = {
        "A000001": lambda value: value[:200] + bytes([value[200] ^ 16]) + value[201:],
        "A000002": lambda value: bytes([STATE_FORMAT + 1]) + value[1:],
        "A000003": lambda value: value + value[-8:],
    }

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent[:300])
            await system.until_applied()
            await system.workers[0].stop()
            with redis_server.client() as client:
                for account, damage in damaged.items():
                    pattern = f"{system.settings.redis_key_prefix}:*:{account}"
                    (key,) = client.keys(pattern)
                    client.set(key, damage(client.get(key)), keepttl=True)
            (worker,) = await system.start_workers(1)
            await system.send(sent[300:])
            await system.until_applied()
            assert await metric(worker, 'recur_states_total{result="invalid"}') == len(damaged)
            scores = await system.scores()
            assert_scored_once(scores, sent)
            before = {t.transaction_id for t in sent[:300]}
            later = [s for s in scores if s.transaction_id not in before]
            assert {s.account_id for s in scores if s.state == "invalid"} == damaged.keys()
            assert not [s for s in scores if s.state and s.transaction_id in before]
            for account in damaged:
                own = [s for s in later if s.account_id == account]
                own.sort(key=lambda s: s.features["transactions_seen"] or 0.0)
                assert own[0].state == "invalid"
                assert own[0].features["transactions_seen"] == 1, "it was not reset"

    asyncio.run(run())


def test_states_live_on_a_redis_cluster(kafka: Kafka, tmp_path: Path) -> None:
    sent = transactions(10_000, accounts=200)

    async def run(cluster: RedisCluster) -> None:
        system = PipelineUnderTest(kafka.bootstrap, cluster.url, tmp_path, redis_cluster=True)
        async with system.running(workers=2):
            await system.send(sent)
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()

    with RedisCluster() as cluster:
        asyncio.run(run(cluster))


class KafkaWithUsers(Kafka):
    """A broker with a second listener that requires a user."""

    sasl_port = 0

    def _server_properties(self, log_directory: Path) -> dict[str, str]:
        properties = super()._server_properties(log_directory)
        self.sasl_port = self.sasl_port or free_port()
        own, controller = properties["listeners"].split(",")
        protocols = properties["listener.security.protocol.map"]
        return properties | {
            "listeners": f"{own},SASL_PLAINTEXT://127.0.0.1:{self.sasl_port},{controller}",
            "listener.security.protocol.map": f"{protocols},SASL_PLAINTEXT:SASL_PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
                "org.apache.kafka.common.security.plain.PlainLoginModule required "
                'user_recur="of the broker";'
            ),
        }


@pytest.mark.live
def test_the_users_of_kafka_and_redis_reach_every_client(tmp_path: Path) -> None:
    sent = transactions(2_000, accounts=50)
    least = f"~recur-* {RIGHTS}"

    async def run(broker: KafkaWithUsers, server: Redis) -> None:
        system = PipelineUnderTest(
            f"127.0.0.1:{broker.sasl_port}",
            server.url,
            tmp_path,
            kafka_security_protocol="SASL_PLAINTEXT",
            kafka_sasl_mechanism="PLAIN",
            kafka_sasl_username="recur",
            kafka_sasl_password="of the broker",
            redis_username="recur",
            redis_password="of-redis",
        )
        async with system.running(workers=1):
            await system.send(sent)
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()
            found = await verify(
                system.settings, system.scorer.checkpoint, VerifyOptions(), NoBar()
            )
            assert found.is_right
            assert found.accounts == len({t.account_id for t in sent})
            assert found.without_log is None, "a worker's rights do not list keys"
            with server.client() as admin:
                keys = MerchantKeys(system.settings.redis_key_prefix)
                assert admin.exists(keys.profile(sent[0].merchant_id))
                assert "recur" in {client["user"] for client in admin.client_list()}

    with KafkaWithUsers() as broker, Redis() as server:
        with server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "recur", "on", ">of-redis", *least.split())
        asyncio.run(run(broker, server))


def test_compressed_records_are_read_and_written(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    system = PipelineUnderTest(
        kafka.bootstrap, redis_server.url, tmp_path, kafka_compression="zstd"
    )
    sent = transactions(4_000, accounts=50)

    async def run() -> None:
        async with system.running(workers=1):
            for number, compression in enumerate(("lz4", "snappy", "zstd", "gzip")):
                part = sent[number * 1_000 : (number + 1) * 1_000]
                await system.send_compressed(part, compression)
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)

    asyncio.run(run())


def test_the_watchdog_ends_a_worker_whose_records_wait(kafka: Kafka, tmp_path: Path) -> None:
    sent = transactions(200, accounts=20)

    async def run(server: Redis) -> None:
        system = PipelineUnderTest(
            kafka.bootstrap, server.url, tmp_path, watchdog_seconds=3.0, redis_timeout_seconds=1.0
        )
        async with system.running(workers=1):
            (worker,) = system.workers
            await system.send(sent[:100])
            await system.until_applied()
            server.pause()
            await system.send(sent[100:])

            async def is_dead() -> bool:
                return worker.process.poll() is not None

            async def is_not_live() -> bool:
                return status(worker, "/live") == 503

            await until(is_not_live, "/live to turn false")
            await until(is_dead, "the watchdog")
            assert worker.process.poll() == 75
            server.resume()
            await system.start_workers(1)
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)

    with Redis() as server:
        asyncio.run(run(server))


def test_impossible_times_and_duplicate_ids_are_reported_on_a_real_broker(
    system: PipelineUnderTest,
) -> None:
    """Cases: wrong units, a clock ahead, records without a time, duplicate ids."""
    hour_ms = 3_600_000

    def payment(number: int, name: str, event_ms: int, amount: float = 20.0) -> bytes:
        return encode_transaction(
            Transaction(name, f"A{number}", "M1", amount, "EUR", timestamp=event_ms)
        )

    async def run() -> None:
        system.use(max_timestamp_age_seconds=86_400)
        topic = system.settings.topic("transactions")
        async with system.running(workers=1):
            now_ms = time.time_ns() // 1_000_000
            # Name, event time and CreateTime: an account for each, with a payment before and after.
            cases = [
                ("in seconds", now_ms // 1000, now_ms),
                ("in microseconds", now_ms * 1000, now_ms),
                ("ahead", now_ms + 20 * hour_ms, now_ms),
                ("no time", now_ms, -1),
                ("time 0", now_ms, 0),
            ]
            async with AIOKafkaProducer(**system.settings.kafka_client_options()) as producer:
                partitions = sorted(await producer.partitions_for(topic))
                for number, (name, event_ms, created_ms) in enumerate(cases):
                    batch = producer.create_batch()
                    key = f"A{number}".encode()
                    values = [
                        (payment(number, "first", now_ms - 60_000), now_ms),
                        (payment(number, name, event_ms), created_ms),
                        (payment(number, "again", now_ms), now_ms),
                        (payment(number, "again", now_ms, amount=21.0), now_ms),
                        (payment(number, "again", now_ms), now_ms),
                        (payment(number, "old", now_ms - 48 * hour_ms), now_ms),
                        (payment(number, "last", now_ms + 600_000), now_ms + 600_000),
                    ]
                    for value, record_ms in values:
                        assert batch.append(key=key, value=value, timestamp=record_ms)
                    batch.close()
                    partition = DefaultPartitioner()(key, partitions, partitions)
                    await (await producer.send_batch(batch, topic, partition=partition))
            await system.until_applied()
            scores = await system.scores()
            letters = [dict(record.headers) for record in await system.records("dead_letter")]
            reasons = Counter(headers["reason"].decode() for headers in letters)
            assert reasons == {"timestamp_unit": 2, "old_timestamp": len(cases)}
            assert len(scores) == 7 * len(cases) - 2 - 2 * len(cases)
            pauses = {
                (score.account_id, score.transaction_id): score.features["seconds_since_last"]
                for score in scores
            }
            assert pauses["A2", "last"] == 300.0, "its clock was ahead by the tolerance alone"
            assert {pauses[f"A{number}", "last"] for number in (0, 1, 3, 4)} == {600.0}
            (worker,) = system.workers
            assert await metric(worker, "recur_id_conflicts_total") == len(cases)
            assert await metric(worker, "recur_duplicate_transactions_total") == len(cases)
            assert await metric(worker, "recur_record_clock_skew_total") == len(cases)
            assert await metric(worker, "recur_score_latency_seconds_sum") >= 0
            ahead = 'recur_event_time_skew_total{direction="ahead"}'
            assert await metric(worker, ahead) == 1
            checkpoint = system.scorer.checkpoint
            assert (await verify(system.settings, checkpoint, VerifyOptions(), NoBar())).is_right

    asyncio.run(run())
