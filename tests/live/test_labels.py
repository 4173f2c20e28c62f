"""Labels on the running system: they change later scores, and each is recorded once."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from rich.console import Console

from model.features.merchant import BUCKET_MS, SETTLE_MS, WEIGHT_MAX
from model.transaction import Transaction
from pipeline.admin import rebuild_merchants
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import StartupError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.scores import stored_weight
from pipeline.replay.labels import encode_labels
from pipeline.replay.producer import Feed
from pipeline.storage.client import redis_client
from pipeline.storage.merchant_profile import Fraud, Profile, transaction_hash
from pipeline.storage.merchant_store import MerchantLabel, RedisMerchantStore
from pipeline.worker.preflight import check_services
from tests.fakes.memory_workers import checkpoint_of_weights
from tests.fakes.offline import Log, offline_merchant_raw, random_checkpoint
from tests.fakes.running_pipeline import (
    EVENT_TIME_MS,
    PipelineUnderTest,
    assert_none_conflicts,
    transactions,
    until,
)

DAY_MS = 86_400_000


async def send_labels(
    feed: Feed, labelled: Sequence[Transaction], delay_ms: int, *, is_fraud: bool = True
) -> None:
    times = np.array([t.timestamp for t in labelled], np.int64)
    block = encode_labels(
        [t.transaction_id for t in labelled],
        [t.account_id for t in labelled],
        [t.merchant_id for t in labelled],
        np.full(len(labelled), is_fraud),
        times,
        times + delay_ms,
        "test",
    )
    await feed.send(block.keys, block.values)


async def until_booked(system: PipelineUnderTest, feed: Feed) -> None:
    """Wait until every label is recorded."""
    await feed.flush()
    store = RedisMerchantStore.from_settings(system.settings)

    async def booked() -> bool:
        return all(
            [
                await store.recorded_to(partition) > last
                for partition, last in feed.count.last_offsets.items()
            ]
        )

    try:
        await until(booked, "the labels to be booked")
    finally:
        await store.close()


def test_a_label_changes_the_scores_of_later_buckets_at_its_merchant(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    log = Log.simulated(2_000, customers=100, terminals=50, seed=1)
    path = tmp_path / "checkpoint.safetensors"
    random_checkpoint(log, offline_merchant_raw(log, 7 * DAY_MS)).save(path)
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, checkpoint=path)
    begin = EVENT_TIME_MS // BUCKET_MS * BUCKET_MS + SETTLE_MS

    def payment(name: str, merchant: str, timestamp_ms: int) -> Transaction:
        return Transaction(
            transaction_id=f"{name}-{merchant}",
            account_id=f"A-{name}-{merchant}",
            merchant_id=merchant,
            amount=25.0,
            currency="EUR",
            timestamp=timestamp_ms,
        )

    history = [
        payment(f"past{i}", merchant, begin + i * 60_000)
        for i in range(20)
        for merchant in ("skimmed", "sound")
    ]

    async def scores_at(bucket: int) -> tuple[float, float]:
        pair = [payment(f"at{bucket}", m, begin + bucket * BUCKET_MS) for m in ("skimmed", "sound")]
        await system.send(pair)
        await system.until_applied()
        found = {score.transaction_id: score.score for score in await system.scores()}
        one, two = (found[payment.transaction_id] for payment in pair)
        return one, two

    async def run() -> None:
        async with system.running(workers=1), Feed(system.settings, "labels") as labels:
            await system.send(history)
            await system.until_applied()
            skimmed = [t for t in history if t.merchant_id == "skimmed"]
            await send_labels(labels, skimmed, 29 * BUCKET_MS)
            await until_booked(system, labels)
            before, alike = await scores_at(29)
            assert before == alike, "the label came in this bucket, which is not closed"
            after, other = await scores_at(30)
            assert abs(after - other) > 1e-3
            # The last label says legitimate: the effect of the others is undone.
            await send_labels(labels, skimmed, 30 * BUCKET_MS, is_fraud=False)
            await until_booked(system, labels)
            after, other = await scores_at(31)
            assert after == other

    asyncio.run(run())


def test_a_fraud_with_a_low_merchant_weight_does_not_raise_its_merchants_risk(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds after a loss of the notes: the scores hold the weights, too."""
    monkeypatch.setattr(rebuild_merchants, "SETTLE_SECONDS", 0.3)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint_of_weights().save(path)
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, checkpoint=path)
    begin = EVENT_TIME_MS // BUCKET_MS * BUCKET_MS
    names = ("plain", "blamed")

    def payment(name: str, merchant: str, amount: float, bucket: int = 0) -> Transaction:
        return Transaction(
            transaction_id=f"{name}-{merchant}",
            account_id=f"A-{merchant}",
            merchant_id=merchant,
            amount=amount,
            currency="EUR",
            timestamp=begin + bucket * BUCKET_MS + SETTLE_MS,
        )

    frauds = [payment("fraud", "plain", 50.0), payment("fraud", "blamed", 4_000.0)]
    usual = [payment(f"usual{i}", merchant, 50.0) for merchant in names for i in range(19)]

    async def weights(store: RedisMerchantStore) -> list[int]:
        """Return the weights of the two merchants' recorded frauds."""
        values = await store.load(names)
        return [f.weight for value in values if value for f in Profile.from_bytes(value).frauds]

    async def run() -> None:
        store = RedisMerchantStore.from_settings(system.settings)
        client = redis_client(system.settings)
        async with system.running(workers=1), Feed(system.settings, "labels") as labels:
            await system.send(usual)
            await system.until_applied()
            await system.send(frauds)
            await system.until_applied()
            await send_labels(labels, frauds, 8 * DAY_MS - 2 * BUCKET_MS)
            await until_booked(system, labels)
            later = [payment("later", merchant, 50.0, 64) for merchant in names]
            await system.send(later)
            await system.until_applied()
            found = {score.transaction_id: score for score in await system.scores()}
            plain, blamed = (found[t.transaction_id].features["merchant_risk_30d"] for t in later)
            assert plain == pytest.approx(1 / 20)
            assert blamed is not None
            assert blamed < 0.1 / 20
            assert found[frauds[0].transaction_id].merchant_weight is None
            assert found[frauds[1].transaction_id].out_of_range == ["amount"]

            right = await weights(store)
            assert right[0] == WEIGHT_MAX
            keys = [key async for key in client.scan_iter(f"{system.settings.redis_key_prefix}:*")]
            kinds = (b":merchant:", b":note:", b":labels:")
            await client.delete(*(key for key in keys if any(kind in key for kind in kinds)))

            async def booked_again() -> bool:
                return await weights(store) == [WEIGHT_MAX] * 2

            await until(booked_again, "the worker to book its labels again")
            console = Console(file=io.StringIO())
            told = await rebuild_merchants.rebuild_merchants_lines(
                system.settings, dry_run=False, console=console
            )
            assert "  known frauds of 1 profiles corrected" in told
            assert await weights(store) == right
        await store.close()
        await client.aclose()

    asyncio.run(run())


