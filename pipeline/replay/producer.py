"""Producer of transactions or labels: at a rate, by a timetable, or at full speed.

    async with Feed(settings) as feed:
        await feed.run(ahead(blocks), rate=500, stop=stop)
    feed.count.acked

The feed builds one batch for each partition itself, at about 1.5 µs a record. The partition is
Kafka's default, murmur2 of the key. A record's CreateTime is the time of sending. At most
:data:`UNACKED_MAX_RECORDS` wait for their ack: a slow broker slows the feed down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka_errors
from numpy.typing import NDArray

import pipeline.kafka.produce_request  # noqa: F401 - packs the requests of aiokafka's producers
from model.transaction import Transaction
from pipeline.errors import RecurError
from pipeline.kafka.message_limits import TOO_LARGE, MessageLimits
from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.topics import TopicRole
from pipeline.messages.transactions import HISTORY_HEADER, WARM_HEADER
from pipeline.settings import Settings

BLOCK_TRANSACTIONS = 8192
"""Usual size of a block: large enough for large batches, small enough for a quick stop."""

UNACKED_MAX_RECORDS = 65_536
"""Limit of the records that wait for their acks."""

RECORD_OVERHEAD_BYTES = 256
"""Upper bound of the bytes besides key and value in a batch of one record."""

TICK_SECONDS = 0.005
"""Shortest sleep of a paced feed; under 200/s it sends each record alone."""

BEHIND_MAX_SECONDS = 1.0
"""Delay from which a paced feed moves its timetable instead of catching up."""

REQUEST_TIMEOUT_SECONDS = 30.0
"""Time without an ack after which a feed gives up."""

ABANDON_SECONDS = 2.0
"""Time for the unacked records of a feed that failed or was cancelled."""

_STAMP_EVERY = 256  # records that share one reading of the clock
_PARTITION_CACHE_MAX = 262_144  # keys whose partition is cached
_STOP_SECONDS = 0.1  # longest sleep before the next check of the stop event


class Block(NamedTuple):
    """Encoded records in sending order; the two lists have the same length."""

    keys: Sequence[bytes]
    values: Sequence[bytes]
    due_seconds: NDArray[np.float64] | None = None
    """Due times since the feed's start, ascending. None: the rate decides."""


class _Wire(Transaction, frozen=True, gc=False, omit_defaults=True):
    """Wire format of a transaction: missing optional fields are omitted."""


@lru_cache(maxsize=16)
def _wire_with_extra(names: tuple[str, ...]) -> Any:
    """Extend :class:`_Wire` by extra fields of any names."""
    attributes = {f"extra_{number}": name for number, name in enumerate(names)}
    return msgspec.defstruct(
        "_WireWithExtraFields",
        [(attribute, float | str | None, None) for attribute in attributes],
        bases=(_Wire,),
        rename=attributes,
        frozen=True,
        gc=False,
        omit_defaults=True,
    )


_encode = msgspec.json.Encoder().encode


def encode_block(
    transaction_ids: Iterable[str],
    account_ids: Sequence[str],
    merchant_ids: Iterable[str],
    amounts: Iterable[float],
    currencies: Iterable[str],
    timestamps_ms: Iterable[int],
    *optional: Iterable[str | None],
    extra: Mapping[str, Iterable[float | str | None]] | None = None,
    due_seconds: NDArray[np.float64] | None = None,
) -> Block:
    """Encode columns of the same length as a block.

    Args:
        optional: columns category, channel and country, in this order.
        extra: columns of extra fields by name; None: missing.
    """
    columns: list[Iterable[Any]] = [transaction_ids, account_ids, merchant_ids, amounts]
    columns += [currencies, timestamps_ms, *optional]
    wire: Any = _Wire
    if extra:
        without = len(_Wire.__struct_fields__) - len(
            columns
        )  # optional columns that were not given
        columns += [[None] * len(account_ids)] * without
        columns += extra.values()
        wire = _wire_with_extra(tuple(extra))
    values = [_encode(wire(*row)) for row in zip(*columns, strict=True)]
    return Block([account.encode() for account in account_ids], values, due_seconds)


