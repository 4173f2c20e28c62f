"""Bounded stop of a worker, even if broker or Redis does not answer.

A stopping worker finishes its micro-batch, commits, and leaves the group. This waits for a broker
or Redis that is away. After a bound the process ends anyway, as in a crash. The next owner of the
partitions, or the restarted worker, reads unacked records again.
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
"""Exit code of a worker that could not finish in time, or got a second signal."""

SECOND_SIGNAL_SECONDS = 1.0
"""Time within which a second signal counts as the first: some shells send it twice."""

LAST_LINE_SECONDS = 1.0
"""Longest time for writing the last line."""


def exit_on_signals(directory: Path | None = None) -> None:
    """Let SIGTERM and SIGINT end the process at once, until the worker has begun.

    Nothing is lost then. Without handlers, the first process of a container would ignore them.

    Args:
        directory: removed at the end.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        log.info(
            "stop signal before the worker began", extra={"signal": signal.Signals(number).name}
        )
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)

    for number in SIGNALS:
        signal.signal(number, leave)


class ShutdownTimer:
    """Timer that ends the process when its stop takes too long, or at a second signal.

    Args:
        bound_seconds: longest stop.
        directory: removed at such an end.
        end_process: ends this process at once.
        clock: monotonic seconds.
        what_follows: what the process does now, for the log.
    """

    def __init__(
        self,
        bound_seconds: float,
        directory: Path,
        *,
        end_process: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = monotonic,
        what_follows: str = "the worker finishes its micro-batch and ends",
    ) -> None:
        self._what_follows = what_follows
        self._bound_seconds = bound_seconds
        self._directory = directory
        self._end_process = end_process
        self._clock = clock
        self._timer: threading.Timer | None = None
        self._first_signal_at: float | None = None

    def begin(self) -> None:
        """Start the timer when the worker begins to stop; only the first call counts."""
        if self._timer is None:
            self._timer = threading.Timer(self._bound_seconds, self._end_late)
            self._timer.daemon = True
            self._timer.start()

    def on_signal(self, number: signal.Signals) -> None:
        """Handle a signal to stop."""
        now = self._clock()
        if self._first_signal_at is None:
            self._first_signal_at = now
            log.info(
                f"stop signal: {self._what_follows}",
                extra={"signal": number.name},
            )
            self.begin()
        elif now - self._first_signal_at >= SECOND_SIGNAL_SECONDS:
            self._end("second stop signal", number.name)

    def cancel(self) -> None:
        """Cancel the timer: the stop is complete."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_late(self) -> None:
        self._end(f"the stop took over {self._bound_seconds:g} s (RECUR_SHUTDOWN_SECONDS)", None)

    def _end(self, why: str, name: str | None) -> None:
        # Writing waits for ever if standard error is a full pipe that no process reads.
        unread = threading.Timer(LAST_LINE_SECONDS, self._end_process, [UNFINISHED_EXIT_CODE])
        unread.daemon = True
        unread.start()
        log.error(
            f"{why}; the process ends now, and unacked records are read again",
            extra={} if name is None else {"signal": name},
        )
        logs.summarize_dropped()
        shutil.rmtree(self._directory, ignore_errors=True)
        sys.stderr.flush()
        unread.cancel()
        self._end_process(UNFINISHED_EXIT_CODE)
