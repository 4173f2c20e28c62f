"""Publishing in Kafka transactions: scores, alerts, rejected records and offsets, or nothing.

Each input partition has a transactional id, and so a producer, of its own. Starting it is
taking the partition: the broker ends what an older producer of that id has open, and refuses
whatever that one sends later. The group's generations do not come into it: offsets that are
committed in a transaction carry none here, so only the id keeps a zombie out.

A producer that failed is never used again. What it has open is aborted by whoever takes the
partition next, or by the broker after :data:`TRANSACTION_TIMEOUT_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
)

from pipeline.errors import RecurError
from pipeline.kafka.message_limits import MessageLimits
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.producer import AppendResult, KafkaProducer, PublishError, Said, is_refusal
from pipeline.settings import Settings

log = logging.getLogger(__name__)

TRANSACTION_TIMEOUT_SECONDS = 30.0
"""A transaction that is open for longer is aborted by the broker. Until then who reads with
read_committed sees nothing that was written after its begin."""

RETRY_BACKOFF_MS = 10
"""The broker has a producer ask again while it still writes the marker of the transaction before,
a few milliseconds; aiokafka's 100 would be most of a fast answer."""

STOP_SECONDS = 10.0
"""So long the stop waits for transactions under way."""

FENCED: tuple[type[KafkaError], ...] = (
    ProducerFenced,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    InvalidTxnState,
)
"""The id has a newer producer, or the broker has ended the transaction or forgotten the id."""


class BatchTooLargeError(Exception):
    """A batch was larger than its topic takes; the transaction is aborted."""


class FencedError(Exception):
    """Somebody has taken the partition: what was sent is not committed."""


class LetterRefusedError(Exception):
    """The broker refuses a dead letter for what it is; the transaction is aborted."""


