"""Attack a gateway with requests that its OpenAPI document allows and forbids.

    python -m tests.api [--requests N] [--seed N]

Kafka, Redis, a worker and a gateway are the run's own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import click

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from tests.api.attack import Attack, attack
from tests.fakes.running_gateway import gateways, make_token
from tests.fakes.running_pipeline import PipelineUnderTest

PHASES = "examples,coverage,fuzzing"
OPERATIONS = 8
"""Operations in the document that take every example; the others run out of different ones."""

QUICK = {
    "gateway_wait_ms": 300,
    "gateway_wait_max_ms": 500,
    "gateway_failed_logins_per_minute": 0,
}
"""Settings that keep a request that asks for a wait short, and let wrong credentials be 401."""


async def _run(kafka: Kafka, redis: Redis, folder: Path, requests: int, seed: int) -> Attack:
    under_test = PipelineUnderTest(kafka.bootstrap, redis.url, folder, **QUICK)
    async with (
        under_test.running(1),
        gateways(under_test) as (gateway,),
    ):
        token = await make_token(under_test.settings)
        examples = max(1, requests // OPERATIONS)
        found = await attack(gateway.address, token, examples, phases=PHASES, seed=seed)
        failures = [line for line in gateway.log().splitlines() if " error " in line]
        return Attack(found.requests, found.status or len(failures), found.output)


@click.command()
@click.option("--requests", default=10_000, show_default=True, type=click.IntRange(1, 10_000_000))
@click.option("--seed", default=1, show_default=True)
def main(requests: int, seed: int) -> None:
    """Run the attack; the exit status is 1 if something was found."""
    with tempfile.TemporaryDirectory() as folder, Kafka() as kafka, Redis() as redis:
        found = asyncio.run(_run(kafka, redis, Path(folder), requests, seed))
    print(found.output)
    print(f"{found.requests:,} requests, {'nothing' if not found.status else 'something'} found")
    sys.exit(1 if found.status else 0)


if __name__ == "__main__":
    main()
