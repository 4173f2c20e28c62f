"""Audit records: who labelled a transaction or administered keys, when, and with which result.

Each act has a record *before* it happens (``begun``) and one after it (``done`` or ``failed``). An
act whose first record Kafka does not confirm does not happen, so no act is without a record. An
act without a second record may have happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from pipeline.errors import RecurError
from pipeline.gateway.principal import Principal
from pipeline.gateway.problems import Problem
from pipeline.kafka.topics import ensure_audit_topic
from pipeline.logs import quiet
from pipeline.messages.audit_records import Act, AuditRecord
from pipeline.settings import Settings

AUDIT_SECONDS = 5.0
"""Longest wait for Kafka to confirm an audit record."""

log = logging.getLogger(__name__)


class AuditUnavailableError(RecurError):
    """An audit record was not confirmed, so the act must not happen."""


_encode = msgspec.json.Encoder().encode


def transaction_hash(transaction_id: str) -> str:
    """Return the hash that stands for a transaction: 16 bytes of BLAKE2b, hexadecimal.

    Who has the id finds its records; the topic does not show the id.
    """
    return hashlib.blake2b(transaction_id.encode(), digest_size=16).hexdigest()


class AuditLog:
    """Writer of the audit topic.

    Args:
        settings: name the broker and the topic.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.topic("audit")
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Create the topic if it is missing, and connect.

        Raises:
            StartupError: the broker does not answer or refuses the topic.
            AuditUnavailableError: it does not answer the producer.
        """
        await ensure_audit_topic(self._settings)
        producer = AIOKafkaProducer(
            **self._settings.kafka_client_options(),
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=round(AUDIT_SECONDS * 1000),
        )
        try:
            with quiet("aiokafka"):
                await producer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await producer.stop()
            raise AuditUnavailableError(_refusal(error)) from error
        self._producer = producer

    async def stop(self) -> None:
        """Disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None

    @asynccontextmanager
    async def act(
        self,
        act: Act,
        principal: Principal,
        *,
        request_id: str | None = None,
        transaction_id: str | None = None,
        key_id: str | None = None,
        key_name: str | None = None,
    ) -> AsyncIterator[None]:
        """Record an act: enter before it, and leave after it.

        An exception in the block is recorded as the act's failure, and goes on.

        Raises:
            AuditUnavailableError: the first record is not confirmed. The block does not run.
        """
        begun = AuditRecord(
            act_id=secrets.token_hex(16),
            act=act,
            result="begun",
            at=_now(),
            principal_kind=principal.kind,
            principal_id=principal.id,
            principal_name=principal.name,
            request_id=request_id,
            transaction_hash=None if transaction_id is None else transaction_hash(transaction_id),
            key_id=key_id,
            key_name=key_name,
        )
        await self._write(begun)
        try:
            yield
        except BaseException as error:
            reason = error.kind.name if isinstance(error, Problem) else type(error).__name__
            await self._write_result(begun, result="failed", reason=reason)
            raise
        await self._write_result(begun, result="done")

    async def _write_result(self, begun: AuditRecord, **changes: Any) -> None:
        """Write the second record. The act is over, so an error is only logged."""
        try:
            await self._write(msgspec.structs.replace(begun, at=_now(), **changes))
        except AuditUnavailableError:
            log.error(
                "the result of an act is not in the audit topic, which says only that it began",
                extra={"act": begun.act, "act_id": begun.act_id, **changes},
            )

    async def _write(self, record: AuditRecord) -> None:
        if self._producer is None:
            raise AuditUnavailableError("the audit log is not connected")
        try:
            async with asyncio.timeout(AUDIT_SECONDS):
                await self._producer.send_and_wait(
                    self._topic, value=_encode(record), key=record.act_id.encode()
                )
        except (KafkaError, OSError, TimeoutError) as error:
            raise AuditUnavailableError(_refusal(error)) from error


def _refusal(error: BaseException) -> str:
    return (
        f"Kafka did not confirm an audit record ({type(error).__name__}), so nothing was done: see"
        " that the broker is up and that this user may write to the audit topic"
    )


def _now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{clock}.{nanoseconds // 1_000_000:03d}Z"
