"""Health of the worker: alive, ready, and the time since the last progress."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from pipeline.scoring.outages import Outages

SERVICES = frozenset({"redis", "kafka"})
"""Services whose outages are logged."""


class Health:
    """Health as `/live` and `/ready` report it; worker and monitors write it, any thread reads it.

    Args:
        watchdog_seconds: the worker is not alive if records wait this long without progress.
        clock: monotonic seconds.
    """

    def __init__(self, watchdog_seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self._watchdog_seconds = watchdog_seconds
        self._clock = clock
        self._outages = Outages(clock)
        self._lock = threading.Lock()
        self._missing = {"redis": "not reached yet", "kafka": "not reached yet",
                         "partitions": "not assigned yet"}  # fmt: skip
        self._waiting_since: dict[str, float] = {}  # by kind of record

    def up(self, part: str) -> None:
        """Report that ``part`` (redis, kafka, partitions, worker, ...) works."""
        with self._lock:
            self._missing.pop(part, None)
        self._outages.answered(part)

    def down(self, part: str, why: str, error: str = "") -> None:
        """Report that ``part`` does not work.

        Args:
            why: reason, for `/ready`.
            error: error of the failed call, for the log.
        """
        with self._lock:
            self._missing[part] = why
        if part in SERVICES:
            self._outages.failed(part, error)

    def moved(self, what: str = "transactions") -> None:
        """Report progress: a micro-batch was applied, or labels were recorded."""
        with self._lock:
            if what in self._waiting_since:
                self._waiting_since[what] = self._clock()

    def records_wait(self, waiting: bool, what: str = "transactions") -> None:
        """Report whether a log holds records that are not applied yet."""
        with self._lock:
            if not waiting:
                self._waiting_since.pop(what, None)
            else:
                self._waiting_since.setdefault(what, self._clock())

    def stalled_seconds(self) -> float:
        """Return how long records have waited without progress."""
        with self._lock:
            since = min(self._waiting_since.values(), default=None)
        return 0.0 if since is None else self._clock() - since

    def missing(self) -> dict[str, str]:
        """Return the parts that do not work, with the reason; empty when ready."""
        with self._lock:
            return dict(self._missing)

    @property
    def ready(self) -> bool:
        """Whether Redis and Kafka answer and partitions are assigned."""
        return not self.missing()

    @property
    def live(self) -> bool:
        """Whether records are processed; False after a wait that is too long."""
        return self.stalled_seconds() < self._watchdog_seconds
