"""A worker's clients of the state store, the merchant store and the broker, over the network.

The services are those of :mod:`tests.fakes.memory`. Each method sends one request, or as many at
once as the real client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from random import Random
from typing import Any

from pipeline.kafka.polls import Bounds, LogUnavailableError
from pipeline.kafka.producer import AppendResult, Outgoing, PublishError
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.replies import decode_replies
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.keys import MERCHANT_SLOTS, merchant_slot
from pipeline.storage.merchant_store import (
    Counts,
    LabelOutcomes,
    MerchantLabel,
    label_outcomes,
    places_by_slot,
)
from pipeline.storage.state_store import Load, LoadResult, Save
from pipeline.storage.transaction_note import ScoredNote
from tests.fakes.memory import MemoryKafka, MemoryMerchantStore, MemoryScoreLog, MemoryStateStore
from tests.simulation.auditor import Auditor
from tests.simulation.clock import Host
from tests.simulation.network import Network

SERVERS = 2
"""Servers of the merchants' cluster; a request may succeed at one and fail at another."""

UNKNOWN_OFFSET = 0.03
"""Share of appends that the producer repeats after a lost answer.

The broker already has the records and returns no offset."""


class StateStore(MemoryStateStore):
    """State store that records its changes.

    Attributes:
        changed: partitions with new writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[int] = set()

    def write(self, request: Save) -> bool:
        self.changed.add(request.partition)
        return super().write(request)

    def restore(self, other: MemoryStateStore) -> None:
        self.changed.update(self.watermarks)
        super().restore(other)
        self.changed.update(self.watermarks)


class StateClient:
    """A :class:`pipeline.storage.state_store.StateStore` over the network."""

    def __init__(self, host: Host, network: Network, store: StateStore) -> None:
        self._host = host
        self._network = network
        self.store = store

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Load states, as with one MGET."""
        (loaded,) = await self._network.ask(
            self._host,
            "load " + " ".join(f"{r.partition}" for r in requests),
            [lambda: [self.store.read(request) for request in requests]],
            StoreUnavailableError,
        )
        return loaded

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """Save states with one script for each partition, one after another."""
        effects = [self.effects(request) for request in requests]
        done = await self._network.ask(
            self._host,
            "save " + " ".join(f"{r.partition}" for r in requests),
            list(chain.from_iterable(effects)),
            StoreUnavailableError,
        )
        return self.stands(effects, done)

    def effects(self, request: Save) -> list[Callable[[], bool]]:
        """Return the effects of a request's commands; the last one returns whether it stands."""
        return [partial(self.store.write, request)]

    @staticmethod
    def stands(effects: Sequence[Sequence[Any]], done: Sequence[bool]) -> list[bool]:
        """Read the results of requests' effects: whether each request stands."""
        return [done[end - 1] for end in accumulate(map(len, effects))]

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield the stored accounts, as with one SCAN."""
        (places,) = await self._network.ask(
            self._host,
            f"accounts {partition}",
            [lambda: self.store.places(partition)],
            StoreUnavailableError,
        )
        yield places

    async def ping(self) -> None:
        """Refuse: the simulation does not use it."""
        raise NotImplementedError

    async def close(self) -> None:
        """Do nothing, because no connection is open."""


class MerchantClient:
    """A :class:`pipeline.storage.merchant_store.MerchantStore` over the network.

    Args:
        auditor: notified of each recorded label and each note.

    Attributes:
        writer: the worker's id, as in watermarks.
    """

    writer = 0

    def __init__(
        self,
        host: Host,
        network: Network,
        store: MemoryMerchantStore,
        auditor: Auditor,
    ) -> None:
        self._host = host
        self._network = network
        self._store = store
        self.auditor = auditor

    async def load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """Load profiles, as with one MGET."""
        (values,) = await self._network.ask(
            self._host,
            "load merchants",
            [lambda: self.read(merchant_ids)],
            StoreUnavailableError,
        )
        return values

    async def add(self, counts: Counts, notes: Sequence[ScoredNote]) -> None:
        """Add counts with one script for each bucket, and write notes with another."""
        effects = self.count_effects(counts)
        if notes:
            effects.append(partial(self.remember, notes))
        await self._network.ask(self._host, "count", effects, StoreUnavailableError)

    def read(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """Read profiles at once."""
        return [self._store.profiles.get(merchant) for merchant in merchant_ids]

    def count_effects(self, counts: Counts) -> list[Callable[[], None]]:
        """Return the effect of the script for each bucket."""
        return [partial(self._count, bucket, merchants) for bucket, merchants in counts.items()]

    def _count(self, bucket: int, merchants: Any) -> None:
        for merchant, n in merchants.items():
            self._store.count(bucket, merchant, n)

    def remember(self, notes: Sequence[ScoredNote]) -> None:
        """Write notes at once."""
        for note in notes:
            self._store.remember(note)
            place = merchant_slot(note.merchant_id), note.transaction_hash
            self.auditor.noted(self.writer, place)

    async def record_labels(
        self, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        """Record labels with a script for each slot; a server runs all of its scripts or none."""
        parts = places_by_slot(labels)
        replies: list[list[str | None] | int] = [0] * MERCHANT_SLOTS

        def book(slots: range) -> None:
            for slot in slots:
                recorded = [labels[i] for i in parts[slot]]
                replies[slot] = self._store.record_slot(slot, partition, recorded, begin, end)
                for label in recorded:
                    self.auditor.label_recorded(partition, label)
            self.auditor.recorded_to(partition, slots)

        servers = [range(first, MERCHANT_SLOTS, SERVERS) for first in range(SERVERS)]
        await self._network.ask(
            self._host,
            f"book {partition} from {begin} to {end}",
            [partial(book, slots) for slots in servers],
            StoreUnavailableError,
        )
        return label_outcomes(len(labels), parts, replies)

    async def recorded_to(self, partition: int) -> int:
        """Return the offset before which all labels of a partition are recorded."""
        (end,) = await self._network.ask(
            self._host,
            f"recorded to? {partition}",
            [lambda: self._store.all_recorded_to(partition)],
            StoreUnavailableError,
        )
        return end

    async def labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """Return the id of a partition's labels log; store ``log_id`` if there is none."""
        (found,) = await self._network.ask(
            self._host,
            f"id of the labels log {partition}",
            [lambda: self._store.named_labels_log(partition, log_id)],
            StoreUnavailableError,
        )
        return found

    async def begin_labels_log(self, partition: int, log_id: bytes) -> None:
        """Begin a new labels log in a partition."""
        await self._network.ask(
            self._host,
            f"begin the labels log {partition}",
            [lambda: self._store.forget_labels_log(partition, log_id)],
            StoreUnavailableError,
        )

    async def close(self) -> None:
        """Do nothing, because no connection is open."""