@dataclass(slots=True)
class FeedCount:
    """Counts and offsets of the records that a feed has sent."""

    sent: int = 0
    acked: int = 0
    acked_by_partition: dict[int, int] = field(default_factory=dict)
    first_offsets: dict[int, int] = field(default_factory=dict)
    last_offsets: dict[int, int] = field(default_factory=dict)
    behind_seconds: float = 0.0
    """Sum of the delays by which the timetable was moved."""


class Feed:
    """A producer of transactions or labels.

    Use it as an asynchronous context manager. Leaving it waits for the acks of all records.

    Args:
        role: role of the topic.
        timeout_seconds: time without an ack after which the feed gives up.

    Raises:
        RecurError: the broker is unreachable or does not accept the records.
    """

    def __init__(
        self,
        settings: Settings,
        role: TopicRole = "transactions",
        *,
        timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        self.count = FeedCount()
        self._settings = settings
        self._role = role
        self._timeout_seconds = timeout_seconds
        self._topic = settings.topic(role)
        self._partitions: list[int] = []
        self._partition_of: dict[bytes, int] = {}
        self._limits = MessageLimits(settings, [role], least_bytes=0)
        self._producer: Any = None
        self._failure: BaseException | None = None
        self._ack_came = asyncio.Event()

    async def __aenter__(self) -> Feed:
        compression = self._settings.kafka_compression
        await self._limits.read()
        self._producer = AIOKafkaProducer(
            **self._settings.kafka_client_options(),
            acks="all",
            enable_idempotence=True,
            max_batch_size=self._limits.batch_bytes,
            compression_type=None if compression == "none" else compression,
            request_timeout_ms=round(self._timeout_seconds * 1000),
        )
        try:
            await self._producer.start()
            self._partitions = sorted(await self._producer.partitions_for(self._topic))
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            await self._producer.stop()
            raise RecurError(
                f"cannot publish to topic {self._topic} at {self._settings.kafka_bootstrap_servers}"
                f" ({type(error).__name__}): see that the broker is up and the topic exists"
            ) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                await self.flush()
        finally:
            limit_seconds = self._timeout_seconds if error is None else ABANDON_SECONDS
            try:
                await asyncio.wait_for(self._producer.stop(), limit_seconds)
            except TimeoutError as late:
                if error is None:
                    raise self._give_up_error() from late

    @property
    def partitions(self) -> int:
        """Number of the topic's partitions."""
        return len(self._partitions)

    async def run(
        self,
        blocks: AsyncIterator[Block],
        *,
        rate: float | None = None,
        warm: bool = False,
        history: bool = False,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Send all blocks, or those until ``stop`` is set.

        A block with ``due_seconds`` keeps that timetable. Other blocks keep ``rate``
        (transactions/s), or go at the broker's speed if it is None.

        Args:
            warm: mark the records: they build states and raise no alerts.
            history: mark the records as transactions of the past, which may have any age.
        """
        stop = stop or asyncio.Event()
        timetable = _Timetable(asyncio.get_running_loop().time(), rate)
        async for block in blocks:
            due = timetable.due_seconds(block)
            if due is None:
                await self.send(block.keys, block.values, warm=warm, history=history)
            else:
                await self._send_paced(block, due, timetable, warm, history, stop)
            if stop.is_set():
                return

    async def _send_paced(
        self,
        block: Block,
        due: NDArray[np.float64],
        timetable: _Timetable,
        warm: bool,
        history: bool,
        stop: asyncio.Event,
    ) -> None:
        clock = asyncio.get_running_loop().time
        at = 0
        while at < len(due) and not stop.is_set():
            now = clock() - timetable.start
            late = now - due[at]
            if late > BEHIND_MAX_SECONDS:
                self.count.behind_seconds += late
                timetable.start += late
                now -= late
            ready = int(np.searchsorted(due, now, side="right"))
            if ready > at:
                keys, values = block.keys[at:ready], block.values[at:ready]
                await self.send(keys, values, warm=warm, history=history)
                at = ready
            if at < len(due):
                wait = due[at] - (clock() - timetable.start)
                await asyncio.sleep(min(max(wait, TICK_SECONDS), _STOP_SECONDS))

    async def send(
        self,
        keys: Sequence[bytes],
        values: Sequence[bytes],
        *,
        warm: bool = False,
        history: bool = False,
    ) -> None:
        """Send records now; wait only while too many are unacked."""
        headers = [(WARM_HEADER, b"1")] if warm else []
        if history:
            headers.append((HISTORY_HEADER, b"1"))
        builders: dict[int, Any] = {}
        timestamp_ms = 0
        largest = self._limits.record_bytes - RECORD_OVERHEAD_BYTES
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            if len(key) + len(value) > largest:
                raise RecurError(
                    f"one of the {self._role} has {len(key) + len(value)} bytes, and topic"
                    f" {self._topic} accepts {largest}: remove it, or raise the topic's"
                    f" max.message.bytes; {self.count.acked:,} are acknowledged"
                )
            if index % _STAMP_EVERY == 0:
                timestamp_ms = int(time.time() * 1000)
            partition = self._partition(key)
            builder = builders.get(partition)
            if builder is None:
                builder = builders[partition] = self._producer.create_batch()
            if not builder.append(timestamp=timestamp_ms, key=key, value=value, headers=headers):
                await self._send_batch(builder, partition)
                builder = builders[partition] = self._producer.create_batch()
                builder.append(timestamp=timestamp_ms, key=key, value=value, headers=headers)
        for partition, builder in builders.items():
            await self._send_batch(builder, partition)

    async def flush(self) -> None:
        """Wait for the acks of all records that were sent."""
        await self._limit_unacked(0)

    def _partition(self, key: bytes) -> int:
        partition = self._partition_of.get(key)
        if partition is None:
            if len(self._partition_of) >= _PARTITION_CACHE_MAX:
                self._partition_of.clear()
            partition = key_partition(key, len(self._partitions))
            self._partition_of[key] = partition
        return partition

    async def _send_batch(self, builder: Any, partition: int) -> None:
        builder.close()
        records = builder.record_count()
        await self._limit_unacked(UNACKED_MAX_RECORDS)
        try:
            future = await self._producer.send_batch(builder, self._topic, partition=partition)
        except (kafka_errors.KafkaError, TimeoutError) as error:
            raise self._give_up_error(error) from error
        self.count.sent += records
        future.add_done_callback(partial(self._acked, partition, records))

    def _acked(self, partition: int, records: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            self._failure = self._failure or error
        else:
            count, offset = self.count, future.result().offset
            count.acked += records
            count.acked_by_partition[partition] = (
                count.acked_by_partition.get(partition, 0) + records
            )
            count.first_offsets.setdefault(partition, offset)
            count.last_offsets[partition] = offset + records - 1
        self._ack_came.set()

    async def _limit_unacked(self, records: int) -> None:
        while self.count.sent - self.count.acked > records and self._failure is None:
            self._ack_came.clear()
            try:
                # wait_for() may lose a cancellation before Python 3.12.
                async with asyncio.timeout(self._timeout_seconds):
                    await self._ack_came.wait()
            except TimeoutError as error:
                raise self._give_up_error() from error
        if self._failure is not None:
            raise self._give_up_error(self._failure) from self._failure

    def _give_up_error(self, error: BaseException | None = None) -> RecurError:
        cause = f"no ack for {self._timeout_seconds:g} s" if error is None else type(error).__name__
        if isinstance(error, TOO_LARGE):
            cause += ": the topic's max.message.bytes was lowered; start again"
        return RecurError(
            f"the broker at {self._settings.kafka_bootstrap_servers} does not accept {self._role}"
            f" ({cause}); it acknowledged {self.count.acked:,} of the {self.count.sent:,} sent:"
            " see that it is up"
        )


class _Timetable:
    """Due times of one run's records, by the event loop's clock."""

    def __init__(self, start: float, rate: float | None) -> None:
        self.start = start
        self._rate = rate
        self._counted = 0

    def due_seconds(self, block: Block) -> NDArray[np.float64] | None:
        if block.due_seconds is not None:
            return block.due_seconds
        if self._rate is None:
            return None
        first, self._counted = self._counted, self._counted + len(block.keys)
        return np.arange(first, self._counted) / self._rate


async def ahead(blocks: Iterable[Block]) -> AsyncIterator[Block]:
    """Make each block in a thread while the caller sends the one before it."""
    iterator: Iterator[Block] = iter(blocks)
    loop = asyncio.get_running_loop()
    pending = loop.run_in_executor(None, next, iterator, None)
    try:
        while (block := await pending) is not None:
            pending = loop.run_in_executor(None, next, iterator, None)
            yield block
    finally:
        pending.cancel()
