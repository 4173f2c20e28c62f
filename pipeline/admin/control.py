"""Instructions to the workers: records of the transactions topic that are no transactions."""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from pipeline.errors import RecurError
from pipeline.messages.control import CONTROL_HEADER
from pipeline.settings import Settings


@dataclass(frozen=True)
class Place:
    """Where a record lies in the transactions topic, and since when (epoch milliseconds)."""

    partition: int
    offset: int
    timestamp_ms: int


async def send_instruction(
    settings: Settings, instruction: bytes, partitions: list[int], key: bytes | None = None
) -> list[Place]:
    """Put an instruction into partitions' logs; returns once all replicas have it.

    Raises:
        RecurError: the broker does not take it.
    """
    topic = settings.topic("transactions")
    producer = AIOKafkaProducer(
        **settings.kafka_client_options(), acks="all", enable_idempotence=True
    )
    try:
        await producer.start()
        places = []
        for partition in partitions:
            # A null value would delete the account's records where a topic is compacted by key.
            appended = await producer.send_and_wait(
                topic, b"", key, partition, headers=[(CONTROL_HEADER, instruction)]
            )
            places.append(Place(partition, appended.offset, appended.timestamp))
        return places
    except (KafkaError, OSError) as error:
        raise RecurError(
            f"the broker at {settings.kafka_bootstrap_servers} does not take an instruction for"
            f" {topic} ({type(error).__name__}): see that it is up and that this user"
            " may write to it"
        ) from error
    finally:
        await producer.stop()
