"""The process `recur webhooks`: a runner of each endpoint; watches of file, Redis and broker."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop
from aiokafka.errors import KafkaError

from pipeline import logs
from pipeline.errors import SettingsError, StartupError
from pipeline.kafka.log_reader import LogReader
from pipeline.kafka.polls import LogUnavailableError
from pipeline.scoring.health import Health
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.tracing.http_spans import HttpTracer
from pipeline.tracing.provider import start_tracing
from pipeline.webhooks.dead_letters import DeadLetterProducer
from pipeline.webhooks.delivery import DeliveryTools
from pipeline.webhooks.endpoints import Endpoint, configured_endpoints, load_endpoints
from pipeline.webhooks.metrics import WebhookMetrics
from pipeline.webhooks.preflight import check_webhook_services
from pipeline.webhooks.runner import EndpointRunner
from pipeline.webhooks.schedule import RetrySchedule
from pipeline.webhooks.sender import GetAddresses, get_addresses
from pipeline.webhooks.switches import Switch, Switches
from pipeline.worker.http_server import HttpServer
from pipeline.worker.shutdown import SIGNALS, ShutdownTimer, exit_on_signals

FILE_SECONDS = 2.0
"""Time between two looks at the file of endpoints, seconds."""

SWITCH_SECONDS = 0.5
"""Time between two looks at the switches in Redis, seconds."""

BROKER_SECONDS = 5.0
"""Time between two checks of the broker, seconds."""

log = logging.getLogger(__name__)


class WebhookProcess:
    """Delivery to all endpoints of the file.

    Args:
        settings: name broker, Redis and file.
        endpoints: the endpoints, by name.
        health, metrics: what the HTTP server shows.
        schedule: times of the attempts.
        lookup: resolves names.
        tracer: makes spans of the attempts; None without tracing.
    """

    def __init__(
        self,
        settings: Settings,
        endpoints: Mapping[str, Endpoint],
        health: Health,
        metrics: WebhookMetrics,
        schedule: RetrySchedule | None = None,
        lookup: GetAddresses = get_addresses,
        tracer: HttpTracer | None = None,
    ) -> None:
        self._settings = settings
        self._endpoints = dict(endpoints)
        self._health = health
        self._metrics = metrics
        self._resolve = lookup
        self._records = LogReader(settings)
        self._dead_letters = DeadLetterProducer(settings)
        self._switches = Switches.from_settings(settings)
        self._to_set: dict[str, Switch] = {}
        self._tools = DeliveryTools(
            records=self._records,
            dead_letters=self._dead_letters,
            metrics=metrics,
            schedule=schedule or RetrySchedule(),
            alerts_topic=settings.topic("alerts"),
            transactions_topic=settings.topic("transactions"),
            disable=self._disable,
            tracer=tracer,
        )
        self._runners: dict[str, tuple[EndpointRunner, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._file_error = ""

    def stop(self) -> None:
        """Begin to stop: deliveries under way are finished."""
        self._stopping.set()

    async def run(self) -> None:
        """Deliver until :meth:`stop`.

        Raises:
            RecurError: broker or Redis refuse the process for good.
        """
        try:
            await self._dead_letters.start()
            await self._records.start(self._tools.topics)
        except (KafkaError, LogUnavailableError, OSError) as error:
            raise StartupError(
                f"the broker went away during the start ({type(error).__name__}): see that it is"
                " up, and start again"
            ) from error
        self._health.up("kafka")
        self._metrics.file_valid.set(1)
        self._apply(self._endpoints)
        watches = [
            asyncio.create_task(watch)
            for watch in (self._watch_file(), self._watch_switches(), self._watch_broker())
        ]
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([*watches, stopped], return_when=asyncio.FIRST_COMPLETED)
            for watch in watches:
                if watch.done():
                    watch.result()  # raises what ended it
        finally:
            for task in (*watches, stopped):
                task.cancel()
            await asyncio.gather(*watches, stopped, return_exceptions=True)
            await self._end()

    async def _end(self) -> None:
        self._health.down("webhooks", "stopping")
        for runner, _ in self._runners.values():
            runner.stop()
        tasks = [*(task for _, task in self._runners.values()), *self._ending]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._records.stop()
        await self._dead_letters.stop()
        await self._switches.close()

    def _apply(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Start, change and end runners, so that they are those of the file."""
        for name in [name for name in self._runners if name not in endpoints]:
            runner, task = self._runners.pop(name)
            runner.stop()
            self._ending.add(task)
            task.add_done_callback(self._ended(name))
        for name, endpoint in endpoints.items():
            if name in self._runners:
                runner, _ = self._runners[name]
                if runner.endpoint != endpoint:
                    runner.update(endpoint)
            else:
                runner = EndpointRunner(
                    self._settings, endpoint, self._tools, self._health, self._resolve
                )
                self._runners[name] = runner, asyncio.create_task(runner.run())
        self._endpoints = dict(endpoints)

    def _ended(self, name: str) -> Any:
        def forget(task: asyncio.Task[None]) -> None:
            self._ending.discard(task)
            if name not in self._runners:
                self._metrics.end(name)

        return forget

    async def _disable(self, name: str) -> None:
        """Disable an endpoint that answered 410, here at once and in Redis soon."""
        self._to_set[name] = "gone"
        if name in self._runners:
            self._runners[name][0].set_state("gone")

    async def _watch_file(self) -> None:
        while True:
            await asyncio.sleep(FILE_SECONDS)
            self._check_runners()
            assert self._settings.webhooks_file is not None
            try:
                endpoints = load_endpoints(self._settings.webhooks_file)
            except SettingsError as error:
                self._metrics.file_valid.set(0)
                if str(error) != self._file_error:
                    self._file_error = str(error)
                    log.error(
                        "the file of endpoints is wrong: the endpoints stay as they were",
                        extra={"problems": str(error).splitlines()},
                    )
                continue
            self._metrics.file_valid.set(1)
            self._file_error = ""
            if endpoints != self._endpoints:
                log.info("the file of endpoints has changed", extra={"endpoints": list(endpoints)})
                self._apply(endpoints)

    def _check_runners(self) -> None:
        """Raise the error of a runner that ended by itself: the process ends, and starts again."""
        for _, task in self._runners.values():
            if task.done():
                task.result()

    async def _watch_switches(self) -> None:
        while True:
            try:
                for name, switch in list(self._to_set.items()):
                    await self._switches.set(name, switch)
                    del self._to_set[name]
                found = await self._switches.read(list(self._endpoints))
            except StoreUnavailableError as error:
                self._health.down("redis", "does not answer", str(error))
            else:
                self._health.up("redis")
                for name, (runner, _) in self._runners.items():
                    now = self._to_set.get(name) or found.get(name)
                    is_disabled = runner.endpoint.is_disabled
                    runner.set_state("disabled" if is_disabled else now or "active")
                if all(runner.has_joined for runner, _ in self._runners.values()):
                    self._health.up("partitions")
            await asyncio.sleep(SWITCH_SECONDS)

    async def _watch_broker(self) -> None:
        while True:
            try:
                await self._records.bounds(self._tools.alerts_topic, [0])
            except LogUnavailableError as error:
                self._health.down("kafka", "does not answer", str(error))
            else:
                self._health.up("kafka")
            await asyncio.sleep(BROKER_SECONDS)