def test_profiles_equal_offline_computing_after_a_kill_during_labels(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    system = PipelineUnderTest(
        kafka.bootstrap, redis_server.url, tmp_path, kafka_session_timeout_seconds=6.0
    )
    sent = transactions(30_000, accounts=500)
    labelled = sent[::5]
    expected: dict[str, Profile] = {}
    for t in labelled:
        assert isinstance(t.timestamp, int)
        entry = Fraud(
            transaction_hash(t.transaction_id),
            t.timestamp // BUCKET_MS,
            (t.timestamp + 7 * DAY_MS) // BUCKET_MS,
        )
        expected.setdefault(t.merchant_id, Profile()).record(entry, True)
    contradicted = labelled[::9]
    for t in contradicted:
        entry = Fraud(transaction_hash(t.transaction_id), 0, 2**31)
        expected[t.merchant_id].record(entry, False)

    async def stream_labels(feed: Feed) -> None:
        for start in range(0, len(labelled), 200):
            await send_labels(feed, labelled[start : start + 200], 7 * DAY_MS)
            await asyncio.sleep(0.1)
        await send_labels(feed, contradicted, 8 * DAY_MS, is_fraud=False)

    async def run() -> None:
        async with system.running(workers=2), Feed(system.settings, "labels") as labels:
            feeding = asyncio.create_task(system.send(sent, rate=8_000))
            labelling = asyncio.create_task(stream_labels(labels))
            victim = system.workers[0]

            async def works() -> bool:
                await victim.refresh()
                booked = victim.samples['recur_labels_total{decision="approve",label="fraud"}']
                return booked > 500 and victim.samples["recur_transactions_total"] > 2_000

            await until(works, "the worker to be in mid-stream")
            victim.process.kill()
            await asyncio.gather(feeding, labelling)
            await system.until_applied()
            await until_booked(system, labels)
            assert_none_conflicts(await system.scores(), sent)
            await system.assert_states_are_the_log()
            await assert_profiles(system, sent, expected)

    asyncio.run(run())


def test_the_labels_topic_may_have_another_number_of_partitions(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    """Partition 2 of one topic is independent of partition 2 of the other."""
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, topic_partitions=2)
    sent = transactions(2_000, accounts=100)

    async def run() -> None:
        admin = AIOKafkaAdminClient(**system.settings.kafka_client_options())
        await admin.start()
        await admin.create_topics([NewTopic(system.settings.topic("labels"), 5, 1)])
        await admin.close()
        async with system.running(workers=2), Feed(system.settings, "labels") as labels:
            assert labels.partitions == 5
            await send_labels(labels, sent[:500], 7 * DAY_MS)
            await system.send(sent)
            await until_booked(system, labels)
            await send_labels(labels, sent[500:600], 7 * DAY_MS)
            await until_booked(system, labels)
            await system.until_applied()
            assert_none_conflicts(await system.scores(), sent)
            booked = 0.0
            for worker in system.workers:
                await worker.refresh()
                assert worker.samples["recur_partitions_assigned"] == 1
                booked += worker.samples['recur_labels_total{decision="approve",label="fraud"}']
                booked += worker.samples['recur_labels_total{decision="review",label="fraud"}']
                booked += worker.samples['recur_labels_total{decision="decline",label="fraud"}']
            assert booked == 600

    asyncio.run(run())


def test_a_new_group_reads_labels_from_the_start_with_any_reset_policy(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    """Transactions may start at the end of their topic; labels describe the past."""
    system = PipelineUnderTest(
        kafka.bootstrap, redis_server.url, tmp_path, kafka_auto_offset_reset="latest"
    )
    sent = transactions(100, accounts=20)

    async def run() -> None:
        await ensure_topics(system.settings)
        async with Feed(system.settings, "labels") as labels:
            await send_labels(labels, sent, 7 * DAY_MS)
            async with system.running(workers=1):
                await until_booked(system, labels)

    asyncio.run(run())


def test_a_labels_topic_that_was_recreated_keeps_a_worker_from_starting(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    """Otherwise its labels would count as recorded, because their offsets are low."""
    settings = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path).settings
    entry = Fraud(1, 10, 20)

    async def run() -> None:
        store = RedisMerchantStore.from_settings(settings)
        await store.record_labels(1, [MerchantLabel(6, "M1", True, entry)], 0, 7)
        await store.close()
        with pytest.raises(StartupError, match=r"labels-1 \(offset 7, the log ends at 0\)"):
            await check_services(settings, load_checkpoint(settings))

    asyncio.run(run())


async def assert_profiles(
    system: PipelineUnderTest, sent: Sequence[Transaction], expected: dict[str, Profile]
) -> None:
    """Compare profiles: labels are exact, counts may differ by the micro-batches at the crash."""
    names = sorted({t.merchant_id for t in sent})
    store = RedisMerchantStore.from_settings(system.settings)
    values = await store.load(names)
    await store.close()
    weights = {
        transaction_hash(score.transaction_id): WEIGHT_MAX
        if score.merchant_weight is None
        else stored_weight(score.merchant_weight)
        for score in await system.scores()
    }
    counted = 0
    for name, value in zip(names, values, strict=True):
        assert value is not None
        profile = Profile.from_bytes(value)
        wanted = [
            replace(fraud, weight=weights[fraud.id_hash])
            for fraud in expected.get(name, Profile()).frauds
        ]
        assert sorted(profile.frauds, key=lambda f: f.id_hash) == sorted(
            wanted, key=lambda f: f.id_hash
        ), name
        counted += int(profile.counts.sum())
    assert abs(counted - len(sent)) <= 2 * system.settings.micro_batch_max
