"""Kafka and the stores in memory, for tests that need every interleaving and no services.

They are held to the same contract tests as the real ones. Nothing here reads a clock, draws a
random number or waits, so that a run can be repeated; each effect happens between two calls of
an interrupt, in which a test may raise (the worker dies there), write as another worker would,
or take a service away:

    kafka = MemoryKafka({"transactions": 4, "scores": 4, "alerts": 4, "dead-letter": 4}, clock_ms)
    kafka.interrupt = store.interrupt = die_at_the_nth_step
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from pipeline.kafka.partitioner import key_partition
from pipeline.kafka.polls import Bounds, Chunk, LogUnavailableError, Poll
from pipeline.kafka.producer import AppendResult, Outgoing, PartOutput, PublishError
from pipeline.kafka.score_log import LoggedScore, read_score
from pipeline.kafka.topics import TopicRole
from pipeline.kafka.transactional_producer import transactional_id
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.keys import MERCHANT_SLOTS, merchant_slot
from pipeline.storage.merchant_profile import Profile, is_valid
from pipeline.storage.merchant_store import (
    Counts,
    LabelOutcomes,
    MerchantLabel,
    label_outcomes,
    places_by_slot,
)
from pipeline.storage.state_store import Load, LoadResult, Save
from pipeline.storage.transaction_note import STALE, ScoredNote, TransactionNote, decision_of

FETCH_RECORDS = 100
"""Number of records that one fetch of published scores returns."""

Interrupt = Callable[[str], None]
"""Called as ``interrupt("before save")`` and ``interrupt("after save")``; it may raise."""


def no_interrupt(step: str) -> None:
    """Let every step happen."""


class MemoryStateStore:
    """A :class:`pipeline.storage.state_store.StateStore` in memory.

    Attributes:
        watermarks: watermarks by partition.
        states: states by partition and account.
        answers: answer keys by partition and transaction id.
        is_up: False for a server that does not answer.
        interrupt: called before and after each load and each request of a save.
    """

    def __init__(self) -> None:
        self.watermarks: dict[int, bytes] = {}
        self.states: dict[tuple[int, str], bytes] = {}
        self.answers: dict[tuple[int, str], bytes] = {}
        self.is_up = True
        self.interrupt: Interrupt = no_interrupt

    def copy(self) -> MemoryStateStore:
        """Return a store with the same content, as a snapshot or a replica."""
        other = MemoryStateStore()
        other.restore(self)
        return other

    def restore(self, other: MemoryStateStore) -> None:
        """Take the content of another store, as a failover does."""
        self.watermarks = dict(other.watermarks)
        self.states = dict(other.states)
        self.answers = dict(other.answers)

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """See :class:`pipeline.storage.state_store.StateStore`."""
        await asyncio.sleep(0)
        with _step("load", self.interrupt):
            self._require_up()
            return [self.read(request) for request in requests]

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """See :class:`pipeline.storage.state_store.StateStore`."""
        await asyncio.sleep(0)
        stands = []
        for request in requests:
            with _step("save", self.interrupt):
                self._require_up()
                stands.append(self.write(request))
        return stands

    def read(self, request: Load) -> LoadResult:
        """Read a partition at once."""
        return LoadResult(
            self.watermarks.get(request.partition),
            [self.states.get((request.partition, a)) for a in request.account_ids],
        )

    def write(self, request: Save) -> bool:
        """Write a partition's request at once; return whether its values stand."""
        current = self.watermarks.get(request.partition)
        if current != request.expected:
            return current == request.watermark
        self.watermarks[request.partition] = request.watermark
        for account, state in zip(request.account_ids, request.states, strict=True):
            if state is None:
                self.states.pop((request.partition, account), None)
            else:
                self.states[request.partition, account] = state
        for name, answer in request.answers:
            place = request.partition, name
            if answer[:1] != b"R" or self.answers.get(place, b"")[:1] != b"A":
                self.answers[place] = answer
        return True

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """See :class:`pipeline.storage.state_store.StateStore`."""
        await asyncio.sleep(0)
        self._require_up()
        yield self.places(partition)

    def places(self, partition: int | None = None) -> list[tuple[int, str]]:
        """List what :meth:`accounts` yields, at once."""
        return [place for place in self.states if partition in (None, place[0])]

    async def ping(self) -> None:
        """See :class:`pipeline.storage.state_store.StateStore`."""
        self._require_up()

    async def close(self) -> None:
        """See :class:`pipeline.storage.state_store.StateStore`."""

    def _require_up(self) -> None:
        if not self.is_up:
            raise StoreUnavailableError("the store in memory is switched off")


