"""Log lines about a service's outage: its start, one line a minute, its end.

A caller reports each call here and logs nothing else about the service.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from pipeline import logs

LOG_SECONDS = 60.0
"""Time between two log lines about an outage."""

BURST_MAX = 3
"""Outages of a service that are logged within that time; later ones are logged once."""

log = logging.getLogger(__name__)


@dataclass
class _Outage:
    """State of one service; an outage lasts while ``since`` is set."""

    since: float | None = None
    logged_at: float = 0.0
    is_logged: bool = False
    failures: int = 0
    why: str = ""
    begins: deque[float] = field(default_factory=lambda: deque(maxlen=BURST_MAX))


class Outages:
    """Log of outages; any thread may call it.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._outages: dict[str, _Outage] = {}

    def failed(self, service: str, why: str) -> None:
        """Report a call without an answer."""
        with self._lock:
            outage = self._outages.setdefault(service, _Outage())
            now = self._clock()
            if outage.since is None:
                outage.since = now
            outage.failures += 1
            outage.why = why or outage.why
            if not outage.is_logged:
                if len(outage.begins) == BURST_MAX and now - outage.begins[0] < LOG_SECONDS:
                    return
                outage.begins.append(now)
                outage.is_logged, outage.logged_at = True, now
                what = "a service does not answer; waiting for it"
                extra: dict[str, object] = {}
            elif now - outage.logged_at >= LOG_SECONDS:
                outage.logged_at = now
                what = "a service still does not answer"
                extra = _counts(service, outage, now)
            else:
                return
            why = outage.why
        log.warning(what, extra={"service": service, "why": why, **extra})

    def answered(self, service: str) -> None:
        """Report an answered call."""
        with self._lock:
            outage = self._outages.get(service)
            if outage is None or outage.since is None:
                return
            extra = _counts(service, outage, self._clock())
            is_logged, outage.is_logged = outage.is_logged, False
            outage.since, outage.failures = None, 0
        if is_logged:
            log.info("it answers again", extra={"service": service, **extra})


def _counts(service: str, outage: _Outage, now: float) -> dict[str, object]:
    assert outage.since is not None
    counts: dict[str, object] = {
        "seconds": round(now - outage.since, 1),
        "failures": outage.failures,
    }
    library_lines = logs.take_dropped(service)
    if library_lines:
        counts["library_lines"] = library_lines
    return counts
