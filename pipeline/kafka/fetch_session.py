"""Fetch requests that name only what has changed since the last one (KIP-227).

aiokafka names each partition in each request, and the broker names each in its answer. With eight
partitions, most of them unchanged, half of a fetch's Python calls were for naming them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import msgspec
from aiokafka.structs import TopicPartition

from pipeline.kafka.connection import INT32, Packable, Packed, Versions

FETCH_KEY, FETCH_VERSION = 1, 11
"""The newest fetch request that names topics; Kafka 2.3 and later know it."""

SESSION_EPOCH_MAX = 2**31 - 1

_INT16 = struct.Struct(">h")
_HEAD = struct.Struct(">iiiibii")
_ASKED = struct.Struct(">iiqqi")
_ANSWER = struct.Struct(">ihi")
_PARTITION = struct.Struct(">ihqqqi")
_ABORTED = struct.Struct(">qq")
_RECORDS = struct.Struct(">ii")


class FetchedPartition(msgspec.Struct, frozen=True):
    """A partition's part of an answer.

    Attributes:
        error: Kafka's error code; 0 without one.
        highwater: offset of the next record of the log.
        stable: offset before which no transaction is open.
        aborted: producer and first offset of each aborted transaction.
        data: record batches.
    """

    place: TopicPartition
    error: int
    highwater: int
    stable: int
    aborted: Sequence[tuple[int, int]]
    data: bytes


class FetchAnswer:
    """Decoded answer to a fetch request.

    Attributes:
        error: Kafka's error code of the whole request; 0 without one.
        session: id of the session; 0 if the broker keeps none.
        partitions: the partitions that it names.
    """

    def __init__(self, error: int, session: int, partitions: list[FetchedPartition]) -> None:
        self.error = error
        self.session = session
        self.partitions = partitions

    @classmethod
    def decode(cls, data: memoryview) -> FetchAnswer:
        """Decode what follows the header of a response."""
        _, error, session = _ANSWER.unpack_from(data)
        (topics,) = INT32.unpack_from(data, _ANSWER.size)
        at = _ANSWER.size + INT32.size
        partitions: list[FetchedPartition] = []
        for _ in range(topics):
            (length,) = _INT16.unpack_from(data, at)
            at += 2
            topic = str(data[at : at + length], "utf-8")
            (count,) = INT32.unpack_from(data, at + length)
            at += length + 4
            for _ in range(count):
                number, code, highwater, stable, _, aborts = _PARTITION.unpack_from(data, at)
                at += _PARTITION.size
                end = at + max(0, aborts) * _ABORTED.size
                aborted = list(_ABORTED.iter_unpack(data[at:end])) if aborts > 0 else []
                _, length = _RECORDS.unpack_from(data, end)
                at = end + _RECORDS.size + max(0, length)
                records = bytes(data[end + _RECORDS.size : at])
                place = TopicPartition(topic, number)
                partitions.append(
                    FetchedPartition(place, code, highwater, stable, aborted, records)
                )
        return cls(error, session, partitions)


class SessionRequest(Packable):
    """A request of a session, for a broker that :func:`has_sessions`."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def pack(self, versions: Versions) -> Packed:
        """Return the request."""
        return Packed(FETCH_KEY, FETCH_VERSION, self._body, FetchAnswer)


def has_sessions(versions: Versions) -> bool:
    """Tell whether a broker knows the request."""
    low, high = versions.get(FETCH_KEY, (0, -1))
    return low <= FETCH_VERSION <= high


NO_SESSION = -1
"""Epoch of a request after which the broker remembers nothing."""


class FetchSession:
    """A broker's memory of the partitions and offsets that a fetcher asks for.

    Args:
        wait_ms, min_bytes, max_bytes, isolation_level: as in Kafka's protocol.
        partition_bytes: most bytes of a partition in an answer.
        epoch: 0 to begin a session, :data:`NO_SESSION` for a single request.

    Attributes:
        offsets: the offset that is read next of each partition.
    """

    def __init__(
        self,
        *,
        wait_ms: int,
        min_bytes: int,
        max_bytes: int,
        isolation_level: int,
        partition_bytes: int,
        epoch: int = 0,
    ) -> None:
        self._fixed = (-1, wait_ms, min_bytes, max_bytes, isolation_level)
        self._partition_bytes = partition_bytes
        self._id, self._epoch = 0, epoch
        self.offsets: dict[TopicPartition, int] = {}

    def request(self, positions: Mapping[TopicPartition, int]) -> SessionRequest:
        """Make the next request.

        Args:
                positions: the offset to read from, of all partitions at first and later of those
                that moved.
        """
        by_topic: dict[str, list[bytes]] = {}
        self.offsets.update(positions)
        for place, offset in (positions if self._id else self.offsets).items():
            by_topic.setdefault(place.topic, []).append(
                _ASKED.pack(place.partition, -1, offset, -1, self._partition_bytes)
            )
        parts = [_HEAD.pack(*self._fixed, self._id, self._epoch), INT32.pack(len(by_topic))]
        for topic, asked in by_topic.items():
            name = topic.encode()
            parts += (_INT16.pack(len(name)), name, INT32.pack(len(asked)), *asked)
        parts += (INT32.pack(0), _INT16.pack(0))  # no partition is forgotten; no rack
        return SessionRequest(b"".join(parts))

    def accept(self, answer: FetchAnswer) -> None:
        """Follow an answer without error: the broker keeps the session, or it keeps none."""
        self._id = answer.session
        self._epoch = self._epoch % SESSION_EPOCH_MAX + 1 if answer.session else 0
