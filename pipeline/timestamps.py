"""Rules for times in records: their unit, a record's own time, and clocks that are ahead.

Everything here is a function of the record alone, so that whoever computes a state again gets
the same one.
"""

from __future__ import annotations

from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from model.transaction import TIMESTAMP_MAX_MS
from pipeline.errors import SettingsError
from pipeline.units import DAY_MS

ANY_AGE_SECONDS = 1e11
"""A maximum age that bounds nothing, for workers that are given records of the past alone."""

_UNITS = (
    ("seconds", 10**8, 10**10, 1),
    ("microseconds", 10**14, 10**16, 10**6),
    ("nanoseconds", 10**17, 10**19, 10**9),
)
"""Other units than milliseconds: integers from, to, and how many make a second.

Each range is the years 1973 to 2286. As milliseconds the first one is January to April 1970, and
the others are past the year 5000: no payment's time is in two ranges.
"""

RECORD_TIME_MIN_MS = 10**11
RECORD_TIME_MAX_MS = 10**14
"""A CreateTime outside of 1973 to 5138 is none: it is -1 or 0, or in another unit."""


def other_unit(number: float) -> str | None:
    """Name the unit in which a number is a plausible time, with the year; None for milliseconds.

    >>> other_unit(1_534_327_200)
    'seconds (the year 2018)'
    >>> other_unit(1_534_327_200_000) is None
    True
    """
    for name, begin, end, per_second in _UNITS:
        if begin <= number < end:
            year = np.datetime64(int(number) // per_second, "s").astype("datetime64[Y]")
            return f"{name} (the year {year})"
    return None


def look_like_seconds(times_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell of each of n times whether a worker takes it for seconds."""
    _, begin, end, _ = _UNITS[0]
    result: NDArray[np.bool_] = (times_ms >= begin) & (times_ms < end)
    return result


def is_record_time(created_ms: int) -> bool:
    """Tell whether a record's CreateTime is a time; a producer may write none, or another unit."""
    return RECORD_TIME_MIN_MS <= created_ms < RECORD_TIME_MAX_MS


def are_record_times(created_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell the same of n records."""
    result: NDArray[np.bool_] = (created_ms >= RECORD_TIME_MIN_MS) & (
        created_ms < RECORD_TIME_MAX_MS
    )
    return result


def event_time(sent_ms: int, record_ms: int, tolerance_ms: int) -> int:
    """Event time that enters an account's features and state.

    A clock that is ahead moves it past the record's time by the tolerance at most. A record that
    came later than its event, as in every replay, changes nothing.

    >>> event_time(sent_ms=100, record_ms=70, tolerance_ms=10)
    80
    >>> event_time(sent_ms=100, record_ms=5_000, tolerance_ms=10)
    100
    """
    return min(sent_ms, record_ms + tolerance_ms)


def labelled_time(timestamp_ms: int, labelled_ms: int, day_ms: int = DAY_MS) -> int:
    """A label's time, where it may be a date: at midnight, on the day of the payment.

    Args:
        timestamp_ms: the payment's.
        labelled_ms: the label's.
        day_ms: how long after ``labelled_ms`` its day ends.

    Returns:
        the payment's time where the label is of the same day without a time; else ``labelled_ms``.
    """
    return timestamp_ms if labelled_ms < timestamp_ms < labelled_ms + day_ms else labelled_ms


def epoch_ms_of(text: str, option: str) -> int:
    """Epoch milliseconds of ISO 8601 with a zone, or of milliseconds.

    Args:
        option: which one it is of, for the message.

    Raises:
        SettingsError: it is no time.
    """
    if text.isascii() and text.isdigit():
        unit = other_unit(int(text))
        if unit is not None:
            raise SettingsError(f"{option} looks like {unit}; write milliseconds")
        if int(text) <= TIMESTAMP_MAX_MS:
            return int(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None or when.timestamp() < 0:
        raise SettingsError(
            f"{option} is no time: write it as 2024-05-31T18:00:00Z or in milliseconds since 1970"
        )
    return round(when.timestamp() * 1000)
