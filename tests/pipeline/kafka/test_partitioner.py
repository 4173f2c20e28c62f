"""The partition of an account is the one that other clients of Kafka choose."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kafka.partitioner import key_partition


@pytest.mark.parametrize(
    ("key", "java_hash"),
    [  # from the tests of Kafka's Java client (UtilsTest.testMurmur2)
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_a_key_has_the_partition_of_kafkas_java_client(key: bytes, java_hash: int) -> None:
    for partitions in (1, 3, 8, 1000):
        assert key_partition(key, partitions) == (java_hash & 0x7FFFFFFF) % partitions


@given(st.binary(max_size=64), st.integers(1, 200))
def test_a_key_has_the_partition_of_aiokafkas_producer(key: bytes, partitions: int) -> None:
    everywhere = list(range(partitions))

    assert key_partition(key, partitions) == DefaultPartitioner()(key, everywhere, everywhere)
