"""The partition of a record's key, as Kafka's default partitioner computes it."""

from __future__ import annotations

from functools import lru_cache

from aiokafka.partitioner import DefaultPartitioner


@lru_cache(maxsize=65_536)
def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition to which producers send records with this key by default.

    >>> partition_of(b"A000001", 4)
    1
    """
    numbers = _numbers(partitions)
    return int(DefaultPartitioner()(key, numbers, numbers))


@lru_cache(maxsize=4)
def _numbers(partitions: int) -> list[int]:
    return list(range(partitions))
