"""Dead letters of alerts that an endpoint did not take.

They go to the dead-letter topic, in the form of all dead letters: the alert's key and value, and
where it is. So they need no topic, rights, or reader of their own; the headers ``topic`` and
``endpoint`` tell them from rejected transactions.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from aiokafka import AIOKafkaProducer

from pipeline.kafka.producer import is_refusal
from pipeline.settings import Settings

DeadReason = Literal["webhook_failed", "webhook_alert_gone"]
"""The last attempt failed; or retention deleted the alert before a retry."""


class DeadLetterSink(Protocol):
    """A receiver of dead letters."""

    async def send(
        self, endpoint: str, record: Any, reason: DeadReason, error: str, time_ms: int
    ) -> bool:
        """Store a dead letter; False if the broker refuses it for good.

        Args:
            endpoint: the endpoint's name.
            record: the alert's record; its key and value may be None.
            reason: why it is dead.
            error: result of the last attempt.
            time_ms: wall clock, epoch milliseconds.

        Raises:
            KafkaError: the broker does not answer.
        """


class DeadLetterProducer:
    """A :class:`DeadLetterSink` that produces to the dead-letter topic.

    Args:
        settings: name the broker and the topic.
    """

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.topic("dead_letter")
        self._limit = settings.dead_letter_value_max_bytes
        self._options = settings.kafka_client_options()
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: the broker does not answer.
        """
        self._producer = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True)
        await self._producer.start()

    async def stop(self) -> None:
        """Send what is left, and disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def send(
        self, endpoint: str, record: Any, reason: DeadReason, error: str, time_ms: int
    ) -> bool:
        """See :class:`DeadLetterSink`."""
        assert self._producer is not None
        value = record.value
        headers = {
            "topic": record.topic,
            "partition": str(record.partition),
            "offset": str(record.offset),
            "reason": reason,
            "error": error,
            "time": str(time_ms),
            "endpoint": endpoint,
        }
        if value is not None and len(value) > self._limit:
            headers["truncated"] = str(len(value))
            value = value[: self._limit]
        place = f"{record.topic}:{record.partition}:{record.offset}".encode()
        key = place if record.key is None else record.key
        rows = [(name, text.encode()) for name, text in headers.items()]
        try:
            await self._producer.send_and_wait(self._topic, value, key, headers=rows)
        except Exception as error_of_broker:
            if is_refusal(error_of_broker):
                return False
            raise
        return True
