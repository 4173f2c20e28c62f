"""`recur account`: its output, also for a state in an unexpected partition."""

from __future__ import annotations

import asyncio
import time
import uuid

import numpy as np
import pytest

from model.features.account import AccountHistory
from model.units import DAY_MS
from pipeline.admin.inspect_account import AccountView, describe, load_view
from pipeline.errors import RecurError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.settings import Settings, load_settings
from pipeline.storage.account_state import AccountStates, StateCodec
from pipeline.storage.client import redis_client
from pipeline.storage.keys import Keys
from tests.fakes.memory_workers import small_checkpoint

CHECKPOINT = small_checkpoint()
CODEC = StateCodec(1, 8)


def state(last_record_ms: int) -> AccountStates:
    states, _, _ = CODEC.decode([None])
    states.first_offset[:], states.last_offset[:] = 5, 1234
    states.last_record_ms[:] = last_record_ms
    history = AccountHistory.empty(1)
    history.count[:] = 1412
    history.last_event_ms[:] = 1_534_327_200_000
    history.decayed_count[:] = [1.5, 8.0, 30.0]
    history.decayed_amount[:] = [30.0, 320.0, 1500.0]
    history.usual_amount[:] = 47.5
    states.history.put(slice(None), history)
    return states


def test_a_state_is_described_for_a_person() -> None:
    now_ms = time.time_ns() // 1_000_000
    lines = list(
        describe(AccountView("A", 3, 3, state(now_ms - 3 * 3_600_000), 200, None), CHECKPOINT, 30.0)
    )
    text = "\n".join(lines)

    for words in [
        "1,412",
        "2018-08-15 10:00:00 UTC",
        "3 hours ago, offset 1234",
        "1.5 / 8.0 / 30.0",
        "20.00 / 40.00 / 50.00 EUR",
        "47.50 EUR",
        f"200 bytes, of model {CHECKPOINT.digest}",
        "no trained account head",
    ]:
        assert words in text
    assert "partitioner" not in text
    assert "no state" not in text


def test_an_unexpected_partition_and_a_long_silence_are_shown() -> None:
    now_ms = time.time_ns() // 1_000_000
    view = AccountView("A", 2, 3, state(now_ms - 40 * DAY_MS), 200, 0.75)
    checkpoint = CHECKPOINT.with_header(metrics={"verdict_auc": 0.95})

    text = "\n".join(describe(view, checkpoint, 30.0))

    assert "2 (Kafka's default partitioner gives 3)" in text
    assert "silent for over 30 days: its next payment starts it from no state" in text
    assert "yes, with probability 0.750 (AUC 0.950" in text


def settings_of(kafka: Kafka, redis_server: Redis) -> Settings:
    name = uuid.uuid4().hex[:8]
    return load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        redis_url=redis_server.url,
        topic_prefix=f"{name}-",
        redis_key_prefix=name,
        topic_partitions=3,
        startup_timeout_seconds=30,
    )


def test_an_account_is_found_in_any_partition(kafka: Kafka, redis_server: Redis) -> None:
    settings = settings_of(kafka, redis_server)
    keys = Keys(settings.redis_key_prefix, CHECKPOINT.digest, settings.topic("transactions"))
    value = CODEC.encode(state(1_700_000_000_000), np.arange(1))[0]

    async def run() -> None:
        with pytest.raises(RecurError, match="there is no topic"):
            await load_view(settings, CHECKPOINT, "A")
        await ensure_topics(settings)
        with pytest.raises(RecurError, match="in none of the 3 partitions"):
            await load_view(settings, CHECKPOINT, "A")
        client = redis_client(settings)
        try:
            for partition in range(3):
                key = keys.accounts(partition, ["A"])[0]
                await client.set(key, value)
                view = await load_view(settings, CHECKPOINT, "A")
                assert view.partition == partition
                assert int(view.state.history.count[0]) == 1412
                await client.set(key, value[:-1] + bytes([value[-1] ^ 1]))
                with pytest.raises(RecurError, match="of another format or damaged"):
                    await load_view(settings, CHECKPOINT, "A")
                await client.delete(key)
        finally:
            await client.aclose()

    asyncio.run(run())


def test_an_error_names_a_redis_that_does_not_answer(kafka: Kafka, redis_server: Redis) -> None:
    settings = settings_of(kafka, redis_server)
    unreachable = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})

    async def run() -> None:
        await ensure_topics(settings)
        await load_view(unreachable, CHECKPOINT, "A")

    with pytest.raises(RecurError, match="Redis does not answer"):
        asyncio.run(run())
