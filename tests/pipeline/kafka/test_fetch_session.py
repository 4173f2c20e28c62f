"""Requests and answers of a fetch session, compared with aiokafka's own packing."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from aiokafka.protocol.fetch import FetchRequest_v11, FetchResponse_v11
from aiokafka.structs import TopicPartition

from pipeline.kafka.fetch_session import (
    FETCH_KEY,
    SESSION_EPOCH_MAX,
    FetchAnswer,
    FetchedPartition,
    FetchSession,
    has_sessions,
)

A0, A1, B0 = TopicPartition("a", 0), TopicPartition("a", 1), TopicPartition("b", 0)


def session() -> FetchSession:
    return FetchSession(
        wait_ms=1500, min_bytes=1, max_bytes=1 << 20, isolation_level=1, partition_bytes=1 << 16
    )


def unpacked(body: bytes) -> Any:
    return FetchRequest_v11.decode(BytesIO(body))


def asked(session: FetchSession, positions: dict[TopicPartition, int]) -> Any:
    return unpacked(session.request(positions).pack({}).body)


def answer(session_id: int, *partitions: FetchedPartition) -> FetchAnswer:
    return FetchAnswer(0, session_id, list(partitions))


def test_the_first_request_names_all_partitions_and_later_ones_those_that_moved() -> None:
    one = session()
    first = asked(one, {A0: 7, B0: 0, A1: 9})
    one.accept(answer(55))
    second = asked(one, {A1: 12})
    one.accept(answer(55))
    third = asked(one, {})

    assert (first.replica_id, first.max_wait_time, first.min_bytes, first.max_bytes) == (
        -1, 1500, 1, 1 << 20,
    )  # fmt: skip
    assert (first.isolation_level, first.rack_id, first.forgotten_topics_data) == (1, "", [])
    assert first.topics == [
        ("a", [(0, -1, 7, -1, 1 << 16), (1, -1, 9, -1, 1 << 16)]),
        ("b", [(0, -1, 0, -1, 1 << 16)]),
    ]
    assert second.topics == [("a", [(1, -1, 12, -1, 1 << 16)])]
    assert third.topics == []
    told = [(r.session_id, r.session_epoch) for r in (first, second, third)]
    assert told == [(0, 0), (55, 1), (55, 2)]


def test_a_broker_that_keeps_no_session_is_told_all_partitions_each_time() -> None:
    one = session()
    asked(one, {A0: 7, A1: 9})
    one.accept(answer(0))
    second = asked(one, {A1: 12})

    assert (second.session_id, second.session_epoch) == (0, 0)
    assert second.topics == [("a", [(0, -1, 7, -1, 1 << 16), (1, -1, 12, -1, 1 << 16)])]


def test_the_epoch_begins_again_after_the_largest() -> None:
    one = session()
    one.accept(answer(55))
    one._epoch = SESSION_EPOCH_MAX
    one.accept(answer(55))
    assert asked(one, {}).session_epoch == 1


@pytest.mark.parametrize("aborted", [None, [], [(5, 100), (6, 101)]])
def test_an_answer_has_what_aiokafka_reads_from_it(aborted: list[tuple[int, int]] | None) -> None:
    packed = FetchResponse_v11(
        0,
        0,
        55,
        [
            ("a", [(0, 0, 30, 29, 1, aborted, -1, b"batch"), (1, 6, -1, -1, -1, [], -1, None)]),
            ("b", [(0, 0, 8, 8, 0, [], -1, b"")]),
        ],
    ).encode()

    found = FetchAnswer.decode(memoryview(packed))

    assert (found.error, found.session) == (0, 55)
    assert found.partitions == [
        FetchedPartition(A0, 0, 30, 29, aborted or [], b"batch"),
        FetchedPartition(A1, 6, -1, -1, [], b""),
        FetchedPartition(B0, 0, 8, 8, [], b""),
    ]


def test_an_error_of_the_whole_request_is_found() -> None:
    found = FetchAnswer.decode(memoryview(FetchResponse_v11(0, 70, 0, []).encode()))
    assert (found.error, found.partitions) == (70, [])


def test_old_brokers_have_no_sessions() -> None:
    assert has_sessions({FETCH_KEY: (4, 17)})
    assert not has_sessions({FETCH_KEY: (0, 10)})
    assert not has_sessions({})
