"""Kafka transactions: scores, alerts, dead letters and offsets are committed together.

Each input partition has a transactional id, and so a producer, of its own. Starting the producer
takes the partition: the broker aborts the open transaction of an older producer with that id, and
refuses its later records. aiokafka commits offsets without the group's generation, so only the id
keeps a zombie out.

A producer that failed is never used again. The next producer of the partition aborts its open
transaction, or the broker does after :data:`TRANSACTION_TIMEOUT_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    IllegalOperation,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    InvalidTxnState,
    KafkaConnectionError,
    KafkaError,
    ProducerFenced,
    UnknownError,
)

from pipeline.errors import RecurError
from pipeline.kafka.message_limits import MessageLimits
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.producer import (
    AppendResult,
    KafkaProducer,
    PartOutput,
    PublishError,
    is_refusal,
)
from pipeline.settings import Settings
from pipeline.topic_id import commit_metadata

log = logging.getLogger(__name__)

TRANSACTION_TIMEOUT_SECONDS = 30.0
"""The broker aborts a transaction that is open for longer. Until then a reader with read_committed
sees no record behind the transaction's begin."""

RETRY_BACKOFF_MS = 10
"""Wait before a retry while the broker still writes the previous transaction's marker. That takes
a few milliseconds; aiokafka's 100 would dominate the latency."""

STOP_SECONDS = 10.0
"""Longest wait of a stop for transactions in progress."""

FENCED: tuple[type[KafkaError], ...] = (
    ProducerFenced,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    InvalidTxnState,
)
"""Errors of a producer whose id has a newer one, or whose transaction or id the broker dropped."""

FENCED_AT_END: tuple[type[KafkaError], ...] = (*FENCED, UnknownError)
"""Errors of such a producer at the end of its transaction, commit or abort.

A broker that is just fencing a producer answers the end of its transaction with an unknown error:
it takes the state in between for illegal. The outcome is then unknown, and the next take of the
partition finds it out. At another step an unknown error says nothing about fencing."""


class BatchTooLargeError(Exception):
    """A batch was larger than its topic accepts; the transaction is aborted."""


class FencedError(Exception):
    """Another worker has taken the partition, or may have: the output is not known to be committed.

    The next take of the partition finds out.
    """


class DeadLetterRefusedError(Exception):
    """The broker refuses a dead letter for good; the transaction is aborted."""


