"""The schedule of retries: delays, jitter, and the pace of an endpoint that asks for patience."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime

from model.units import HOUR_SECONDS, MINUTE_SECONDS

RETRY_DELAYS_SECONDS: tuple[float, ...] = (
    0,
    5,
    5 * MINUTE_SECONDS,
    30 * MINUTE_SECONDS,
    2 * HOUR_SECONDS,
    5 * HOUR_SECONDS,
    10 * HOUR_SECONDS,
    14 * HOUR_SECONDS,
    20 * HOUR_SECONDS,
    24 * HOUR_SECONDS,
)
"""Delay before each attempt, counted from the failure before it, seconds. After the last attempt
the alert becomes a dead letter. It is the schedule of Standard Webhooks 1.0.0."""

JITTER_SHARE = 0.2
"""Largest random share that is added to a delay, so that retries of one outage spread."""

RETRY_AFTER_MAX_SECONDS = float(HOUR_SECONDS)
"""Longest wait that an endpoint's Retry-After can ask for, seconds."""

SLOW_MIN_SECONDS = 1.0
"""Pause of an endpoint after a first 429, 502, 503 or 504 without Retry-After, seconds."""

SLOW_MAX_SECONDS = 5.0 * MINUTE_SECONDS
"""Longest such pause. It doubles with each further one, until a delivery succeeds, seconds."""

_DIGITS_MAX = 9


class RetrySchedule:
    """The times of an alert's attempts.

    Args:
        delays_seconds: delay before each attempt, the first one included.
        chance: returns a random number in [0, 1).
    """

    def __init__(
        self,
        delays_seconds: Sequence[float] = RETRY_DELAYS_SECONDS,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._delays_seconds = delays_seconds
        self._chance = chance

    def next_due(self, failed: int, now: float, not_before: float = 0.0) -> float | None:
        """Return the time of the next attempt, epoch seconds; None after the last one.

        Args:
            failed: attempts that have failed, at least 1.
            now: wall clock, epoch seconds.
            not_before: earliest time that the endpoint asked for, epoch seconds.
        """
        if failed >= len(self._delays_seconds):
            return None
        delay = self._delays_seconds[failed]
        return max(now + delay * (1 + JITTER_SHARE * self._chance()), not_before)


class Pace:
    """The pause of an endpoint that answers 429, 502, 503 or 504."""

    def __init__(self) -> None:
        self._pause_seconds = 0.0
        self.until = 0.0

    def slow_down(self, now: float, retry_after_seconds: float | None) -> float:
        """Begin a pause, or prolong it; return its end, epoch seconds.

        Args:
            now: wall clock, epoch seconds.
            retry_after_seconds: what the endpoint asked for; at most
                :data:`RETRY_AFTER_MAX_SECONDS` count.
        """
        if now >= self.until:  # answers of attempts that were under way count as one
            doubled = max(SLOW_MIN_SECONDS, 2 * self._pause_seconds)
            self._pause_seconds = min(doubled, SLOW_MAX_SECONDS)
        asked = min(retry_after_seconds or 0.0, RETRY_AFTER_MAX_SECONDS)
        self.until = max(self.until, now + max(self._pause_seconds, asked))
        return self.until

    def succeed(self) -> None:
        """Reset the length of the next pause: a delivery succeeded."""
        self._pause_seconds = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether no delivery has succeeded since the last pause."""
        return self._pause_seconds > 0


def retry_after_seconds(header: str | None, now: float | None = None) -> float | None:
    """Read a Retry-After header: seconds, or a date. None for anything else.

    Args:
        header: its value.
        now: wall clock, epoch seconds; by default the time.

    >>> retry_after_seconds("120")
    120.0
    >>> retry_after_seconds("Thu, 01 Jan 1970 00:02:00 GMT", now=60.0)
    60.0
    >>> retry_after_seconds("soon") is None
    True
    """
    text = (header or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:_DIGITS_MAX])
    try:
        date = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, date - (time.time() if now is None else now))
