"""The produce request, packed and unpacked in one pass.

Importing this module changes all of aiokafka's producers in the process.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from aiokafka.producer import sender
from aiokafka.protocol import produce

from pipeline.kafka.connection import INT32, Packable, Packed, Versions

PRODUCE_KEY, PRODUCE_VERSION = 0, 7
"""aiokafka's newest produce request; Kafka 2.1 and later know it."""

_INT16 = struct.Struct(">h")
_HEAD = struct.Struct(">hii")
_BATCH = struct.Struct(">ii")
_ANSWER = struct.Struct(">ihqqq")


class ProduceAnswer:
    """Decoded answer to a produce request.

    Attributes:
        topics: topic, and its partitions: number, error, base offset, time, begin of the log.
    """

    API_VERSION = PRODUCE_VERSION

    def __init__(self, topics: list[tuple[str, list[tuple[int, ...]]]]) -> None:
        self.topics = topics

    @classmethod
    def decode(cls, data: memoryview) -> ProduceAnswer:
        """Decode what follows the header of an answer."""
        (count,) = INT32.unpack_from(data)
        at = INT32.size
        topics = []
        for _ in range(count):
            (length,) = _INT16.unpack_from(data, at)
            name = str(data[at + 2 : at + 2 + length], "utf-8")
            at += 2 + length
            (partitions,) = INT32.unpack_from(data, at)
            at += INT32.size
            end = at + partitions * _ANSWER.size
            topics.append((name, list(_ANSWER.iter_unpack(data[at:end]))))
            at = end
        return cls(topics)


class ProduceRequest(produce.ProduceRequest, Packable):  # type: ignore[misc]
    """aiokafka's request, which packs itself for a broker that knows its newest layout."""

    def pack(self, versions: Versions) -> Packed | None:
        """Pack the request."""
        low, high = versions.get(PRODUCE_KEY, (0, -1))
        if not low <= PRODUCE_VERSION <= high:
            return None
        name = self._transactional_id
        body = _body(name, self.required_acks, self._timeout, self._topics)
        return Packed(PRODUCE_KEY, PRODUCE_VERSION, body, ProduceAnswer)


def _body(
    transactional_id: str | None,
    acks: int,
    timeout_ms: int,
    topics: Sequence[tuple[str, Sequence[tuple[int, bytes]]]],
) -> bytes:
    name = b"" if transactional_id is None else transactional_id.encode()
    parts = [
        _INT16.pack(-1 if transactional_id is None else len(name)),
        name,
        _HEAD.pack(acks, timeout_ms, len(topics)),
    ]
    for topic, batches in topics:
        name = topic.encode()
        parts += (_INT16.pack(len(name)), name, INT32.pack(len(batches)))
        for partition, batch in batches:
            parts += (_BATCH.pack(partition, len(batch)), batch)
    return b"".join(parts)


sender.ProduceRequest = ProduceRequest
