"""The broker and the Redis that all tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis, RedisCluster

# How long an example takes says more about the machine than about the code.
settings.register_profile("recur", deadline=None)
settings.load_profile("recur")


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """A broker for tests that keep to topics and groups of their own and leave it running."""
    with Kafka() as broker:
        yield broker


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis for tests that keep to keys of their own, or flush it, and leave it running."""
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """Three nodes, for tests that keep to keys of their own and leave them running."""
    with RedisCluster() as cluster:
        yield cluster
