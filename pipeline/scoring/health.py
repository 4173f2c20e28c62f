"""Whether the worker is alive and ready, and since when nothing moved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from pipeline.scoring.outages import Outages

SERVICES = frozenset({"redis", "kafka"})
"""The log tells of their outages."""


class Health:
    """What `/live` and `/ready` tell; written by worker and monitors, read by any thread.

    Args:
        watchdog_seconds: records wait and nothing moves for this long: not alive.
        clock: monotonic seconds.
    """

    def __init__(self, watchdog_seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self._watchdog_seconds = watchdog_seconds
        self._clock = clock
        self._outages = Outages(clock)
        self._lock = threading.Lock()
        self._missing = {"redis": "not reached yet", "kafka": "not reached yet",
                         "partitions": "not assigned yet"}  # fmt: skip
        self._waiting_since: dict[str, float] = {}  # by what waits

    def up(self, part: str) -> None:
        """``part`` (redis, kafka, partitions or worker) is there."""
        with self._lock:
            self._missing.pop(part, None)
        self._outages.answered(part)

    def down(self, part: str, why: str, error: str = "") -> None:
        """``part`` is away; ``error`` is what a call to it failed with, for the log."""
        with self._lock:
            self._missing[part] = why
        if part in SERVICES:
            self._outages.failed(part, error)

    def moved(self, what: str = "transactions") -> None:
        """A micro-batch was applied, or labels were booked."""
        with self._lock:
            if what in self._waiting_since:
                self._waiting_since[what] = self._clock()

    def records_wait(self, waiting: bool, what: str = "transactions") -> None:
        """Whether a log, of transactions or of labels, holds records that are not applied."""
        with self._lock:
            if not waiting:
                self._waiting_since.pop(what, None)
            else:
                self._waiting_since.setdefault(what, self._clock())

    def stalled_seconds(self) -> float:
        """For how long records have waited with nothing moving."""
        with self._lock:
            since = min(self._waiting_since.values(), default=None)
        return 0.0 if since is None else self._clock() - since

    def missing(self) -> dict[str, str]:
        """What is away, and why; empty when ready."""
        with self._lock:
            return dict(self._missing)

    @property
    def ready(self) -> bool:
        """Redis and Kafka answer and the partitions are assigned."""
        return not self.missing()

    @property
    def live(self) -> bool:
        """False once records waited for too long with nothing moving."""
        return self.stalled_seconds() < self._watchdog_seconds
