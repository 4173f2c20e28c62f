"""Health for `/live` and `/ready`, with an injected clock."""

from __future__ import annotations

import pytest

from pipeline.scoring.health import Health
from tests.fakes.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(watchdog_seconds=10.0, clock=clock)


def test_a_new_worker_is_ready_only_once_redis_kafka_and_partitions_are_there(
    health: Health,
) -> None:
    for part in ("redis", "kafka", "partitions"):
        assert not health.ready
        assert part in health.missing()
        health.up(part)

    assert health.ready
    assert health.missing() == {}


@pytest.mark.parametrize("part", ["redis", "kafka", "partitions", "worker"])
def test_a_part_that_fails_is_named_until_it_works(health: Health, part: str) -> None:
    for everything in ("redis", "kafka", "partitions"):
        health.up(everything)

    health.down(part, "gone")
    assert not health.ready
    assert health.missing() == {part: "gone"}

    health.up(part)
    assert health.ready


def test_an_idle_worker_stays_alive(health: Health, clock: Clock) -> None:
    health.records_wait(False)
    clock.now_seconds += 1e6

    assert health.live
    assert health.stalled_seconds() == 0


def test_a_worker_without_progress_is_not_alive_after_the_watchdog_time(
    health: Health, clock: Clock
) -> None:
    health.records_wait(True)
    clock.now_seconds += 9.9
    assert health.live
    assert health.stalled_seconds() == pytest.approx(9.9)

    clock.now_seconds += 0.1
    assert not health.live


def test_another_check_does_not_restart_the_wait(health: Health, clock: Clock) -> None:
    for _ in range(11):
        health.records_wait(True)
        clock.now_seconds += 1

    assert not health.live


def test_each_micro_batch_restarts_the_wait(health: Health, clock: Clock) -> None:
    health.records_wait(True)
    for _ in range(100):
        clock.now_seconds += 9
        health.moved()
        health.records_wait(True)
        assert health.live

    clock.now_seconds += 10
    assert not health.live


def test_a_wait_that_ended_is_forgotten(health: Health, clock: Clock) -> None:
    health.records_wait(True)
    clock.now_seconds += 9
    health.records_wait(False)
    clock.now_seconds += 9
    health.records_wait(True)
    clock.now_seconds += 9

    assert health.live


def test_a_worker_without_redis_is_alive(health: Health, clock: Clock) -> None:
    """Without Redis a worker is not ready; only waiting records end it."""
    health.down("redis", "gone")
    clock.now_seconds += 1e6

    assert health.live


def test_progress_of_labels_does_not_hide_stalled_transactions(
    health: Health, clock: Clock
) -> None:
    health.records_wait(True)
    health.records_wait(True, "labels")
    clock.now_seconds += 6
    health.moved("labels")
    clock.now_seconds += 6

    assert health.stalled_seconds() == 12
    assert not health.live

    health.moved()
    assert health.stalled_seconds() == 6
    health.records_wait(False, "labels")
    assert health.stalled_seconds() == 0