class MemoryPollStore:
    """A :class:`pipeline.storage.poll_store.PollStore` of two stores in memory.

    A save takes three steps, as on a Redis Cluster.

    Attributes:
        messages: gateway and message of each published reply.
    """

    def __init__(self, states: MemoryStateStore, merchants: MemoryMerchantStore) -> None:
        self._states = states
        self._merchants = merchants
        self.messages: list[tuple[str, bytes]] = []

    async def load(
        self, requests: Sequence[Load], merchant_ids: Sequence[str]
    ) -> tuple[list[LoadResult], list[bytes | None]]:
        """See :class:`pipeline.storage.poll_store.PollStore`."""
        loaded = await self._states.load(requests)
        return loaded, await self._merchants.load(merchant_ids) if merchant_ids else []

    async def save(self, requests: Sequence[Save], counts: Counts) -> list[bool]:
        """See :class:`pipeline.storage.poll_store.PollStore`."""
        notes = [note for request in requests for note in request.notes]
        if notes:
            await self._merchants.add({}, notes)
        stands = await self._states.save(requests)
        if counts:
            await self._merchants.add(counts, [])
        return stands

    async def reply(self, messages: Mapping[str, bytes]) -> None:
        """See :class:`pipeline.storage.poll_store.PollStore`."""
        await asyncio.sleep(0)
        self.messages += messages.items()


