"""The end of a worker that is told to stop: within a bound, whatever is away.

A worker that stops finishes its micro-batch, commits and leaves the group. Where broker or Redis
is away that takes as long as they are. After a bound the process ends all the same, as at a crash:
what is not acked is read again, by itself or by whoever takes its partitions.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import FrameType

from pipeline import logs

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

UNFINISHED_EXIT_CODE = 1
"""Of a worker that could not finish in time, or was told twice."""

SECOND_SIGNAL_SECONDS = 1.0
"""A signal that comes sooner after the first one is the same: some shells send it twice."""

TELL_SECONDS = 1.0
"""So long the last line may take."""


def leave_at_signals(directory: Path | None = None) -> None:
    """Until a worker has begun, SIGTERM and SIGINT end the process at once: it holds nothing.

    A process that is the first of its container would ignore them otherwise.

    Args:
        directory: is removed then.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        log.info("told to stop before it began", extra={"signal": signal.Signals(number).name})
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)

    for number in SIGNALS:
        signal.signal(number, leave)


class ShutdownGuard:
    """Ends the process where its stop takes too long, or where it is told a second time.

    Args:
        bound_seconds: so long a stop may take.
        directory: is removed at such an end.
        end_process: ends this process at once.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        bound_seconds: float,
        directory: Path,
        *,
        end_process: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._bound_seconds = bound_seconds
        self._directory = directory
        self._end_process = end_process
        self._clock = clock
        self._timer: threading.Timer | None = None
        self._told_at: float | None = None

    def begin(self) -> None:
        """The worker stops, for whatever reason; only the first call counts."""
        if self._timer is None:
            self._timer = threading.Timer(self._bound_seconds, self._end_late)
            self._timer.daemon = True
            self._timer.start()

    def told(self, number: signal.Signals) -> None:
        """A signal to stop came."""
        now = self._clock()
        if self._told_at is None:
            self._told_at = now
            log.info("told to stop", extra={"signal": number.name})
            self.begin()
        elif now - self._told_at >= SECOND_SIGNAL_SECONDS:
            self._end("told to stop a second time", number.name)

    def cancel(self) -> None:
        """The stop is done."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_late(self) -> None:
        self._end(f"the stop took over {self._bound_seconds:g} s (RECUR_SHUTDOWN_SECONDS)", None)

    def _end(self, why: str, name: str | None) -> None:
        # Nobody may read what is written to standard error: writing would then wait for ever.
        unread = threading.Timer(TELL_SECONDS, self._end_process, [UNFINISHED_EXIT_CODE])
        unread.daemon = True
        unread.start()
        log.error(
            f"{why}; the process ends now, and what is not acked is read again",
            extra={} if name is None else {"signal": name},
        )
        logs.summarize_dropped()
        shutil.rmtree(self._directory, ignore_errors=True)
        sys.stderr.flush()
        unread.cancel()
        self._end_process(UNFINISHED_EXIT_CODE)
