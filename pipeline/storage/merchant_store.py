"""Store of merchants' profiles in Redis or Redis Cluster.

Many workers add to the same profiles, so a partition's watermark cannot protect them.
Transactions are counted in place, at least once. Labels are recorded exactly once: a script
changes a slot's profiles together with the slot's watermark of the labels partition. It skips
labels below the watermark, and records nothing if labels are missing in between.

A note (:mod:`pipeline.storage.transaction_note`) in the same slot holds the facts of a transaction
that its labels need. It also holds the time of the transaction's newest label: an older label
changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from model.features.merchant import BUCKET_MS, BUCKETS, COUNT_MAX, WEIGHT_MAX
from pipeline.messages.decision import DECISIONS
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.keys import MERCHANT_SLOTS, MerchantKeys, merchant_slot
from pipeline.storage.merchant_profile import (
    EMPTY_VALUE,
    FIXED_BYTES,
    FRAUD_BUCKETS_MAX,
    FRAUD_BYTES,
    FRAUDS_MAX,
    HEAD_NONE,
    HEADER_BYTES,
    PROFILE_FORMAT,
    Fraud,
    encode_frauds,
)
from pipeline.storage.script import Command, load_script
from pipeline.storage.state_store import LossCheck
from pipeline.storage.transaction_note import (
    LABELLED_NOTE_BYTES,
    NOTE_BYTES,
    NOTE_CONSTANTS,
    NOTE_EXPIRY_MS,
    STALE,
    UNKNOWN,
    ScoredNote,
)

EXPIRY_MS = FRAUD_BUCKETS_MAX * BUCKET_MS
"""Time to live of a profile after the last count: 48 days (or up to a day less)."""

KEYS_PER_CALL_MAX = 256
"""Profiles in one call of a script, so that Redis can serve others in between."""

LABELS_PER_CALL_MAX = 256
"""Labels in one call of a script."""

KEYS_HELD_MAX = 65_536
"""Cached keys of profiles; making one takes half a microsecond, twice a transaction."""

_COUNT_TRANSACTIONS = load_script(
    "count_transactions",
    HEADER_BYTES=HEADER_BYTES,
    BUCKETS=BUCKETS,
    PROFILE_FORMAT=PROFILE_FORMAT,
    HEAD_NONE=HEAD_NONE,
    COUNT_MAX=COUNT_MAX,
)
_WRITE_NOTES = load_script("notes", "write_notes", **NOTE_CONSTANTS)
_RECORD_LABELS = load_script(
    "record_labels",
    FIXED_BYTES=FIXED_BYTES,
    PROFILE_FORMAT=PROFILE_FORMAT,
    FRAUD_BYTES=FRAUD_BYTES,
    DECISION_OF={ord(word[0]): word for word in DECISIONS},
    APPROVE=DECISIONS[0],
    NOTE_BYTES=NOTE_BYTES,
    LABELLED_NOTE_BYTES=LABELLED_NOTE_BYTES,
    WEIGHT_MAX=WEIGHT_MAX,
    STALE=STALE,
    UNKNOWN=UNKNOWN,
    FRAUD_BUCKETS_MAX=FRAUD_BUCKETS_MAX,
    FRAUDS_MAX=FRAUDS_MAX,
)

_LABEL_HEAD = struct.Struct(">IQBBBQ")


@dataclass(frozen=True)
class MerchantLabel:
    """A label as the merchant store records it.

    Attributes:
        offset: offset of its record in the labels partition.
        entry: the profile's entry if the label says fraud; its weight counts only with
            ``has_weight``.
        labelled_ms: when it became known, epoch milliseconds. Of a transaction's labels the
            newest counts; of two with the same time, the later one in the log.
        has_weight: the label has a weight of its own; without one the note's weight counts.
        is_late: it became known after the time to live of its transaction's note.
    """

    offset: int
    merchant_id: str
    is_fraud: bool
    entry: Fraud
    labelled_ms: int = 0
    has_weight: bool = False
    is_late: bool = False

    @property
    def label_weight(self) -> int | None:
        """The label's own weight, or None."""
        return self.entry.weight if self.has_weight else None


