"""Kafka and Redis for the demo and the tests: the real servers, without Docker.

with embedded() as services:
worker_environment = os.environ | services.environment()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.local.kafka import KAFKA_HEAP_MB, Kafka
from pipeline.local.redis import Redis


@dataclass(frozen=True)
class Services:
    """Addresses of Kafka and Redis, and the servers that were started here.

    An address is empty if the service was neither started nor given.
    """

    kafka_bootstrap_servers: str
    redis_url: str
    kafka: Kafka | None = None
    redis: Redis | None = None

    def environment(self) -> dict[str, str]:
        """Make the settings with which a worker process finds both services."""
        addresses = {
            "RECUR_KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers,
            "RECUR_REDIS_URL": self.redis_url,
        }
        return {name: address for name, address in addresses.items() if address}


@contextmanager
def embedded(
    kafka: bool = True,
    redis: bool = True,
    directory: Path | None = None,
    *,
    kafka_bootstrap_servers: str | None = None,
    redis_url: str | None = None,
    heap_mb: int = KAFKA_HEAP_MB,
    appendonly: bool = True,
) -> Iterator[Services]:
    """Start Kafka and Redis and wait for both; do not start a service with a given address.

    Args:
        kafka: whether Kafka is needed.
        redis: whether Redis is needed.
        directory: place of the services' directories. None: temporary directories.
        kafka_bootstrap_servers: address of running brokers to use instead.
        redis_url: address of a running Redis to use instead.
        heap_mb: as for :class:`Kafka`.
        appendonly: as for :class:`Redis`.

    Raises:
        ServiceError: a service does not start. The other one is stopped again.
    """
    broker: Kafka | None = None
    store: Redis | None = None
    with ExitStack() as stack:
        if kafka and not kafka_bootstrap_servers:
            broker = Kafka(directory=directory / "kafka" if directory else None, heap_mb=heap_mb)
            stack.callback(broker.close)
            broker.launch()
        if redis and not redis_url:
            store = Redis(
                directory=directory / "redis" if directory else None, appendonly=appendonly
            )
            stack.callback(store.close)
            store.launch()
        for service in (broker, store):
            if service is not None:
                service.wait_until_ready()
        yield Services(
            kafka_bootstrap_servers or (broker.bootstrap if broker else ""),
            redis_url or (store.url if store else ""),
            broker,
            store,
        )