class PollClient:
    """A :class:`pipeline.storage.poll_store.PollStore` over the network.

    Args:
        is_cluster: whether the store is a Redis Cluster, where a script cannot write notes
            together with states.
    """

    def __init__(
        self,
        host: Host,
        network: Network,
        states: StateClient,
        merchants: MerchantClient,
        *,
        is_cluster: bool,
    ) -> None:
        self._host = host
        self._network = network
        self._states = states
        self._merchants = merchants
        self._is_cluster = is_cluster

    async def load(
        self, requests: Sequence[Load], merchant_ids: Sequence[str]
    ) -> tuple[list[LoadResult], list[bytes | None]]:
        """Load states with one MGET, and profiles with another."""
        effects: list[Callable[[], list[Any]]] = [
            lambda: [self._states.store.read(request) for request in requests]
        ]
        if merchant_ids:
            effects.append(lambda: self._merchants.read(merchant_ids))
        name = "load " + " ".join(f"{r.partition}" for r in requests)
        done = await self._network.ask(self._host, name, effects, StoreUnavailableError)
        return done[0], done[1] if merchant_ids else []

    async def save(self, requests: Sequence[Save], counts: Counts) -> list[bool]:
        """Save with a script for each partition, then count with one for each bucket."""
        states, merchants = self._states, self._merchants
        if self._is_cluster:
            notes = [note for request in requests for note in request.notes]
            if notes:
                await merchants.add({}, notes)
            stands = await states.save(requests)
            if counts:
                await merchants.add(counts, [])
            return stands
        saves = [self._with_notes(request) for request in requests]
        effects: list[Callable[[], Any]] = [*chain.from_iterable(saves)]
        done = await self._network.ask(
            self._host,
            "save and count " + " ".join(f"{r.partition}" for r in requests),
            effects + merchants.count_effects(counts),
            StoreUnavailableError,
        )
        return states.stands(saves, done)

    async def reply(self, messages: Mapping[str, bytes]) -> None:
        """Audit replies; they are no effect, because a lost one changes nothing."""
        replies = chain.from_iterable(map(decode_replies, messages.values()))
        self._merchants.auditor.replied(replies)

    def _with_notes(self, request: Save) -> list[Callable[[], bool]]:
        """Return the effects of a request whose first command writes its notes, too."""
        first, *others = self._states.effects(request)

        def save() -> bool:
            if self._states.store.watermarks.get(request.partition) == request.expected:
                self._merchants.remember(request.notes)
            return first()

        return [save, *others]


