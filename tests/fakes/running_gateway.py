"""Gateway processes on a pipeline under test, and a client for them."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

import pipeline
from pipeline.gateway.api_keys import api_key_store, new_key
from pipeline.local.kafka import Kafka
from pipeline.local.ports import HOST, free_port
from pipeline.local.redis import Redis
from pipeline.local.supervisor import SupervisedProcess
from pipeline.messages.transactions import encode_transaction
from pipeline.settings import Settings
from tests.fakes.running_pipeline import PipelineUnderTest

READY_SECONDS = 120.0
STOP_SECONDS = 20.0
REQUEST_SECONDS = 60.0

Result = TypeVar("Result")
ALL_SCOPES = ("score", "label", "read", "admin")


@dataclass
class GatewayProcess:
    """A gateway process and a client of it."""

    process: SupervisedProcess
    port: int
    log_path: Path
    client: httpx.AsyncClient
    token: str
    spawn: Callable[[], SupervisedProcess]

    @property
    def address(self) -> str:
        """Its address."""
        return str(self.client.base_url)

    async def kill(self) -> None:
        """End it with SIGKILL."""
        await asyncio.to_thread(self.process.kill)

    def restart(self) -> None:
        """Start it again after its end, at the same address; it may not be ready yet."""
        self.process = self.spawn()

    async def until_ready(self) -> None:
        """Wait until /ready says so; fail with the log if the process ends before."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            status = self.process.poll()
            assert status is None, f"it ended with {status}:\n{self.log()}"
            if await self.is_ready():
                return
            assert time.monotonic() < deadline, f"not ready:\n{self.log()}"
            await asyncio.sleep(0.05)

    async def is_ready(self) -> bool:
        """Tell whether /ready answers with 200."""
        try:
            return (await self.client.get("/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def score(
        self, transaction: Any, wait: str = "wait=20", **headers: str
    ) -> httpx.Response:
        """Post a transaction: bytes, or one to encode."""
        body = transaction if isinstance(transaction, bytes) else encode_transaction(transaction)
        return await self.client.post(
            "/v1/scores", content=body, headers={"Prefer": wait, **headers}
        )

    async def metric(self, name: str) -> float:
        """Read a metric by its name and labels, as in ``/metrics``; 0 if there is none."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        found = [line.rpartition(" ") for line in lines]
        return sum(float(value) for labelled, _, value in found if labelled == name)

    def log(self) -> str:
        """Read its log."""
        return self.log_path.read_text(errors="replace")

    async def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        return await asyncio.to_thread(self.process.stop, STOP_SECONDS)

    async def close(self) -> None:
        """Stop the process if it runs, and close the client."""
        if self.process.poll() is None:
            await self.stop()
        await self.client.aclose()


async def make_token(
    settings: Settings, scopes: Iterable[str] = ALL_SCOPES, tenant: str | None = None
) -> str:
    """Add an API key without a rate limit, and return its token."""
    key, token = new_key("test", scopes, tenant=tenant, rate="none")
    async with api_key_store(settings) as store:
        await store.add(key)
    return token


async def start_gateway(
    under_test: PipelineUnderTest, token: str, verify: ssl.SSLContext | None = None, **more: Any
) -> GatewayProcess:
    """Start ``recur gateway`` on the pipeline's topics and keys; it may not be ready yet.

    Args:
        verify: with it the client speaks TLS.
    """
    port = free_port()
    log_path = under_test.directory / f"gateway-{port}.log"
    overrides = under_test.overrides | {"gateway_host": HOST, "gateway_port": port} | more
    paths = [str(Path(pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **{f"RECUR_{name.upper()}": str(value) for name, value in overrides.items()},
        "RECUR_LOG_FORMAT": "text",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }

    def spawn() -> SupervisedProcess:
        return SupervisedProcess(
            [sys.executable, "-m", "pipeline.cli.main", "gateway"],
            log_path=log_path,
            directory=under_test.directory,
            environment=environment,
            grace_seconds=STOP_SECONDS,
        )

    client = httpx.AsyncClient(
        base_url=f"http{'s' if verify else ''}://{HOST}:{port}",
        verify=verify or True,
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        timeout=REQUEST_SECONDS,
        limits=httpx.Limits(max_connections=200),
        trust_env=False,
    )
    return GatewayProcess(spawn(), port, log_path, client, token, spawn)


@asynccontextmanager
async def gateways(
    under_test: PipelineUnderTest, count: int = 1, **more: Any
) -> AsyncIterator[list[GatewayProcess]]:
    """Start gateways, wait until they are ready, and stop them at the end."""
    token = await make_token(under_test.settings)
    started = [await start_gateway(under_test, token, **more) for _ in range(count)]
    try:
        await asyncio.gather(*(one.until_ready() for one in started))
        yield started
    finally:
        await asyncio.gather(*(one.close() for one in started))


@dataclass
class Site:
    """A pipeline with gateways, and the loop that their clients belong to."""

    runner: asyncio.Runner
    under_test: PipelineUnderTest
    gateways: list[GatewayProcess]

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(coroutine)

    @contextmanager
    def paused_worker(self) -> Iterator[None]:
        """Let no score be computed within the block."""
        pid = self.under_test.workers[0].process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def running_site(
    kafka: Kafka, redis_server: Redis, directory: Path, count: int = 1, **more: Any
) -> Iterator[Site]:
    """Run a worker and gateways on a loop of their own; any alert needs a score of .05."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> Site:
            under_test = PipelineUnderTest(
                kafka.bootstrap, redis_server.url, directory, review_threshold=0.05
            )
            await stack.enter_async_context(under_test.running(1))
            started = await stack.enter_async_context(gateways(under_test, count, **more))
            return Site(runner, under_test, started)

        try:
            yield runner.run(start())
        finally:
            runner.run(stack.aclose())
