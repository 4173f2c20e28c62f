"""What a record says that cannot be so is told: units, clocks that are off, ids that come again."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RejectedError, SettingsError
from pipeline.messages.decoding import payment_ms
from pipeline.messages.labels import decode_label
from pipeline.messages.scores import decode_score
from pipeline.messages.transactions import HISTORY_HEADER, WARM_HEADER
from pipeline.scoring import retry as patience_module
from pipeline.scoring.labels import label_of
from pipeline.scoring.scorer import id_hashes
from pipeline.timestamps import epoch_ms_of, event_time, other_unit
from tests.fakes.memory import MemoryRecord
from tests.fakes.memory_verify import verify_world
from tests.fakes.memory_workers import DAY_MS, START_MS, MemoryWorker, World, finish

HOUR_MS = 3_600_000
PAID_MS = 1_534_327_200_000
"""2018-08-15T10:00:00Z."""

NO_TIME_MS = -1
"""The CreateTime of a record whose producer gives none."""


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrier asks again at once: no test here has an event loop that could wait."""
    monkeypatch.setattr(patience_module, "RETRY_SECONDS", (0,))


def applied(world: World) -> MemoryWorker:
    """A worker that has worked to the end of the log; what it made is what must come of it."""
    worker = world.worker()
    finish(worker.run())
    world.assert_all_applied()
    assert verify_world(world).is_right
    return worker


def pauses(world: World, partition: int = 0) -> list[float | None]:
    """The pause before each transaction, in the order of the log."""
    return [
        decode_score(value).features["seconds_since_last"]
        for _, (value,) in sorted(world.scores(partition).items())
    ]


# units -----------------------------------------------------------------------------------

