"""Generated transactions reach the topic, each once and valid."""

from __future__ import annotations

import asyncio
import io
import uuid

import numpy as np
from rich.console import Console

from model.generator.stream import HistoryStream, Wish
from model.transaction import epoch_ms
from model.units import DAY_MS
from pipeline.local.kafka import Kafka
from pipeline.messages.transactions import decode_transaction
from pipeline.replay.generated import generated_blocks, generated_days, send_generated
from pipeline.replay.simulated import SimulatedStream
from pipeline.settings import load_settings
from tests.model.generator.small_generator import small_generator
from tests.pipeline.replay.test_producer import read_all


def stream() -> HistoryStream:
    return HistoryStream(small_generator(), Wish(accounts=60, days=10, seed=3))


def test_every_generated_transaction_arrives_once(kafka: Kafka) -> None:
    settings = load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:8]}-",
        topic_partitions=4,
    )
    code, sent = send_generated(stream(), settings, None, Console(file=io.StringIO()))
    records = asyncio.run(read_all(settings, sent))
    found = [decode_transaction(record.key, record.value, "EUR") for record in records]

    assert code == 0
    assert sent == sum(len(block.keys) for block in generated_blocks(stream()))
    assert len({transaction.transaction_id for transaction in found}) == sent
    times = np.array([epoch_ms(transaction.timestamp) for transaction in found])
    assert times.min() >= small_generator().header.start_ms
    assert {transaction.channel for transaction in found} == {"chip", "online"}


def test_the_demo_takes_the_same_transactions_day_by_day() -> None:
    days = list(generated_days(stream()))
    ids = sum(len(block.keys) for block in generated_blocks(stream()))

    assert sum(map(len, days)) == ids
    for day in days:
        assert len(np.unique(day.timestamp_ms // DAY_MS)) == 1
    taken = SimulatedStream.of_days(generated_days(stream())).take(100)
    assert (
        taken.columns.timestamp_ms.tolist()
        == [time for day in days for time in day.timestamp_ms.tolist()][:100]
    )
