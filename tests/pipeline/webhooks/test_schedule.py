"""The table of retries, its jitter, and the pace of an endpoint that asks for patience."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.webhooks.schedule import (
    JITTER_SHARE,
    RETRY_AFTER_MAX_SECONDS,
    RETRY_DELAYS_SECONDS,
    SLOW_MAX_SECONDS,
    SLOW_MIN_SECONDS,
    Pace,
    RetrySchedule,
    retry_after_seconds,
)

NOW = 1_700_000_000.0


def test_the_first_retries_are_those_of_standard_webhooks() -> None:
    assert RETRY_DELAYS_SECONDS[:5] == (0, 5, 300, 1800, 7200)
    assert all(a < b for a, b in itertools.pairwise(RETRY_DELAYS_SECONDS))


@given(st.integers(1, len(RETRY_DELAYS_SECONDS) - 1), st.floats(0, 1, exclude_max=True))
def test_a_retry_is_never_early_and_at_most_the_jitter_late(failed: int, chance: float) -> None:
    due = RetrySchedule(chance=lambda: chance).next_due(failed, NOW)

    delay = RETRY_DELAYS_SECONDS[failed]
    assert due is not None
    assert delay <= due - NOW <= delay * (1 + JITTER_SHARE)


def test_retries_of_one_outage_spread() -> None:
    schedule = RetrySchedule()

    assert len({schedule.next_due(2, NOW) for _ in range(50)}) > 40


def test_after_the_last_attempt_there_is_none() -> None:
    assert RetrySchedule().next_due(len(RETRY_DELAYS_SECONDS), NOW) is None


def test_a_retry_waits_as_long_as_the_endpoint_asks() -> None:
    assert RetrySchedule().next_due(1, NOW, NOW + 900) == NOW + 900


def test_pauses_double_up_to_a_limit_and_a_success_ends_them() -> None:
    pace, now, pauses = Pace(), NOW, []
    for _ in range(12):
        until = pace.slow_down(now, None)
        pauses.append(until - now)
        now = until
    assert pauses[:3] == [SLOW_MIN_SECONDS, 2 * SLOW_MIN_SECONDS, 4 * SLOW_MIN_SECONDS]
    assert pauses[-1] == SLOW_MAX_SECONDS
    assert pace.is_slow

    pace.succeed()

    assert not pace.is_slow
    assert pace.slow_down(now, None) - now == SLOW_MIN_SECONDS


def test_answers_of_attempts_that_were_under_way_count_as_one() -> None:
    pace = Pace()
    ends = {pace.slow_down(NOW + i / 100, None) for i in range(8)}

    assert max(ends) - NOW < 2 * SLOW_MIN_SECONDS


def test_an_endpoint_cannot_ask_for_a_pause_without_end() -> None:
    assert Pace().slow_down(NOW, 10.0**9) == NOW + RETRY_AFTER_MAX_SECONDS


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("9" * 400, 999_999_999.0),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
        ("Tue, 14 Nov 2000 22:14:20 GMT", 0.0),
        ("-5", None),
        ("²", None),
        ("", None),
        (None, None),
        ("Tue, 99 Nov 2023", None),
    ],
)
def test_retry_after_is_read_or_left_out(header: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(header, NOW) == seconds


@given(st.text(max_size=50))
def test_no_retry_after_raises(header: str) -> None:
    found = retry_after_seconds(header, NOW)

    assert found is None or found >= 0
