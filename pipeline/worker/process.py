"""The worker process: start-up, signals, and a bounded stop around the Faust app."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import faust
import uvloop
from aiokafka.errors import KafkaError

from pipeline import logs
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError, StartupError
from pipeline.garbage_collector import tune_garbage_collector
from pipeline.settings import Settings
from pipeline.worker.app import Worker
from pipeline.worker.preflight import check_services
from pipeline.worker.shutdown import ShutdownTimer, exit_on_signals

log = logging.getLogger(__name__)

SWITCH_INTERVAL_SECONDS = 0.0005
"""Time after which a computing thread lets the event loop run. Python's default, 5 ms, would be
most of a fast answer."""


class _Process(faust.Worker):  # type: ignore[misc]
    """Faust's worker process; it starts our clients before the app, and its stop is bounded."""

    def __init__(self, worker: Worker, shutdown: ShutdownTimer, **options: Any) -> None:
        super().__init__(worker.app, **options)
        self.spinner = None  # Faust's progress on the terminal
        self._recur = worker
        self._shutdown_timer = shutdown

    def _schedule_shutdown(self, signal: signal.Signals) -> None:
        self._shutdown_timer.on_signal(signal)
        super()._schedule_shutdown(signal)

    def _crash(self, reason: BaseException) -> None:
        self._shutdown_timer.begin()
        super()._crash(reason)

    async def stop(self) -> None:
        """Stop, within the bound."""
        self._shutdown_timer.begin()
        await super().stop()

    async def on_first_start(self) -> None:
        try:
            await self._recur.start_clients()
        except (RecurError, KafkaError, OSError) as error:
            refusal = error
            if not isinstance(error, RecurError):
                refusal = StartupError(
                    f"the broker went away during the start ({type(error).__name__}): see that it"
                    " is up, and start again"
                )
            self._recur.app.crash_reason = refusal  # _run() raises it
            raise refusal from error
        await super().on_first_start()

    def on_setup_root_logger(self, logger: Any, level: int) -> None:
        """Leave the logging as it is configured."""


def run_worker(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT; return the exit code.

    Raises:
        RecurError: the worker cannot start or go on; the message says what to do.
    """
    logs.configure(settings.log_level, settings.log_format)
    checkpoint = load_checkpoint(settings)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    partitions = loop.run_until_complete(check_services(settings, checkpoint))
    with tempfile.TemporaryDirectory(prefix="recur-worker-") as directory:
        exit_on_signals(Path(directory))  # until Faust installs its own handlers
        worker = Worker(settings, checkpoint, partitions, Path(directory))
        log.info(
            "worker starts",
            extra={
                "model": checkpoint.digest,
                "partitions": partitions,
                "endpoints": worker.http_server.address,
            },
        )
        tune_garbage_collector()
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        return _run(worker, loop, ShutdownTimer(settings.shutdown_seconds, Path(directory)))


def _run(worker: Worker, loop: asyncio.AbstractEventLoop, shutdown: ShutdownTimer) -> int:
    process = _Process(
        worker, shutdown, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False
    )
    try:
        process.execute_from_commandline()
    except SystemExit as end:
        crash = worker.app.crash_reason
        if isinstance(crash, RecurError):
            raise crash from None
        log.info("worker ends", extra={"code": end.code})
        return 1 if crash is not None else int(end.code or 0)
    return 0