UNITS = [
    (PAID_MS // 1000, "seconds (the year 2018)"),
    (PAID_MS * 1000, "microseconds (the year 2018)"),
    (PAID_MS * 1_000_000, "nanoseconds (the year 2018)"),
    (946_684_800, "seconds (the year 2000)"),
    (4_102_444_800, "seconds (the year 2100)"),
]


@pytest.mark.parametrize("field", ["timestamp", "labelled_at"])
@pytest.mark.parametrize(("number", "unit"), UNITS)
def test_a_time_in_another_unit_is_rejected_and_the_unit_named(
    number: int, unit: str, field: str
) -> None:
    label = {
        "transaction_id": "t",
        "account_id": "A",
        "merchant_id": "m1",
        "label": "fraud",
        "timestamp": PAID_MS,
        "labelled_at": PAID_MS,
    }

    for written in (number, f"{number}", number + 0.25):
        with pytest.raises(RejectedError) as caught:
            decode_label(b"m1", json.dumps(label | {field: written}).encode())
        assert caught.value.reason == "timestamp_unit"
        assert str(caught.value) == f"the {field} looks like {unit}; send milliseconds"


@pytest.mark.parametrize(("number", "unit"), UNITS)
def test_transactions_in_another_unit_go_to_dead_letter_and_change_no_state(
    number: int, unit: str
) -> None:
    """By no setting of how old a transaction may be."""
    world = World(topic_partitions=1, max_timestamp_age_seconds=1e11)
    world.produce("A")
    world.produce("A", timestamp=number)
    world.produce("A")

    worker = world.worker()
    finish(worker.run())

    assert sorted(world.scores(0)) == [0, 2]
    assert pauses(world) == [-1.0, 120.0]
    assert world.dead_letters() == {(0, 1, "timestamp_unit"): 1}
    (letter,) = world.kafka.records(world.settings.topic("dead_letter"))
    error = f"the timestamp looks like {unit}; send milliseconds"
    assert dict(letter.headers)["error"] == error.encode()
    assert worker.count("recur_rejected_total", reason="timestamp_unit") == 1


@given(st.integers(10**11, 10**14 - 1))
def test_no_time_of_this_age_is_taken_for_another_unit(ms: int) -> None:
    assert other_unit(ms) is None
    assert payment_ms(ms) == ms


@pytest.mark.parametrize("option", ["1534327200", "1534327200000000"])
def test_a_time_on_the_command_line_in_another_unit_is_refused(option: str) -> None:
    with pytest.raises(SettingsError, match=r"--time looks like .*seconds .* write milliseconds"):
        epoch_ms_of(option, "--time")


# age -------------------------------------------------------------------------------------


def test_a_live_transaction_may_be_as_old_as_the_setting_says() -> None:
    world = World(topic_partitions=1, max_timestamp_age_seconds=3600)
    now_ms = world.now_ms + 60_000
    world.produce("A", timestamp=now_ms - HOUR_MS)
    world.produce("A", timestamp=now_ms - HOUR_MS - 1)

    finish(world.worker().run())

    assert sorted(world.scores(0)) == [0]
    assert world.dead_letters() == {(0, 1, "old_timestamp"): 1}


@pytest.mark.parametrize("header", [HISTORY_HEADER, WARM_HEADER])
def test_history_says_that_it_is_history_and_may_be_of_any_age(header: str) -> None:
    world = World(topic_partitions=1, max_timestamp_age_seconds=3600)
    world.produce("A", timestamp=PAID_MS, headers=[(header, b"1")])
    world.produce("A", timestamp=PAID_MS + 1000, headers=[("other", b""), (header, b"1")])

    worker = world.worker()
    finish(worker.run())

    assert pauses(world) == [-1.0, 1.0]
    assert not world.dead_letters()
    assert worker.count("recur_event_time_skew_total", direction="behind") == 0


def test_a_time_that_nobody_set_is_rejected_by_default_and_a_log_of_ten_years_is_not() -> None:
    world = World(topic_partitions=1)
    for text in ("1970-01-01T00:00:00Z", "1900-01-01T00:00:00Z", "0001-01-01T00:00:00Z"):
        world.produce("A", timestamp=text)
    world.produce("A", timestamp=0)
    world.produce("A", timestamp=START_MS - 3650 * DAY_MS)

    finish(world.worker().run())

    reasons = [reason for _, _, reason in sorted(world.dead_letters())]
    assert reasons == ["old_timestamp", "timestamp", "timestamp", "old_timestamp"]
    assert sorted(world.scores(0)) == [4]


# clocks that are off ---------------------------------------------------------------------


def test_a_clock_ahead_moves_its_account_by_the_tolerance_alone_and_is_counted() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce("A", timestamp=world.now_ms + 60_000 + 20 * HOUR_MS)
    sent_ms = world.now_ms + 20 * HOUR_MS
    for _ in range(10):
        world.produce("A")

    worker = applied(world)

    # The tolerance of 5 minutes is 5 transactions a minute apart; then its pauses go on.
    assert pauses(world) == [-1.0, 360.0] + [0.0] * 5 + [60.0] * 5
    ((_, (ahead,)),) = [item for item in world.scores(0).items() if item[0] == 1]
    assert decode_score(ahead).timestamp == sent_ms, "it is published as it was sent"
    assert worker.count("recur_event_time_skew_total", direction="ahead") == 1
    assert worker.count("recur_event_time_skew_total", direction="behind") == 0


def test_a_late_transaction_is_scored_and_counted() -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce("A", timestamp=world.now_ms - 5 * HOUR_MS)
    world.produce("A")

    worker = applied(world)

    assert pauses(world) == [-1.0, 0.0, 120.0]
    assert worker.count("recur_event_time_skew_total", direction="behind") == 1


def test_a_replay_faster_than_its_times_is_what_it_was() -> None:
    """Its records come long after their events: no time is changed."""
    assert event_time(PAID_MS, START_MS, 0) == PAID_MS


@pytest.mark.parametrize("record_ms", [NO_TIME_MS, 0, START_MS // 1000, START_MS * 1000])
def test_a_record_whose_time_is_none_counts_as_of_its_event(record_ms: int) -> None:
    world = World(topic_partitions=1)
    world.produce("A")
    world.produce("A", record_ms=record_ms)
    world.produce("A")

    worker = applied(world)

    assert pauses(world) == [-1.0, 60.0, 60.0]
    assert not world.dead_letters()
    assert worker.count("recur_score_latency_seconds_count") == 2, "its latency is not known"
    for direction in ("ahead", "behind"):
        assert worker.count("recur_event_time_skew_total", direction=direction) == 0


def test_a_record_without_time_cannot_set_its_account_s_clock_far_ahead() -> None:
    world = World(topic_partitions=1)
    world.produce("A", record_ms=NO_TIME_MS, timestamp="9999-12-31T00:00:00Z")
    world.produce("A")

    finish(world.worker().run())

    assert world.dead_letters() == {(0, 0, "future_timestamp"): 1}
    assert pauses(world) == [-1.0]


def test_a_label_in_a_record_without_time_is_taken() -> None:
    label = b"""{"transaction_id":"t","account_id":"A","merchant_id":"m1","label":"fraud",
        "timestamp":%d,"labelled_at":%d}""" % (PAID_MS, PAID_MS + DAY_MS)

    found = label_of(MemoryRecord(0, NO_TIME_MS, b"m1", label, ()), DAY_MS)

    assert found[1:] == (PAID_MS, PAID_MS + DAY_MS)
    far = label.replace(b"%d}" % (PAID_MS + DAY_MS), b'"9998-01-01T00:00:00Z"}')
    with pytest.raises(RejectedError, match="past the record's time"):
        label_of(MemoryRecord(0, NO_TIME_MS, b"m1", far, ()), DAY_MS)


# latency ---------------------------------------------------------------------------------


def test_latency_is_never_negative_and_records_stamped_ahead_are_counted() -> None:
    world = World(topic_partitions=1)
    world.produce("A", record_ms=world.now_ms + 10 * HOUR_MS)
    world.produce("A")
    world.now_ms += 2_000

    worker = applied(world)

    assert worker.count("recur_score_latency_seconds_count") == 2
    assert worker.count("recur_score_latency_seconds_sum") == 2.0
    assert worker.count("recur_record_clock_skew_total") == 1


def test_records_of_a_copied_log_are_no_latency() -> None:
    world = World(topic_partitions=1)
    for age_ms in (400 * DAY_MS, DAY_MS + 1, DAY_MS):
        then = world.now_ms + 60_000 - age_ms
        world.produce("A", timestamp=then, record_ms=then)
        world.now_ms -= 60_000
    world.now_ms += 60_000

    worker = applied(world)

    assert len(world.scores(0)) == 3
    assert worker.count("recur_score_latency_seconds_count") == 1
    assert worker.count("recur_score_latency_seconds_sum") == DAY_MS / 1000


# ids that come again ---------------------------------------------------------------------

ANOTHER: list[dict[str, Any]] = [
    {"amount": 20.01},
    {"merchant_id": "m2"},
    {"timestamp": START_MS + 1},
]


@pytest.mark.parametrize("changes", ANOTHER, ids=lambda changes: next(iter(changes)))
def test_an_id_with_another_content_is_another_payment(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    world = World(topic_partitions=1)
    world.produce("A", "1", timestamp=START_MS)
    world.produce("A", "1", **{"timestamp": START_MS} | changes)
    world.produce("A", "1", timestamp=START_MS)  # the first one again

    worker = applied(world)

    assert sorted(world.scores(0)) == [0, 1]
    assert worker.count("recur_id_conflicts_total") == 1
    assert worker.count("recur_duplicate_transactions_total") == 1
    (line,) = [r for r in caplog.records if "another content" in r.getMessage()]
    assert line.levelno == logging.WARNING
    assert vars(line) | {"topic": "transactions", "partition": 0, "offset": 1} == vars(line)


def test_what_is_written_another_way_is_the_same_content() -> None:
    world = World(topic_partitions=1)
    world.produce("A", "1", timestamp=PAID_MS, amount=20)
    world.produce("A", "1", timestamp="2018-08-15T12:00:00+02:00", amount=20.0, category="5411")

    worker = world.worker()
    finish(worker.run())

    assert sorted(world.scores(0)) == [0]
    assert worker.count("recur_duplicate_transactions_total") == 1
    assert worker.count("recur_id_conflicts_total") == 0


def test_a_repeat_is_one_though_its_clock_was_ahead_and_it_came_later() -> None:
    """Its event time in the features depends on the record's, its content does not."""
    world = World(topic_partitions=1)
    ahead_ms = world.now_ms + 20 * HOUR_MS
    for _ in range(2):
        world.produce("A", "1", timestamp=ahead_ms)

    worker = applied(world)

    assert worker.count("recur_duplicate_transactions_total") == 1
    assert worker.count("recur_id_conflicts_total") == 0


def test_ids_that_restart_each_day_lose_nothing() -> None:
    world = World(topic_partitions=1)
    for _ in range(10):
        for number in range(3):
            world.produce("A", f"{number}", amount=10.0 + number)
        world.now_ms += DAY_MS

    worker = applied(world)

    assert len(world.scores(0)) == 30
    assert worker.count("recur_id_conflicts_total") == 27


def test_a_conflict_is_rejected_where_the_setting_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(topic_partitions=1, id_conflicts="reject")
    world.produce("A", "1", amount=20.0)
    world.produce("A", "1", amount=21.0)
    world.produce("A", "2")

    worker = applied(world)

    assert sorted(world.scores(0)) == [0, 2]
    assert world.dead_letters() == {(0, 1, "id_conflict"): 1}
    assert pauses(world) == [-1.0, 120.0]
    assert worker.count("recur_id_conflicts_total") == 1
    assert worker.count("recur_rejected_total", reason="id_conflict") == 1


def test_conflicts_are_told_once_a_minute_with_their_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(topic_partitions=1, micro_batch_max=1)
    for number in range(50):
        world.produce("A", "1", amount=number)
        world.now_ms -= 59_900
    worker = world.worker()
    finish(worker.run())
    world.now_ms += 61_000
    world.produce("A", "1", amount=60)
    finish(worker.run())

    counts = [vars(r)["records"] for r in caplog.records if "another content" in r.getMessage()]
    assert counts == [1, 49]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_hashes_are_equal_where_id_and_content_are(rows: list[tuple[int, int, int]]) -> None:
    """And no hash is that of an empty place."""
    ids, amounts, times = np.array(rows, np.int64).reshape(-1, 3).T
    spread = np.array([0, 2**63, 2**32, 1], np.uint64)
    merchants = np.zeros(len(ids), np.uint64)

    found = id_hashes(spread[ids], merchants, amounts.astype(np.float64), times)

    assert (found != 0).all()
    halves = [int(spread[i]) >> 32 for i in ids]
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            same = halves[i] == halves[j] and row[1:] == other[1:]
            assert (found[i] == found[j]) == same


def test_minus_zero_is_zero() -> None:
    one = np.ones(2, np.uint64)
    found = id_hashes(one, one, np.array([0.0, -0.0]), np.zeros(2, np.int64))
    assert found[0] == found[1]


# labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timestamp", "labelled_at", "times"),
    [
        (PAID_MS, "2018-08-15", (PAID_MS, PAID_MS)),
        (PAID_MS, "2018-08-15T00:00:00Z", (PAID_MS, PAID_MS)),
        (PAID_MS, "2018-08-15T00:00:00+02:00", (PAID_MS, PAID_MS)),
        (PAID_MS, PAID_MS // DAY_MS * DAY_MS, (PAID_MS, PAID_MS)),
        ("2018-08-15", "2018-08-15", (PAID_MS - 10 * HOUR_MS, PAID_MS - 10 * HOUR_MS)),
        ("2018-08-15", PAID_MS, (PAID_MS - 10 * HOUR_MS, PAID_MS)),
        # Of a day that began earlier than in UTC, or ends later.
        ("2018-08-15", PAID_MS - 12 * HOUR_MS, (PAID_MS - 12 * HOUR_MS, PAID_MS - 12 * HOUR_MS)),
        (PAID_MS + 20 * HOUR_MS, "2018-08-15", (PAID_MS + 20 * HOUR_MS, PAID_MS + 20 * HOUR_MS)),
        (PAID_MS, "2018-08-16", (PAID_MS, PAID_MS + 14 * HOUR_MS)),
        (PAID_MS, "2018-08-13", None),
        (PAID_MS, "2018-08-14T00:00:00Z", None),
        (PAID_MS, "2018-08-15T00:00:01Z", None),
        ("2018-08-15", "2018-08-14", None),
        (PAID_MS, "2018-02-30", None),
        ("1969-12-31", PAID_MS, None),
    ],
)
def test_a_date_on_the_day_of_the_payment_is_not_before_it(
    timestamp: int | str, labelled_at: int | str, times: tuple[int, int] | None
) -> None:
    label = {
        "transaction_id": "t",
        "account_id": "A",
        "merchant_id": "m1",
        "label": "fraud",
        "timestamp": timestamp,
        "labelled_at": labelled_at,
    }
    value = json.dumps(label).encode()

    if times is None:
        with pytest.raises(RejectedError, match=r"labelled_at|timestamp"):
            decode_label(b"m1", value)
    else:
        assert decode_label(b"m1", value)[1:] == times