class MemoryMerchantStore:
    """A :class:`pipeline.storage.merchant_store.MerchantStore` in memory.

    Attributes:
        profiles: values of profiles by merchant.
        notes: notes of transactions, by slot and hash of the transaction id.
        recorded: offset before which all labels are recorded, by partition and slot.
        labels_ids: topic id of each partition's recorded labels.
        is_up: False for a server that does not answer.
        interrupt: called before and after each call.
    """

    def __init__(self) -> None:
        self.profiles: dict[str, bytes] = {}
        self.notes: dict[tuple[int, int], TransactionNote] = {}
        self.recorded: dict[tuple[int, int], int] = {}
        self.labels_ids: dict[int, bytes] = {}
        self.is_up = True
        self.interrupt: Interrupt = no_interrupt

    def profile(self, merchant_id: str) -> Profile:
        """Return a merchant's profile; an empty one if there is no valid value."""
        value = self.profiles.get(merchant_id)
        sound = value is not None and is_valid(value)
        return Profile.from_bytes(value) if sound and value is not None else Profile()

    async def load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""
        await asyncio.sleep(0)
        with _step("load merchants", self.interrupt):
            self._require_up()
            return [self.profiles.get(merchant) for merchant in merchant_ids]

    async def add(self, counts: Counts, notes: Sequence[ScoredNote]) -> None:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""
        await asyncio.sleep(0)
        with _step("add to merchants", self.interrupt):
            self._require_up()
            for bucket, merchants in counts.items():
                for merchant, n in merchants.items():
                    self.count(bucket, merchant, n)
            for note in notes:
                self.remember(note)

    def count(self, bucket: int, merchant_id: str, n: int) -> None:
        """Count transactions in a merchant's profile at once."""
        profile = self.profile(merchant_id)
        profile.count(bucket, n)
        self.profiles[merchant_id] = profile.to_bytes()

    def remember(self, scored: ScoredNote) -> None:
        """Write a note at once."""
        place = merchant_slot(scored.merchant_id), scored.transaction_hash
        before = self.notes.get(place, TransactionNote())
        note = self.notes[place] = before.with_score(scored.decision, scored.weight)
        if note.weight != before.weight:
            profile = self.profile(scored.merchant_id)
            if profile.set_weight(scored.transaction_hash, note.weight):
                self.profiles[scored.merchant_id] = profile.to_bytes()

    async def record_labels(
        self, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""
        await asyncio.sleep(0)
        with _step("record labels", self.interrupt):
            self._require_up()
            parts = places_by_slot(labels)
            replies = [
                self.record_slot(slot, partition, [labels[i] for i in part], begin, end)
                for slot, part in enumerate(parts)
            ]
            return label_outcomes(len(labels), parts, replies)

    def record_slot(
        self, slot: int, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> list[str | None] | int:
        """Record labels of a slot at once; return their results, or the slot's watermark."""
        recorded_to = self.recorded.get((partition, slot), 0)
        if recorded_to < begin:
            return recorded_to
        self.recorded[partition, slot] = max(recorded_to, end)
        return [self._record(label) if label.offset >= recorded_to else None for label in labels]

    def _record(self, label: MerchantLabel) -> str:
        place = merchant_slot(label.merchant_id), label.entry.id_hash
        before = self.notes.get(place, TransactionNote())
        note = before.with_label(label.labelled_ms, label.label_weight)
        if note is None:
            return STALE
        self.notes[place] = note
        profile = self.profile(label.merchant_id)
        if profile.record(replace(label.entry, weight=note.weight), label.is_fraud):
            self.profiles[label.merchant_id] = profile.to_bytes()
        return decision_of(note, is_late=label.is_late)

    async def recorded_to(self, partition: int) -> int:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""
        await asyncio.sleep(0)
        self._require_up()
        return self.all_recorded_to(partition)

    def all_recorded_to(self, partition: int) -> int:
        """Return the offset before which all labels of a partition are recorded."""
        return min(self.recorded.get((partition, slot), 0) for slot in range(MERCHANT_SLOTS))

    async def labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""
        self._require_up()
        return self.named_labels_log(partition, log_id)

    def named_labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """Do what :meth:`labels_log` does, at once."""
        if log_id is not None:
            self.labels_ids.setdefault(partition, log_id)
        return self.labels_ids.get(partition)

    async def begin_labels_log(self, partition: int, log_id: bytes) -> None:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""
        self._require_up()
        self.forget_labels_log(partition, log_id)

    def forget_labels_log(self, partition: int, log_id: bytes) -> None:
        """Do what :meth:`begin_labels_log` does, at once."""
        self.recorded = {
            place: end for place, end in self.recorded.items() if place[0] != partition
        }
        self.labels_ids[partition] = log_id

    async def close(self) -> None:
        """See :class:`pipeline.storage.merchant_store.MerchantStore`."""

    def _require_up(self) -> None:
        if not self.is_up:
            raise StoreUnavailableError("the store in memory is switched off")


@dataclass
class MemoryRecord:
    """A record of :class:`MemoryKafka`, as a consumer sees it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass
class _Log:
    """One partition: its records from ``begin`` on.

    Attributes:
        hidden: offsets that a consumer of committed records does not see: transaction markers,
            what was taken back, and what is not committed yet.
    """

    begin: int = 0
    records: list[MemoryRecord] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        return self.begin + len(self.records)


@dataclass
class _Producer:
    """State of a transactional id: its newest epoch, and its open transaction."""

    epoch: int = 0
    open: list[tuple[str, int, int]] = field(default_factory=list)


class MemoryKafka:
    """A broker in memory: topics of partitioned logs, and committed offsets of groups.

    Args:
        partitions: partition count by topic.
        clock_ms: returns the CreateTime of records without one, epoch milliseconds.

    Attributes:
        is_up: False for a broker that does not answer.
        interrupt: called before and after each append and each answer.
    """

    def __init__(self, partitions: Mapping[str, int], clock_ms: Callable[[], int]) -> None:
        self._logs = {topic: [_Log() for _ in range(n)] for topic, n in partitions.items()}
        self._committed: dict[tuple[str, str, int], int] = {}
        self._generations: dict[tuple[str, str, int], int] = {}
        self._producers: dict[str, _Producer] = {}
        self._clock_ms = clock_ms
        self._ids: dict[str, bytes] = {}
        self._made = 0
        for topic in partitions:
            self._make(topic)
        self.is_up = True
        self.interrupt: Interrupt = no_interrupt

    def _make(self, topic: str) -> None:
        self._made += 1
        self._ids[topic] = self._made.to_bytes(16, "big")

    def topic_id(self, topic: str) -> bytes:
        """Return a topic's id; each creation gives another one."""
        return self._ids[topic]

    def partition_of(self, topic: str, key: bytes | None) -> int:
        """Return Kafka's default partition for a key; 0 for a record without a key."""
        return key_partition(key, len(self._logs[topic])) if key is not None else 0

    def produce(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        *,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        timestamp_ms: int | None = None,
    ) -> int:
        """Append a record; return its offset."""
        if partition is None:
            partition = self.partition_of(topic, key)
        log = self._logs[topic][partition]
        timestamp = self._clock_ms() if timestamp_ms is None else timestamp_ms
        log.records.append(MemoryRecord(log.end, timestamp, key, value, tuple(headers)))
        return log.end - 1

    def fetch(self, topic: str, partition: int, start: int, count: int) -> list[MemoryRecord]:
        """Return up to ``count`` records from offset ``start`` on, or from the log's start."""
        log = self._logs[topic][partition]
        first = max(0, start - log.begin)
        if not log.hidden:
            return log.records[first : first + count]
        return list(islice(_committed(log, first), count))

    def records(self, topic: str, partition: int | None = None) -> list[MemoryRecord]:
        """Return all records of one partition or of all, partition after partition."""
        logs = self._logs[topic] if partition is None else [self._logs[topic][partition]]
        return [record for log in logs for record in _committed(log, 0)]

    def partitions(self, topic: str) -> int:
        """Return a topic's partition count."""
        return len(self._logs[topic])

    def bounds(self, topic: str, partition: int) -> Bounds:
        """Return the bounds of a partition's log."""
        log = self._logs[topic][partition]
        return Bounds(log.begin, log.end)

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Delete records before an offset, as retention does."""
        log = self._logs[topic][partition]
        del log.records[: max(0, before - log.begin)]
        log.begin = max(log.begin, before)

    def recreate(self, topic: str) -> None:
        """Delete a topic and create it again; its committed offsets are deleted, too."""
        self._logs[topic] = [_Log() for _ in self._logs[topic]]
        self._make(topic)
        for place in [place for place in self._committed if place[1] == topic]:
            del self._committed[place]

    def join(self, group: str, topic: str, partition: int) -> int:
        """Assign a partition to another member of a group; return its generation."""
        place = group, topic, partition
        self._generations[place] = self._generations.get(place, 0) + 1
        return self._generations[place]

    def commit(self, group: str, topic: str, partition: int, offset: int, generation: int) -> None:
        """Set a group's committed offset, unless another member has the partition now."""
        place = group, topic, partition
        if self._generations[place] == generation:
            self._committed[place] = offset

    def committed(self, group: str, topic: str, partition: int) -> int | None:
        """Return a group's committed offset, or None."""
        return self._committed.get((group, topic, partition))

    # transactions ------------------------------------------------------------------------

    def init_producer(self, transactional_id: str) -> int:
        """Take a transactional id over; return the new epoch.

        What another has open is taken back: it stays in the log, and nobody sees it.
        """
        producer = self._producers.setdefault(transactional_id, _Producer())
        self._mark(producer)
        producer.epoch += 1
        return producer.epoch

    def is_fenced(self, transactional_id: str, epoch: int) -> bool:
        """Return whether another producer took this id over."""
        return self._producers[transactional_id].epoch != epoch

    def write(
        self, transactional_id: str, topic: str, records: Sequence[Outgoing], partition: int | None
    ) -> list[int]:
        """Append records that stay invisible until the commit; return their offsets."""
        offsets = []
        for record in records:
            place = self.partition_of(topic, record.key) if partition is None else partition
            offset = self.produce(
                topic, record.key, record.value, partition=place, headers=record.headers
            )
            self._logs[topic][place].hidden.add(offset)
            self._producers[transactional_id].open.append((topic, place, offset))
            offsets.append(offset)
        return offsets

    def commit_transaction(
        self, transactional_id: str, group: str, topic: str, partition: int, offset: int
    ) -> None:
        """Commit the written records, and set a group's committed offset."""
        producer = self._producers[transactional_id]
        for written, place, at in producer.open:
            self._logs[written][place].hidden.discard(at)
        self._mark(producer)
        self._committed[group, topic, partition] = offset

    def _mark(self, producer: _Producer) -> None:
        """End a producer's open transaction: append a marker to each of its partitions."""
        for topic, partition in dict.fromkeys((t, p) for t, p, _ in producer.open):
            marker = self.produce(topic, None, None, partition=partition)
            self._logs[topic][partition].hidden.add(marker)
        producer.open.clear()

    def require_up(self) -> None:
        """Raise what a client raises when the broker does not answer.

        Raises:
            LogUnavailableError: it is.
        """
        if not self.is_up:
            raise LogUnavailableError("the broker in memory is switched off")


def _committed(log: _Log, first: int) -> Iterator[MemoryRecord]:
    """Return the visible records, from the ``first``-th in the log on."""
    return (r for r in islice(log.records, first, None) if r.offset not in log.hidden)


class MemoryProducer:
    """A :class:`pipeline.kafka.producer.Publisher` to a broker in memory.

    Each partition's scores, the alerts and the rejected records are appended one after
    another, so that a worker can die between them.
    """

    def __init__(self, kafka: MemoryKafka, settings: Settings) -> None:
        self._kafka = kafka
        self._scores_topic = settings.topic("scores")
        self._alerts_topic = settings.topic("alerts")
        self._dead_letter_topic = settings.topic("dead_letter")

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        """See :class:`pipeline.kafka.producer.Publisher`."""
        await asyncio.sleep(0)
        appended = {}
        for partition, records in scores.items():
            with _step("publish scores", self._kafka.interrupt):
                first = self._append(self._scores_topic, records, partition)
                appended[partition] = AppendResult(first, first + len(records))
        if alerts:
            with _step("publish alerts", self._kafka.interrupt):
                self._append(self._alerts_topic, alerts)
        if rejected:
            with _step("publish rejected", self._kafka.interrupt):
                self._append(self._dead_letter_topic, rejected)
        return appended

    def _append(self, topic: str, records: Sequence[Outgoing], partition: int | None = None) -> int:
        """Append records; return the offset of the first."""
        if not self._kafka.is_up:
            raise PublishError("the broker in memory is switched off")
        offsets = [
            self._kafka.produce(
                topic, record.key, record.value, partition=partition, headers=record.headers
            )
            for record in records
        ]
        return offsets[0]


class MemoryTransactions:
    """A :class:`pipeline.kafka.producer.Transactions` to a broker in memory.

    A worker can die between what it writes of a partition and the commit, and another can take
    the partition there.
    """

    def __init__(self, kafka: MemoryKafka, settings: Settings) -> None:
        self._kafka = kafka
        self._settings = settings

    async def take(self, partition: int) -> int:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        await asyncio.sleep(0)
        with _step("take", self._kafka.interrupt):
            self._kafka.require_up()
            return self._kafka.init_producer(transactional_id(self._settings, partition))

    async def commit(self, outputs: Mapping[int, PartOutput]) -> dict[int, AppendResult | None]:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        committed = {}
        for partition, output in outputs.items():
            await asyncio.sleep(0)
            with _step("write transaction", self._kafka.interrupt):
                if self._is_fenced(partition, output):
                    continue
                appended = self._write(partition, output)
            await asyncio.sleep(0)
            with _step("commit transaction", self._kafka.interrupt):
                if self._is_fenced(partition, output):
                    continue
                self._kafka.commit_transaction(
                    transactional_id(self._settings, partition),
                    self._settings.kafka_group_id,
                    self._settings.topic("transactions"),
                    partition,
                    output.next_offset,
                )
            committed[partition] = appended
        return committed

    def _write(self, partition: int, output: PartOutput) -> AppendResult | None:
        """Append output that is not committed yet; return the offsets of the scores."""
        name = transactional_id(self._settings, partition)
        settings, kafka = self._settings, self._kafka
        offsets = kafka.write(name, settings.topic("scores"), output.scores, partition)
        kafka.write(name, settings.topic("alerts"), output.alerts, None)
        kafka.write(name, settings.topic("dead_letter"), output.rejected, None)
        return AppendResult(offsets[0], offsets[-1] + 2) if offsets else None  # with the marker

    def _is_fenced(self, partition: int, output: PartOutput) -> bool:
        if not self._kafka.is_up:
            raise PublishError("the broker in memory is switched off")
        return self._kafka.is_fenced(
            transactional_id(self._settings, partition), output.producer_epoch
        )


class MemoryScoreLog:
    """A :class:`pipeline.kafka.score_log.ScoreLog` on a broker in memory."""

    def __init__(self, kafka: MemoryKafka, settings: Settings) -> None:
        self._kafka = kafka
        self._scores_topic = settings.topic("scores")
        self._transactions_topic = settings.topic("transactions")

    async def bounds(self, topic: str, partition: int) -> Bounds:
        """See :class:`pipeline.kafka.score_log.ScoreLog`."""
        await asyncio.sleep(0)
        with _step("bounds", self._kafka.interrupt):
            self._kafka.require_up()
            return self._kafka.bounds(topic, partition)

    async def topic_id(self, topic: str) -> bytes | None:
        """See :class:`pipeline.kafka.score_log.ScoreLog`; a worker cannot die at this step."""
        self._kafka.require_up()
        return self._kafka.topic_id(topic)

    async def read(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        """See :class:`pipeline.kafka.score_log.ScoreLog`."""
        await asyncio.sleep(0)
        with _step("read scores", self._kafka.interrupt):
            self._kafka.require_up()
            return self.scan(partition, start, end, until_source)

    def scan(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        """Do what :meth:`read` does, at once."""
        source_prefix = f"{self._transactions_topic}:{partition}:"
        kept: dict[int, LoggedScore] = {}
        position = max(start, self._kafka.bounds(self._scores_topic, partition).begin)
        while position < end and max(kept, default=-1) < until_source:
            records = self._kafka.fetch(self._scores_topic, partition, position, FETCH_RECORDS)
            records = [record for record in records if record.offset < end]
            for record in records:
                published = read_score(record.value, source_prefix, record.offset)
                if published is not None:
                    source, score = published
                    first = kept.setdefault(source, score)
                    if first is not score:
                        kept[source] = first.and_then(score)
            position = records[-1].offset + 1 if len(records) == FETCH_RECORDS else end
        return kept, position


class MemoryConsumer:
    """One member of the group: it fetches polls, seeks and commits as the real transport does.

    A :class:`pipeline.scoring.consumer.PartitionConsumer`, too.

    Args:
        kafka: the broker.
        settings: names of topic and group, and the start of a group without offsets.
        assigned: the member's partitions.
        role: role of the topic that it reads.
    """

    def __init__(
        self,
        kafka: MemoryKafka,
        settings: Settings,
        assigned: Collection[int],
        role: TopicRole = "transactions",
    ) -> None:
        self._kafka = kafka
        self._topic = settings.topic(role)
        self._group = settings.kafka_group_id
        self._reset = settings.kafka_auto_offset_reset
        self._records_max = settings.micro_batch_max
        self._takes_at_once = settings.exactly_once and role == "transactions"
        self._positions: dict[int, int] = {}
        self._to_take: set[int] = set()
        self._generations: dict[int, int] = {}
        self._epochs: Counter[int] = Counter()
        self.assign(assigned)

    def assign(self, partitions: Collection[int]) -> None:
        """Start exactly these partitions at their committed offsets."""
        self._positions = {}
        self._to_take.clear()
        for partition in sorted(partitions):
            self._generations[partition] = self._kafka.join(self._group, self._topic, partition)
            offset = self._kafka.committed(self._group, self._topic, partition)
            self._positions[partition] = self._reset_offset(partition) if offset is None else offset
            if self._takes_at_once and offset is not None:
                self._to_take.add(partition)

    def poll(self, records_max: int | None = None) -> Poll | None:
        """Return the next records of all partitions; None at the end of all logs.

        Args:
            records_max: maximum number of records; by default the setting ``micro_batch_max``.
        """
        room = self._records_max if records_max is None else records_max
        chunks = {}
        # The partition that waited longest comes first, so that no partition starves.
        for partition in list(self._positions):
            chunk = self._chunk(partition, room)
            if chunk is None and partition in self._to_take:
                at = self._positions[partition]
                chunk = Chunk(at, at, (), self._epochs[partition])
            self._to_take.discard(partition)
            if chunk is None:
                continue
            chunks[partition] = chunk
            room -= len(chunk.records)
            del self._positions[partition]
            self._positions[partition] = chunk.end
        return Poll(chunks) if chunks else None

    def _chunk(self, partition: int, room: int) -> Chunk | None:
        """Return up to ``room`` records at the partition's position."""
        begin = start = self._positions[partition]
        bounds = self._kafka.bounds(self._topic, partition)
        if not bounds.begin <= start <= bounds.end:
            start = self._reset_offset(partition)
        records = self._kafka.fetch(self._topic, partition, start, room)
        if not records:
            return None
        epoch = self._epochs[partition]
        return Chunk(min(begin, start), records[-1].offset + 1, records, epoch)

    def _reset_offset(self, partition: int) -> int:
        bounds = self._kafka.bounds(self._topic, partition)
        return bounds.begin if self._reset == "earliest" else bounds.end

    def commit(self, poll: Poll) -> None:
        """Commit the offsets of a processed poll, never backwards."""
        for partition, offset in poll.applied.items():
            before = self._kafka.committed(self._group, self._topic, partition)
            if partition in self._positions and (before is None or before < offset):
                generation = self._generations[partition]
                self._kafka.commit(self._group, self._topic, partition, offset, generation)

    async def committed(self, partition: int) -> int | None:
        """See :class:`pipeline.scoring.consumer.PartitionConsumer`."""
        await asyncio.sleep(0)
        with _step("committed", self._kafka.interrupt):
            self._kafka.require_up()
            return self._kafka.committed(self._group, self._topic, partition)

    async def seek(self, partition: int, offset: int) -> int:
        """See :class:`pipeline.scoring.consumer.PartitionConsumer`."""
        await asyncio.sleep(0)
        with _step("seek", self._kafka.interrupt):
            self._epochs[partition] += 1
            if partition in self._positions:
                self._positions[partition] = offset
        return self._epochs[partition]


@contextmanager
def _step(name: str, interrupt: Interrupt) -> Iterator[None]:
    """Make the block one effect: an interrupt acts before or after it."""
    interrupt(f"before {name}")
    yield
    interrupt(f"after {name}")
