"""Rules for times in records: their unit, a record's own time, and clocks that are ahead.

Each function depends on the record alone. So a state that is computed again comes out the same.
"""

from __future__ import annotations

from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from model.transaction import TIMESTAMP_MAX_MS
from model.units import DAY_MS
from pipeline.errors import SettingsError

ANY_AGE_SECONDS = 1e11
"""A maximum age without effect, for workers that only get records of the past."""

_UNITS = (
    ("seconds", 10**8, 10**10, 1),
    ("microseconds", 10**14, 10**16, 10**6),
    ("nanoseconds", 10**17, 10**19, 10**9),
)
"""Units other than milliseconds: name, range of integers, and units per second.

Each range covers the years 1973 to 2286. Read as milliseconds, the first range is January to April
1970, and the others lie past the year 5000. So no payment's time is in two ranges.
"""

RECORD_TIME_MIN_MS = 10**11
RECORD_TIME_MAX_MS = 10**14
"""A CreateTime outside of 1973 to 5138 is no time: it is -1 or 0, or in another unit."""


def other_unit(number: float) -> str | None:
    """Name the other unit in which a number is a plausible time; None for milliseconds.

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
    """Tell for each of n times whether a worker takes it for seconds."""
    _, begin, end, _ = _UNITS[0]
    result: NDArray[np.bool_] = (times_ms >= begin) & (times_ms < end)
    return result


def is_record_time(created_ms: int) -> bool:
    """Tell whether a CreateTime is a time: a producer may write -1, or another unit."""
    return RECORD_TIME_MIN_MS <= created_ms < RECORD_TIME_MAX_MS


def are_record_times(created_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell for each of n records whether its CreateTime is a time."""
    result: NDArray[np.bool_] = (created_ms >= RECORD_TIME_MIN_MS) & (
        created_ms < RECORD_TIME_MAX_MS
    )
    return result


def event_time(sent_ms: int, record_ms: int, tolerance_ms: int) -> int:
    """Compute the event time for an account's features and state.

    A clock that is ahead moves it past the record's time by at most the tolerance. A record that
    comes later than its event, as in every replay, does not change it.

    >>> event_time(sent_ms=100, record_ms=70, tolerance_ms=10)
    80
    >>> event_time(sent_ms=100, record_ms=5_000, tolerance_ms=10)
    100
    """
    return min(sent_ms, record_ms + tolerance_ms)


def labelled_time(timestamp_ms: int, labelled_ms: int, day_ms: int = DAY_MS) -> int:
    """Correct a label's time that may be a date, at midnight of the payment's day.

    Args:
        timestamp_ms: the payment's time.
        labelled_ms: the label's time.
        day_ms: time from ``labelled_ms`` to the end of its day.

    Returns:
        the payment's time if the label is a date of the same day; else ``labelled_ms``.
    """
    return timestamp_ms if labelled_ms < timestamp_ms < labelled_ms + day_ms else labelled_ms


def epoch_ms_of(text: str, option: str) -> int:
    """Convert an option's ISO 8601 time with a zone, or milliseconds, to epoch milliseconds.

    Args:
        text: the option's value.
        option: its name, for the message.

    Raises:
        SettingsError: the text is no time.
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