Published = Callable[[str, int, int, Sequence[Outgoing]], None]
"""Callback ``(topic, partition, first offset, records)`` for appended records."""


class Publisher:
    """A :class:`pipeline.kafka.producer.Publisher` over the network; topics are concurrent.

    Args:
        published: returns the callback for the records that are sent now.
    """

    def __init__(
        self,
        host: Host,
        network: Network,
        kafka: MemoryKafka,
        settings: Settings,
        rng: Random,
        published: Callable[[], Published],
    ) -> None:
        self._host = host
        self._network = network
        self._kafka = kafka
        self._settings = settings
        self._rng = rng
        self._published = published

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        """Publish like :class:`pipeline.kafka.producer.Publisher`."""
        topic = self._settings.topic
        others = [(topic("alerts"), alerts), (topic("dead_letter"), rejected)]
        sent = [
            *(self._append(topic("scores"), part, records) for part, records in scores.items()),
            *(self._append(name, 0, records) for name, records in others if records),
        ]
        appended = await asyncio.gather(*sent)
        return dict(zip(scores, appended, strict=False))

    async def _append(
        self, topic: str, partition: int, records: Sequence[Outgoing]
    ) -> AppendResult:
        published = self._published()

        def append() -> int:
            offsets = [
                self._kafka.produce(
                    topic, record.key, record.value, partition=partition, headers=record.headers
                )
                for record in records
            ]
            published(topic, partition, offsets[0], records)
            return offsets[0]

        (first,) = await self._network.ask(
            self._host, f"append to {topic} {partition}", [append], PublishError
        )
        if self._rng.random() < UNKNOWN_OFFSET:
            return AppendResult(None, None)
        return AppendResult(first, first + len(records))


class ScoreLog:
    """A :class:`pipeline.kafka.score_log.ScoreLog` over the network."""

    def __init__(
        self, host: Host, network: Network, kafka: MemoryKafka, settings: Settings
    ) -> None:
        self._host = host
        self._network = network
        self._kafka = kafka
        self._log = MemoryScoreLog(kafka, settings)

    async def bounds(self, topic: str, partition: int) -> Bounds:
        """Return where a partition's log begins and ends."""
        (bounds,) = await self._network.ask(
            self._host,
            f"bounds {topic} {partition}",
            [lambda: self._kafka.bounds(topic, partition)],
            LogUnavailableError,
        )
        return bounds

    async def topic_id(self, topic: str) -> bytes | None:
        """Return a topic's id."""
        (found,) = await self._network.ask(
            self._host, f"id of {topic}", [lambda: self._kafka.topic_id(topic)], LogUnavailableError
        )
        return found

    async def read(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        """Read scores like :class:`pipeline.kafka.score_log.ScoreLog`."""
        (found,) = await self._network.ask(
            self._host,
            f"read scores {partition} [{start}, {end})",
            [lambda: self._log.scan(partition, start, end, until_source)],
            LogUnavailableError,
        )
        return found
