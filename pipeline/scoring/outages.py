"""What the log tells of a service that is away: that it went, each minute that it still is, that
it is back. Whoever calls it tells of each call here, and nothing else about it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from pipeline import logs

TELL_SECONDS = 60.0
"""Between two lines of an outage."""

TOLD_AT_ONCE_MAX = 3
"""A service that goes and comes is told of so many times in that time, and then once."""

log = logging.getLogger(__name__)


@dataclass
class _Outage:
    """Of one service; it is away while ``since`` is set."""

    since: float | None = None
    told: float = 0.0
    is_told: bool = False
    failures: int = 0
    why: str = ""
    begins: deque[float] = field(default_factory=lambda: deque(maxlen=TOLD_AT_ONCE_MAX))


class Outages:
    """Tells of outages in the log; called by any thread.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._outages: dict[str, _Outage] = {}

    def failed(self, service: str, why: str) -> None:
        """A call was not answered."""
        with self._lock:
            outage = self._outages.setdefault(service, _Outage())
            now = self._clock()
            if outage.since is None:
                outage.since = now
            outage.failures += 1
            outage.why = why or outage.why
            if not outage.is_told:
                if len(outage.begins) == TOLD_AT_ONCE_MAX and now - outage.begins[0] < TELL_SECONDS:
                    return
                outage.begins.append(now)
                outage.is_told, outage.told = True, now
                what = "a service does not answer; waiting for it"
                extra: dict[str, object] = {}
            elif now - outage.told >= TELL_SECONDS:
                outage.told = now
                what = "a service still does not answer"
                extra = _counts(service, outage, now)
            else:
                return
            why = outage.why
        log.warning(what, extra={"service": service, "why": why, **extra})

    def answered(self, service: str) -> None:
        """A call was answered."""
        with self._lock:
            outage = self._outages.get(service)
            if outage is None or outage.since is None:
                return
            extra = _counts(service, outage, self._clock())
            is_told, outage.is_told = outage.is_told, False
            outage.since, outage.failures = None, 0
        if is_told:
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