@dataclass(frozen=True)
class LabelOutcomes:
    """Results of recording labels.

    Attributes:
        decisions: the decision on each label's transaction, or ``unknown``; ``stale`` for a label
            older than an earlier one; None for a duplicate or a label that was not recorded.
        behind: None, or the watermark of slots that lost labels before these. Nothing was
            recorded in such slots.
    """

    decisions: list[str | None]
    behind: int | None = None


Counts = Mapping[int, Mapping[str, int]]
"""Numbers of transactions, by time bucket and merchant id."""


class MerchantStore(Protocol):
    """Interface of a store of merchants' profiles."""

    async def load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """Load the values of profiles; None for a missing one.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def add(self, counts: Counts, notes: Sequence[ScoredNote]) -> None:
        """Count transactions and write notes.

        Raises:
            StoreUnavailableError: the store does not answer; a part may have been done.
        """

    async def record_labels(
        self, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        """Record all labels of [begin, end) of a labels partition, each once.

        Args:
            labels: in order of their offsets.
            begin: a slot that lacks labels before this offset records nothing; 0 records always.

        Raises:
            StoreUnavailableError: the store does not answer; some labels may be recorded. Call
                again with the same labels.
        """

    async def recorded_to(self, partition: int) -> int:
        """Return the offset before which all labels of a partition are recorded.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """Return the topic id of a partition's recorded labels.

        Args:
            log_id: store this id first if there is none yet; None stores nothing.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def begin_labels_log(self, partition: int, log_id: bytes) -> None:
        """Start a partition from a new log, of which no label is recorded yet.

        Raises:
            StoreUnavailableError: the store does not answer; a part may be done. Call again.
        """

    async def close(self) -> None:
        """Close the connections."""


class RedisMerchantStore:
    """Store of profiles in one Redis or a Redis Cluster.

    Args:
        client: a connected client that returns bytes.
        keys: names the keys.
        labels_topic: full name.

    Attributes:
        loss_check: called before the result of a load is trusted; None trusts all.
    """

    def __init__(self, client: Any, keys: MerchantKeys, labels_topic: str) -> None:
        self.loss_check: LossCheck | None = None
        self._redis = RedisClient(client)
        self._keys = keys
        self._profile = lru_cache(KEYS_HELD_MAX)(keys.profile)
        self._note_place = lru_cache(KEYS_HELD_MAX)(self._place_of_notes)
        self._labels_topic = labels_topic
        self._expiry = b"%d" % EXPIRY_MS
        self._note_expiry = b"%d" % NOTE_EXPIRY_MS

    @classmethod
    def from_settings(cls, settings: Settings) -> RedisMerchantStore:
        """Make a store on the settings' Redis; it connects at the first call."""
        keys = MerchantKeys(settings.redis_key_prefix)
        return cls(redis_client(settings), keys, settings.topic("labels"))

    async def load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """See :class:`MerchantStore`: it takes one MGET, on a cluster one for each slot."""
        replies = await self._redis.execute(self.load_commands(merchant_ids))
        found = self.loaded(merchant_ids, replies)
        if self.loss_check is not None and merchant_ids:
            await self.loss_check.require_no_loss(absent=None in found)
        return found

    def load_commands(self, merchant_ids: Sequence[str]) -> list[Command]:
        """Make the commands that load profiles."""
        profile = self._profile
        if not self._redis.is_cluster:
            return [("MGET", *map(profile, merchant_ids))] if merchant_ids else []
        places = by_slot(merchant_ids).values()
        return [("MGET", *(profile(merchant_ids[i]) for i in part)) for part in places]

    def loaded(self, merchant_ids: Sequence[str], replies: Sequence[Any]) -> list[bytes | None]:
        """Read the replies of :meth:`load_commands`: values in the order of the ids."""
        if not self._redis.is_cluster:
            return list(replies[0]) if merchant_ids else []
        found: list[bytes | None] = [None] * len(merchant_ids)
        for part, reply in zip(by_slot(merchant_ids).values(), replies, strict=True):
            for i, value in zip(part, reply, strict=True):
                found[i] = value
        return found

    async def add(self, counts: Counts, notes: Sequence[ScoredNote]) -> None:
        """See :class:`MerchantStore`: it takes one round trip."""
        await self._redis.execute(self.count_commands(counts) + self.note_commands(notes))

    def count_commands(self, counts: Counts) -> list[Command]:
        """Make the commands that count transactions."""
        return [command for bucket in counts for command in self._count(bucket, counts[bucket])]

    def _count(self, bucket: int, counts: Mapping[str, int]) -> list[Command]:
        """Make the calls that count transactions of one bucket."""
        merchant_ids = list(counts)
        numbers = np.minimum(list(counts.values()), COUNT_MAX).astype(">u2")
        profile = self._profile
        return [
            _COUNT_TRANSACTIONS.call(
                [profile(merchant_ids[i]) for i in part],
                self._expiry,
                b"%d" % bucket,
                numbers[list(part)].tobytes(),
            )
            for part in self._calls(merchant_ids)
        ]

    def _calls(self, merchant_ids: Sequence[str]) -> list[Sequence[int]]:
        """Split the indices of the ids into calls of a script; a call has one slot on a cluster."""
        places: Iterable[Sequence[int]] = [range(len(merchant_ids))]
        if self._redis.is_cluster:
            places = by_slot(merchant_ids).values()
        most = KEYS_PER_CALL_MAX
        return [part[i : i + most] for part in places for i in range(0, len(part), most)]

    def note_commands(self, notes: Sequence[ScoredNote]) -> list[Command]:
        """Make the commands that write notes."""
        calls = self._calls([note.merchant_id for note in notes])
        return [self._notes_call([notes[i] for i in part]) for part in calls]

    def _notes_call(self, notes: Sequence[ScoredNote]) -> Command:
        values = b"".join([note.to_bytes() for note in notes])
        return _WRITE_NOTES.call(self.note_keys(notes), self._note_expiry, values)

    def note_keys(self, notes: Iterable[ScoredNote]) -> list[bytes]:
        """List for each note its key and its merchant's profile."""
        keys: list[bytes] = []
        for note in notes:
            begin, profile = self._note_place(note.merchant_id)
            keys += begin + b"%016x" % note.transaction_hash, profile
        return keys

    def _place_of_notes(self, merchant_id: str) -> tuple[bytes, bytes]:
        """Return the begin of the keys of a merchant's notes, and the key of its profile."""
        return self._keys.notes_begin(merchant_slot(merchant_id)), self._profile(merchant_id)

    async def record_labels(
        self, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        """See :class:`MerchantStore`: it takes one round trip, with a call for each slot."""
        if self.loss_check is not None:
            await self.loss_check.require_no_loss(absent=False)
        calls: list[Sequence[int]] = []
        commands: list[Command] = []
        for slot, places in enumerate(places_by_slot(labels)):
            start = begin
            for part, stop in _split_calls(places, labels, end):
                calls.append(part)
                labels_of_call = [labels[i] for i in part]
                commands.append(self._labels_call(slot, partition, labels_of_call, start, stop))
                start = stop
        replies = await self._redis.execute(commands)
        return label_outcomes(len(labels), calls, [_decisions(reply) for reply in replies])

    def _labels_call(
        self, slot: int, partition: int, labels: Sequence[MerchantLabel], begin: int, end: int
    ) -> Command:
        """Make the call that records labels of one slot."""
        place_of: dict[str, int] = {}
        places = [place_of.setdefault(x.merchant_id, 1 + len(place_of)) for x in labels]
        entries = encode_frauds([label.entry for label in labels])
        blob = b"".join(
            _LABEL_HEAD.pack(
                place,
                label.offset,
                label.is_fraud,
                label.has_weight,
                label.is_late,
                label.labelled_ms,
            )
            + entry
            for place, label, entry in zip(places, labels, entries, strict=True)
        )
        return _RECORD_LABELS.call(
            [
                self._keys.labels_watermark(slot, self._labels_topic, partition),
                *map(self._profile, place_of),
                *(self._keys.note(slot, label.entry.id_hash) for label in labels),
            ],
            self._expiry,
            b"%d" % len(place_of),
            EMPTY_VALUE,
            b"%d" % begin,
            b"%d" % end,
            blob,
            self._note_expiry,
        )

    async def recorded_to(self, partition: int) -> int:
        """See :class:`MerchantStore`."""
        topic, slots = self._labels_topic, range(MERCHANT_SLOTS)
        keys = [self._keys.labels_watermark(slot, topic, partition) for slot in slots]
        values = await self._redis.execute([("GET", key) for key in keys])
        return min(0 if value is None else int(value) for value in values)

    async def forget_recorded(self, partitions: int) -> None:
        """Delete the labels watermarks, so that workers record the labels again from the log.

        Raises:
            StoreUnavailableError: Redis does not answer; some may be deleted. Call again.
        """
        if partitions == 0:
            return
        topic, slots = self._labels_topic, range(MERCHANT_SLOTS)
        await self._redis.execute(
            [("DEL", *self._keys.labels_watermarks(slot, topic, partitions)) for slot in slots]
        )

    async def labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """See :class:`MerchantStore`."""
        key = self._keys.labels_log(self._labels_topic, partition)
        if log_id is not None:
            await self._redis.execute([("SET", key, log_id, "NX")])
        (found,) = await self._redis.execute([("GET", key)])
        return None if found is None else bytes(found)

    async def begin_labels_log(self, partition: int, log_id: bytes) -> None:
        """See :class:`MerchantStore`: the id comes last, so an interrupted call is repeated."""
        topic, slots = self._labels_topic, range(MERCHANT_SLOTS)
        keys = [self._keys.labels_watermark(slot, topic, partition) for slot in slots]
        await self._redis.execute([("DEL", key) for key in keys])
        await self._redis.execute([("SET", self._keys.labels_log(topic, partition), log_id)])

    async def close(self) -> None:
        """See :class:`MerchantStore`."""
        await self._redis.close()


def label_outcomes(
    count: int, parts: Sequence[Sequence[int]], replies: Sequence[list[str | None] | int]
) -> LabelOutcomes:
    """Combine the replies of calls on parts of the labels: decisions, or a slot's watermark.

    Args:
        count: how many labels there are.
        parts: for each call, the indices of its labels.
    """
    decisions: list[str | None] = [None] * count
    for part, reply in zip(parts, replies, strict=True):
        if not isinstance(reply, int):
            for i, decision in zip(part, reply, strict=True):
                decisions[i] = decision
    behind = [reply for reply in replies if isinstance(reply, int)]
    return LabelOutcomes(decisions, min(behind, default=None))


def _decisions(reply: list[bytes] | int) -> list[str | None] | int:
    return reply if isinstance(reply, int) else [word.decode() or None for word in reply]


def by_slot(merchant_ids: Sequence[str]) -> dict[int, list[int]]:
    """Group the indices of the ids by slot, in order."""
    places: dict[int, list[int]] = {}
    for i, merchant in enumerate(merchant_ids):
        places.setdefault(merchant_slot(merchant), []).append(i)
    return places


def places_by_slot(labels: Sequence[MerchantLabel]) -> list[list[int]]:
    """List the indices of the labels of each slot."""
    places = by_slot([label.merchant_id for label in labels])
    return [places.get(slot, []) for slot in range(MERCHANT_SLOTS)]


def _split_calls(
    places: Sequence[int], labels: Sequence[MerchantLabel], end: int
) -> Iterator[tuple[Sequence[int], int]]:
    """Split a slot's labels into calls; yield each call's labels and its end offset."""
    most = LABELS_PER_CALL_MAX
    firsts = range(0, max(1, len(places)), most)  # a slot without labels needs a call, too
    ends = [labels[places[first]].offset for first in firsts[1:]]
    for first, stop in zip(firsts, [*ends, end], strict=True):
        yield places[first : first + most], stop
