"""Rate limits of keys: their notation, and the headers that tell a client about them.

Header syntax: draft-ietf-httpapi-ratelimit-headers-11.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from pipeline.gateway.problems import Headers

QUOTA_MAX = 10_000_000
"""Most requests in a window."""

WINDOW_MAX_SECONDS = 86_400
"""Longest window, seconds."""

PER_SECOND_MAX = 100_000
"""Highest rate, requests per second. Redis counts in microseconds."""

POLICY = "key"
"""Name of the policy in the headers."""

UNITS = {"s": 1, "min": 60, "h": 3_600, "day": 86_400}
_RATE = re.compile(r"(\d{1,8})/(\d{0,5})(s|min|h|day)")


@dataclass(frozen=True)
class Rate:
    """A number of requests in a window of time.

    Attributes:
        quota: requests; a key that was silent for a window may send them all at once.
        window_seconds: the window.
    """

    quota: int
    window_seconds: int

    def __str__(self) -> str:
        return f"{self.quota}/{self.window_seconds}s"


@functools.lru_cache(maxsize=1_024)
def parse_rate(text: str) -> Rate | None:
    """Parse ``100/s``, ``5000/10min`` or ``none``.

    Returns:
        the rate; None for ``none``, which is no limit.

    Raises:
        ValueError: the text is no rate, or one out of bounds.

    >>> parse_rate("6000/min")
    Rate(quota=6000, window_seconds=60)
    """
    if text == "none":
        return None
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError("a rate is written 100/s, 6000/min, 5000/10min, or none for no limit")
    rate = Rate(int(found[1]), int(found[2] or 1) * UNITS[found[3]])
    if not (
        0 < rate.quota <= QUOTA_MAX
        and 0 < rate.window_seconds <= WINDOW_MAX_SECONDS
        and rate.quota <= PER_SECOND_MAX * rate.window_seconds
    ):
        raise ValueError(
            f"a rate has 1 to {QUOTA_MAX} requests in at most {WINDOW_MAX_SECONDS} s, and at most"
            f" {PER_SECOND_MAX} a second"
        )
    return rate


@dataclass(frozen=True)
class RateDecision:
    """The answer of a rate limit.

    Attributes:
        rate: the limit.
        allowed: whether the request may be served.
        remaining: requests that may follow at once.
        reset_seconds: time until more are allowed; for a refused request until it is.
    """

    rate: Rate
    allowed: bool
    remaining: int
    reset_seconds: float

    def headers(self) -> Headers:
        """Return the response headers.

        >>> RateDecision(Rate(100, 60), True, 99, 0.6).headers()
        ((b'ratelimit-policy', b'"key";q=100;w=60'), (b'ratelimit', b'"key";r=99;t=1'))
        """
        rate, wait = self.rate, math.ceil(self.reset_seconds)
        policy = f'"{POLICY}";q={rate.quota};w={rate.window_seconds}'
        state = f'"{POLICY}";r={self.remaining};t={wait}'
        return (b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())