def run_webhooks(settings: Settings) -> int:
    """Run `recur webhooks` until SIGTERM or SIGINT; return the exit code.

    Raises:
        RecurError: the process cannot start or go on; the message says what to do.
    """
    logs.configure(settings.log_level, settings.log_format)
    _, endpoints = configured_endpoints(settings)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with tempfile.TemporaryDirectory(prefix="recur-webhooks-") as directory:
        exit_on_signals(Path(directory))
        timer = ShutdownTimer(
            settings.shutdown_seconds,
            Path(directory),
            what_follows="deliveries under way are finished, then the process ends",
        )
        asyncio.run(_serve(settings, endpoints, timer))
        timer.cancel()
    log.info("webhooks end")
    return 0


async def _serve(
    settings: Settings, endpoints: Mapping[str, Endpoint], timer: ShutdownTimer
) -> None:
    await check_webhook_services(settings, list(endpoints))
    health, metrics = Health(settings.watchdog_seconds), WebhookMetrics()
    tracing = start_tracing(settings, "recur-webhooks")
    tracer = HttpTracer(tracing.tracer) if tracing else None
    process = WebhookProcess(settings, endpoints, health, metrics, tracer=tracer)
    server = HttpServer(settings.http_host, settings.http_port, metrics, health)
    server.start()
    loop = asyncio.get_running_loop()

    def leave(number: signal.Signals) -> None:
        timer.on_signal(number)
        process.stop()

    for number in SIGNALS:
        loop.add_signal_handler(number, leave, number)
    log.info("webhooks start", extra={"endpoints": list(endpoints), "http": server.address})
    try:
        await process.run()
    finally:
        if tracing is not None:
            await tracing.stop()
    server.stop()