class PartitionProducer(KafkaProducer):
    """The only producer of an input partition's output.

    Args:
        settings: names topics, group and broker.
        partition: the input partition.
        limits: limits on batches, read already; None to read them at the start.
        on_lost_dead_letters: called with the number of dead letters that the broker refuses.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        limits: MessageLimits | None = None,
        on_lost_dead_letters: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__(
            settings,
            limits,
            on_lost_dead_letters=on_lost_dead_letters,
            transactional_id=transactional_id(settings, partition),
            transaction_timeout_ms=round(TRANSACTION_TIMEOUT_SECONDS * 1000),
            retry_backoff_ms=RETRY_BACKOFF_MS,
        )
        self._partition = partition
        self._source = TopicPartition(settings.topic("transactions"), partition)
        self._group = settings.kafka_group_id
        self._in_use = asyncio.Lock()

    async def commit(
        self, output: PartOutput, *, dead_letters_first: bool = False
    ) -> AppendResult | None:
        """Publish the output and commit its offset in one transaction.

        Args:
            output: records and offset to commit.
            dead_letters_first: send dead letters before the transaction, not in it. A refused one
                is lost and counted; one may be published twice after a failure.

        Returns:
            the offsets of the scores.

        Raises:
            FencedError: nothing is committed, as far as is known; take the partition again.
            BatchTooLargeError: nothing is committed; retry with a producer of smaller batches.
            DeadLetterRefusedError: nothing is committed; retry with ``dead_letters_first``.
            PublishError: the broker refuses the output, or its outcome is unknown.
        """
        async with self._in_use:
            try:
                if dead_letters_first and output.rejected:
                    await self.send_dead_letters_separately(output.rejected)
                    output = output._replace(rejected=())
                return await self._commit_or_abort(output)
            except (KafkaError, IllegalOperation) as error:
                if _is_fenced(error):
                    raise FencedError from error
                raise PublishError(
                    f"cannot commit a transaction ({type(error).__name__}); see the broker's log "
                    "and the rights on transactional ids and the group"
                ) from error

    async def _commit_or_abort(self, output: PartOutput) -> AppendResult | None:
        try:
            return await self._commit(output)
        except (BatchTooLargeError, DeadLetterRefusedError):
            assert self._producer is not None
            await _end(self._producer.abort_transaction())
            raise

    async def _commit(self, output: PartOutput) -> AppendResult | None:
        producer = self._producer
        assert producer is not None
        await producer.begin_transaction()
        # Concurrently, so that one request tells the coordinator all partitions.
        results: Sequence[Any] = await asyncio.gather(
            self._append({self._partition: output.scores} if output.scores else {}),
            self._send(self._alerts_topic, output.alerts),
            self._send(self._dead_letter_topic, output.rejected),
            producer.send_offsets_to_transaction(
                {self._source: (output.next_offset, commit_metadata(output.next_offset))},
                self._group,
            ),
            return_exceptions=True,  # aiokafka would commit the rest of the transaction
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            if isinstance(results[2], BaseException) and is_refusal(results[2]):
                if not any(map(_is_fenced, errors)):
                    raise DeadLetterRefusedError from results[2]
            raise next(filter(_is_fenced, errors), errors[0])
        await _end(producer.commit_transaction())
        appended: AppendResult | None = results[0].get(self._partition)
        if appended is None or appended.next is None:
            return appended
        return AppendResult(appended.first, appended.next + 1)  # the marker takes an offset

    async def _too_large(self, refused: AIOKafkaProducer, refused_bytes: int) -> None:
        """Abort the transaction: its earlier records go with it."""
        raise BatchTooLargeError

    async def close(self) -> None:
        """Disconnect once no transaction is open: aiokafka would wait for its end forever."""
        async with self._in_use:
            await self.stop()
        assert self._producer is not None
        for future in _pending_futures(self._producer):
            if future.done() and not future.cancelled():
                future.exception()  # mark it as seen: the commit has raised it


class TransactionalProducer:
    """Producers of all input partitions that this worker has taken.

    Args:
        settings: names topics, group and broker.
        limits: limits on batches, read before the first take; None if they are not known.
        on_lost_dead_letters: called with the number of dead letters that the broker refuses.
    """

    def __init__(
        self,
        settings: Settings,
        limits: MessageLimits | None = None,
        on_lost_dead_letters: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._settings = settings
        self._limits = limits or MessageLimits(settings)
        self._on_lost_dead_letters = on_lost_dead_letters
        # Set once the broker has refused a dead letter: it would refuse the transaction again.
        self._dead_letters_first = False
        self._epochs = count(1)
        self._producers: dict[int, tuple[int, PartitionProducer]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def take(self, partition: int) -> int:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        producer = PartitionProducer(
            self._settings, partition, self._limits, self._on_lost_dead_letters
        )
        try:
            await producer.start()
        except (KafkaError, OSError) as error:
            await producer.stop()
            if isinstance(error, OSError | KafkaConnectionError) or error.retriable:
                raise LogUnavailableError(f"{type(error).__name__}: {error}") from error
            raise PublishError(
                f"the broker refuses a transactional producer ({type(error).__name__}); see the "
                "rights on transactional ids"
            ) from error
        self.release([partition])
        epoch = next(self._epochs)
        self._producers[partition] = epoch, producer
        return epoch

    def release(self, partitions: Collection[int]) -> None:
        """Close the producers of partitions that this worker no longer owns."""
        for partition in partitions:
            if partition in self._producers:
                _, producer = self._producers.pop(partition)
                task = asyncio.create_task(producer.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def stop(self) -> None:
        """Disconnect; wait up to :data:`STOP_SECONDS` for open transactions."""
        self.release(list(self._producers))
        if self._closing:
            _, late = await asyncio.wait(self._closing, timeout=STOP_SECONDS)
            for task in late:
                task.cancel()

    async def commit(self, outputs: Mapping[int, PartOutput]) -> dict[int, AppendResult | None]:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        committed: dict[int, AppendResult | None] = {}

        async def commit_one(partition: int) -> None:
            epoch, producer = self._producers.get(partition, (0, None))
            if producer is None or epoch != outputs[partition].producer_epoch:
                return  # this worker itself has taken the partition again
            try:
                committed[partition] = await producer.commit(
                    outputs[partition], dead_letters_first=self._dead_letters_first
                )
                return
            except FencedError:
                log.warning(
                    "another worker has taken the partition, or may have; rejoining the group",
                    extra={"partition": partition},
                )
            # A new producer could not tell whether another worker takes the partition meanwhile.
            # So let the group assign the partition again.
            except DeadLetterRefusedError:
                self._dead_letters_first = True
            except BatchTooLargeError:
                await self._learn(producer.batch_bytes, outputs[partition])
            if self._producers.get(partition) == (epoch, producer):
                self.release([partition])

        if len(outputs) == 1:  # almost always at live rates, so save the tasks
            await commit_one(*outputs)
        else:
            await asyncio.gather(*map(commit_one, outputs))
        return committed

    async def _learn(self, refused_bytes: int, output: PartOutput) -> None:
        """Find new limits after the broker refused a batch as too large.

        Raises:
            RecurError: a topic accepts less than a score or an alert may need.
        """
        try:
            await self._limits.learn(refused_bytes)
        except RecurError:
            if self._dead_letters_first or not output.rejected:
                raise
            self._dead_letters_first = True  # the dead-letter topic may be the one that refuses


def transactional_id(settings: Settings, partition: int) -> str:
    """Name the transactional id of an input partition's owner."""
    return f"{settings.kafka_group_id}-{settings.topic('transactions')}-{partition}"


def _pending_futures(producer: AIOKafkaProducer) -> Iterator[asyncio.Future[Any]]:
    """Find futures of a failed producer: asyncio would log their errors as never retrieved."""
    yield producer._sender.sender_task
    transaction = producer._txn_manager.wait_for_transaction_end()
    if transaction is not None:
        yield transaction
    for batches in producer._message_accumulator._batches.values():
        for batch in batches:
            yield batch._drain_waiter


async def _end(transaction: Awaitable[None]) -> None:
    """Wait for the commit or abort of a transaction.

    Raises:
        FencedError: the broker has fenced this producer, or may have.
    """
    try:
        await transaction
    except KafkaError as error:
        if _is_fenced(error, FENCED_AT_END):
            raise FencedError from error
        raise


def _is_fenced(error: BaseException | None, errors: tuple[type[KafkaError], ...] = FENCED) -> bool:
    """Tell whether the broker has fenced this producer, also in errors that aiokafka wraps."""
    while error is not None:
        if isinstance(error, errors):
            return True
        error = error.__cause__
    return False
