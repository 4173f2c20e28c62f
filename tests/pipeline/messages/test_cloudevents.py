"""Headers of events, as the CloudEvents project's own library reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from model.transaction import ID_MAX_CHARACTERS, TIMESTAMP_MAX_MS
from pipeline.kafka.message_limits import LARGEST_OUTPUT_BYTES
from pipeline.messages.cloudevents import (
    ALERT_TYPE,
    SCORE_TYPE,
    EventHeaders,
    alert_events,
    event_source,
    score_events,
)
from pipeline.settings import load_settings

LOG_ID = bytes(range(16))
HEADERS_MAX_BYTES = LARGEST_OUTPUT_BYTES // 4


def read(headers: tuple[tuple[str, bytes], ...]) -> CloudEvent:
    """Read the headers of a record with a key and a value, in binary mode."""
    names = [name for name, _ in headers]
    assert len(set(names)) == len(names)
    event = from_kafka(KafkaMessage(dict(headers), b"A1", b'{"score":0.5}'), JSONFormat())
    assert isinstance(event, CloudEvent)
    return event


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**62),
            st.integers(0, TIMESTAMP_MAX_MS),
            st.text(min_size=1, max_size=ID_MAX_CHARACTERS),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_the_reference_library_reads_every_event(events: list[tuple[int, int, str]]) -> None:
    offsets, times_ms, ids = zip(*events, strict=True)

    built = EventHeaders(ALERT_TYPE, "pay", "alarm").of(7, LOG_ID, offsets, times_ms, ids)

    for headers, offset, time_ms, transaction_id in zip(built, offsets, times_ms, ids, strict=True):
        event = read(headers)
        assert event.get_specversion() == "1.0"
        assert event.get_type() == "recur.alert.v1"
        assert event.get_source() == "/recur/pay/AAECAwQFBgcICQoLDA0ODw/alarm"
        assert event.get_id() == f"pay:7:{offset}"
        assert event.get_time() == datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=time_ms)
        assert event.get_datacontenttype() == "application/json"
        assert event.get_data() == {"score": 0.5}
        assert event.get_subject() == (transaction_id if transaction_id.isprintable() else None)
        assert event.get_attributes()["partitionkey"] == "A1"


def test_a_subject_has_no_character_that_cloudevents_forbids() -> None:
    forbidden = ["\x00", "\x1f", "\x7f", "\x9f", "\ufdd0", "\ufffe", "\U0001ffff"]
    ids = [f"t{character}" for character in forbidden]
    numbers = list(range(len(ids)))

    built = EventHeaders(SCORE_TYPE, "t", "s").of(0, LOG_ID, numbers, numbers, ids)

    assert all("ce_subject" not in dict(headers) for headers in built)


def test_the_largest_headers_leave_room_for_the_value() -> None:
    topic = "x" * 249
    headers = EventHeaders(SCORE_TYPE, topic, topic).of(
        99_999, LOG_ID, [10**18], [TIMESTAMP_MAX_MS], ["\N{GRINNING FACE}" * ID_MAX_CHARACTERS]
    )

    assert sum(len(name) + len(value) for name, value in headers[0]) < HEADERS_MAX_BYTES


def test_a_topic_made_again_and_another_output_are_other_sources() -> None:
    sources = {
        event_source("t", log_id, output)
        for log_id in (bytes(16), LOG_ID, b"\xff" * 16)
        for output in ("scores", "alerts")
    }

    assert len(sources) == 6


@pytest.mark.parametrize(
    ("settings", "scores", "alerts"),
    [
        ({}, False, True),
        ({"cloudevents_scores": True}, True, True),
        ({"cloudevents_alerts": False}, False, False),
    ],
)
def test_alerts_are_events_by_default_and_scores_are_not(
    settings: dict[str, bool], scores: bool, alerts: bool
) -> None:
    made = load_settings(**settings)

    assert (score_events(made) is not None) == scores
    assert (alert_events(made) is not None) == alerts
