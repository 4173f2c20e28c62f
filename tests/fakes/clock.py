"""A clock that a test sets."""

from __future__ import annotations


class Clock:
    """A clock of monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now_seconds = 1000.0

    def __call__(self) -> float:
        return self.now_seconds
