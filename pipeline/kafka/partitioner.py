"""Kafka's default partitioner: the partition of a record by its key."""

from __future__ import annotations

from aiokafka.partitioner import murmur2


def key_partition(key: bytes, partitions: int) -> int:
    """Return the partition that Kafka's own clients choose for a key.

    >>> key_partition(b"account-1", 8)
    4
    """
    return int(murmur2(key) & 0x7FFFFFFF) % partitions