class PartitionPublisher(KafkaProducer):
    """The one producer of an input partition.

    Args:
        settings: names topics, group and broker.
        partition: the input partition.
        limits: of its topics' batches, read already; None to read them at the start.
        on_lost_letters: called with how many dead letters the broker refuses.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        limits: MessageLimits | None = None,
        on_lost_letters: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__(
            settings,
            limits,
            on_lost_letters=on_lost_letters,
            transactional_id=transactional_id(settings, partition),
            transaction_timeout_ms=round(TRANSACTION_TIMEOUT_SECONDS * 1000),
            retry_backoff_ms=RETRY_BACKOFF_MS,
        )
        self._partition = partition
        self._source = TopicPartition(settings.topic("transactions"), partition)
        self._group = settings.kafka_group_id
        self._at_work = asyncio.Lock()

    async def commit(self, said: Said, *, letters_apart: bool = False) -> AppendResult | None:
        """One transaction: publish all, commit the offset; where the scores went.

        Args:
            letters_apart: send dead letters before the transaction and not in it. One that the
                broker refuses is lost and counted; one may be there twice after a failure.

        Raises:
            FencedError: nothing of it is committed.
            BatchTooLargeError: the same; a producer of smaller batches may do it.
            LetterRefusedError: the same; letters that are sent apart may do it.
            PublishError: it cannot be done, or nobody knows whether it is done.
        """
        async with self._at_work:
            try:
                if letters_apart and said.rejected:
                    await self.send_letters_apart(said.rejected)
                    said = said._replace(rejected=())
                return await self._commit_or_abort(said)
            except (KafkaError, IllegalOperation) as error:
                if _is_fenced(error):
                    raise FencedError from error
                raise PublishError(
                    f"cannot commit a transaction ({type(error).__name__}); see the broker's log "
                    "and the rights on transactional ids and the group"
                ) from error

    async def _commit_or_abort(self, said: Said) -> AppendResult | None:
        try:
            return await self._commit(said)
        except (BatchTooLargeError, LetterRefusedError):
            assert self._producer is not None
            await self._producer.abort_transaction()
            raise

    async def _commit(self, said: Said) -> AppendResult | None:
        producer = self._producer
        assert producer is not None
        await producer.begin_transaction()
        # Side by side, so that all partitions are told to the coordinator in one request.
        results: Sequence[Any] = await asyncio.gather(
            self._append({self._partition: said.scores} if said.scores else {}),
            self._send(self._alerts_topic, said.alerts),
            self._send(self._dead_letter_topic, said.rejected),
            producer.send_offsets_to_transaction({self._source: said.next_offset}, self._group),
            return_exceptions=True,  # aiokafka would commit what is left of a transaction
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            if isinstance(results[2], BaseException) and is_refusal(results[2]):
                if not any(map(_is_fenced, errors)):
                    raise LetterRefusedError from results[2]
            raise next(filter(_is_fenced, errors), errors[0])
        await producer.commit_transaction()
        where: AppendResult | None = results[0].get(self._partition)
        if where is None or where.next is None:
            return where
        return AppendResult(where.first, where.next + 1)  # the marker takes an offset

    async def _too_large(self, refused: AIOKafkaProducer, refused_bytes: int) -> None:
        """What was sent before in the transaction goes with it."""
        raise BatchTooLargeError

    async def close(self) -> None:
        """Disconnect once no transaction is under way: aiokafka would wait for ever for its end."""
        async with self._at_work:
            await self.stop()
        assert self._producer is not None
        for future in _left_by(self._producer):
            if future.done() and not future.cancelled():
                future.exception()  # seen: it was told to whoever awaited the commit


class TransactionalProducer:
    """One producer for each input partition that was taken.

    Args:
        settings: names topics, group and broker.
        limits: of its topics' batches, read before the first take; None: not known.
        on_lost_letters: called with how many dead letters the broker refuses.
    """

    def __init__(
        self,
        settings: Settings,
        limits: MessageLimits | None = None,
        on_lost_letters: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._settings = settings
        self._limits = limits or MessageLimits(settings)
        self._on_lost_letters = on_lost_letters
        # Once the broker has refused a letter: it would be refused again, with its transaction.
        self._letters_apart = False
        self._tenures = count(1)
        self._publishers: dict[int, tuple[int, PartitionPublisher]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def take(self, partition: int) -> int:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        publisher = PartitionPublisher(
            self._settings, partition, self._limits, self._on_lost_letters
        )
        try:
            await publisher.start()
        except (KafkaError, OSError) as error:
            await publisher.stop()
            if isinstance(error, OSError | KafkaConnectionError) or error.retriable:
                raise LogUnavailableError(f"{type(error).__name__}: {error}") from error
            raise PublishError(
                f"the broker refuses a transactional producer ({type(error).__name__}); see the "
                "rights on transactional ids"
            ) from error
        self.release([partition])
        tenure = next(self._tenures)
        self._publishers[partition] = tenure, publisher
        return tenure

    def release(self, partitions: Collection[int]) -> None:
        """These partitions are no longer ours: close their producers."""
        for partition in partitions:
            if partition in self._publishers:
                _, publisher = self._publishers.pop(partition)
                task = asyncio.create_task(publisher.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def stop(self) -> None:
        """Disconnect; waits a while for transactions under way."""
        self.release(list(self._publishers))
        if self._closing:
            _, late = await asyncio.wait(self._closing, timeout=STOP_SECONDS)
            for task in late:
                task.cancel()

    async def commit(self, said: Mapping[int, Said]) -> dict[int, AppendResult | None]:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        committed: dict[int, AppendResult | None] = {}

        async def commit_one(partition: int) -> None:
            tenure, publisher = self._publishers.get(partition, (0, None))
            if publisher is None or tenure != said[partition].tenure:
                return  # taken since, by this worker itself
            try:
                committed[partition] = await publisher.commit(
                    said[partition], letters_apart=self._letters_apart
                )
                return
            except FencedError:
                log.warning(
                    "another worker has taken the partition; nothing was published",
                    extra={"partition": partition},
                )
            # Another producer could not tell whether somebody takes the partition meanwhile: take
            # it again, by way of the group.
            except LetterRefusedError:
                self._letters_apart = True
            except BatchTooLargeError:
                await self._learn(publisher.batch_bytes, said[partition])
            if self._publishers.get(partition) == (tenure, publisher):
                self.release([partition])

        if len(said) == 1:  # almost always, at live rates: no tasks are made
            await commit_one(*said)
        else:
            await asyncio.gather(*map(commit_one, said))
        return committed

    async def _learn(self, refused_bytes: int, said: Said) -> None:
        """A batch was refused as too large: find out what is taken now.

        Raises:
            RecurError: a topic takes less than a score or an alert may need.
        """
        try:
            await self._limits.learn(refused_bytes)
        except RecurError:
            if self._letters_apart or not said.rejected:
                raise
            self._letters_apart = True  # it may be the dead-letter topic


def transactional_id(settings: Settings, partition: int) -> str:
    """The id that whoever owns an input partition produces with."""
    return f"{settings.kafka_group_id}-{settings.topic('transactions')}-{partition}"


def _left_by(producer: AIOKafkaProducer) -> Iterator[asyncio.Future[Any]]:
    """Futures of a producer that failed; asyncio logs the errors that nobody looks at."""
    yield producer._sender.sender_task
    transaction = producer._txn_manager.wait_for_transaction_end()
    if transaction is not None:
        yield transaction
    for batches in producer._message_accumulator._batches.values():
        for batch in batches:
            yield batch._drain_waiter


def _is_fenced(error: BaseException | None) -> bool:
    """Whether the broker refuses this producer, whatever aiokafka has wrapped that in."""
    while error is not None:
        if isinstance(error, FENCED):
            return True
        error = error.__cause__
    return False
