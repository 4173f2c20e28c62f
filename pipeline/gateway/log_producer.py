"""Producer of single records, with a bound on the time that their fate is unknown.

aiokafka's idempotent producer repeats a record until the broker has it, for ever. A gateway must
know when a record can no longer arrive. So after the bound it gives up the producer with all that
waits in it, and takes a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

import pipeline.kafka.produce_request  # noqa: F401 - packs the requests of aiokafka's producers
from pipeline.kafka.message_limits import TOO_LARGE
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.producer import is_refusal
from pipeline.logs import quiet
from pipeline.settings import Settings

Header = tuple[str, bytes]


class RefusedRecordError(Exception):
    """The broker refuses the record for good, and does not have it.

    Attributes:
        is_too_large: it is larger than the topic accepts.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        self.is_too_large = isinstance(error, TOO_LARGE)


class LogProducer:
    """Producer that confirms each record with all replicas. Records of one moment share requests.

    Args:
        settings: names the broker, and the bound.
    """

    def __init__(self, settings: Settings) -> None:
        compression = settings.kafka_compression
        self._options: dict[str, Any] = settings.kafka_client_options() | {
            "acks": "all",
            "enable_idempotence": True,
            "linger_ms": 0,
            "compression_type": None if compression == "none" else compression,
            "request_timeout_ms": round(settings.gateway_produce_seconds * 1000),
            "retry_backoff_ms": 50,
        }
        self._seconds = settings.gateway_produce_seconds
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        producer = AIOKafkaProducer(**self._options)
        try:
            with quiet("aiokafka"):
                async with asyncio.timeout(self._seconds):
                    await producer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await producer.stop()
            raise LogUnavailableError(type(error).__name__) from error
        self._producer = producer

    async def stop(self) -> None:
        """Confirm what is under way, and disconnect."""
        if self._producer is not None:
            await self._producer.stop()
        if self._ending:
            await asyncio.wait(self._ending)

    async def send(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        partition: int | None = None,
        headers: Sequence[Header] = (),
    ) -> asyncio.Task[int]:
        """Hand a record to the producer.

        Returns:
            the task of its delivery. Its result is the record's offset, -1 if the broker does not
            tell. It raises RefusedRecordError, or LogUnavailableError if the record may or may not
            be in the log.

        Raises:
            LogUnavailableError: there is no connection; the record is not in the log.
            RefusedRecordError: the record is too large for the producer.
        """
        producer = self._producer or await self._connected()
        try:
            async with asyncio.timeout(self._seconds):
                sent = await producer.send(topic, value, key, partition, headers=list(headers))
        except TOO_LARGE as error:
            raise RefusedRecordError(error) from error
        except (KafkaError, OSError, TimeoutError) as error:
            raise LogUnavailableError(type(error).__name__) from error
        task = asyncio.create_task(self._deliver(producer, sent))
        task.add_done_callback(_retrieve)
        return task

    async def _deliver(self, producer: AIOKafkaProducer, sent: asyncio.Future[Any]) -> int:
        done, _ = await asyncio.wait([sent], timeout=self._seconds)
        if not done:
            self._drop(producer)
            raise LogUnavailableError("the broker did not confirm a record in time")
        try:
            return int(sent.result().offset)
        except KafkaError as error:
            self._drop(producer)  # a failed batch leaves a gap in its sequence
            if is_refusal(error):
                raise RefusedRecordError(error) from error
            raise LogUnavailableError(type(error).__name__) from error

    async def _connected(self) -> AIOKafkaProducer:
        """Return the producer; connect one after the last was given up.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        async with self._connecting:
            if self._producer is None:
                await self.start()
            assert self._producer is not None
            return self._producer

    def _drop(self, producer: AIOKafkaProducer) -> None:
        """Give up a producer; the next record connects another one."""
        if self._producer is producer:
            self._producer = None
            task = asyncio.create_task(_give_up(producer))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


async def _give_up(producer: AIOKafkaProducer) -> None:
    """End a producer without sending what waits in it."""
    # The public stop() would wait for what a broker that is away does not confirm.
    await producer._sender.close()  # noqa: SLF001
    await producer.client.close()
    producer._closed = True  # noqa: SLF001


def _retrieve(task: asyncio.Task[int]) -> None:
    """Mark a task's error as seen: a request that has its answer does not look at it."""
    if not task.cancelled():
        task.exception()
