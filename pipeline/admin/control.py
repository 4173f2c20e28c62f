"""Control records: records of the transactions topic that command the workers.

A manual command appends them. Workers apply them in the order of the log.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from pipeline.errors import RecurError
from pipeline.messages.control import CONTROL_HEADER
from pipeline.settings import Settings


@dataclass(frozen=True)
class ControlRecord:
    """A control record in the transactions topic: its offset, and its time in epoch ms."""

    partition: int
    offset: int
    timestamp_ms: int


async def send_control_records(
    settings: Settings, control: bytes, partitions: list[int], key: bytes | None = None
) -> list[ControlRecord]:
    """Append a control record to partitions; return once all replicas have it.

    Args:
        control: value of the record's control header.
        partitions: each gets one record.
        key: of the records; an account id in UTF-8, or None.

    Raises:
        RecurError: the broker does not accept a record.
    """
    topic = settings.topic("transactions")
    producer = AIOKafkaProducer(
        **settings.kafka_client_options(), acks="all", enable_idempotence=True
    )
    try:
        await producer.start()
        records = []
        for partition in partitions:
            # A null value would delete the account's records where a topic is compacted by key.
            appended = await producer.send_and_wait(
                topic, b"", key, partition, headers=[(CONTROL_HEADER, control)]
            )
            records.append(ControlRecord(partition, appended.offset, appended.timestamp))
        return records
    except (KafkaError, OSError) as error:
        raise RecurError(
            f"the broker at {settings.kafka_bootstrap_servers} does not accept a control record for"
            f" {topic} ({type(error).__name__}): see that it is up and that this user"
            " may write to it"
        ) from error
    finally:
        await producer.stop()
