"""The packed produce request, compared with aiokafka's own packing."""

from __future__ import annotations

import pytest
from aiokafka.producer import sender
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7

from pipeline.kafka.produce_request import PRODUCE_KEY, ProduceAnswer, ProduceRequest

TOPICS = [("scores", [(3, b"one"), (0, b"")]), ("älerts", [(1, b"three")])]


@pytest.mark.parametrize("transactional_id", [None, "", "recur-0"])
def test_a_request_is_packed_as_aiokafka_packs_it(transactional_id: str | None) -> None:
    packed = ProduceRequest(transactional_id, -1, 40_000, TOPICS).pack({PRODUCE_KEY: (0, 11)})

    assert packed is not None
    expected = ProduceRequest_v7(transactional_id, -1, 40_000, TOPICS).encode()
    assert packed.body == expected


def test_aiokafka_packs_the_request_for_a_broker_that_does_not_know_it() -> None:
    request = ProduceRequest(None, -1, 40_000, TOPICS)
    assert request.pack({PRODUCE_KEY: (0, 6)}) is None
    assert request.prepare({PRODUCE_KEY: (0, 6)}).API_VERSION == 6


def test_an_answer_has_what_aiokafka_reads_from_it() -> None:
    topics = [("scores", [(3, 0, 17, -1, 0), (0, 10, -1, -1, -1)]), ("älerts", [])]
    found = ProduceAnswer.decode(memoryview(ProduceResponse_v7(topics, 0).encode()))
    assert found.topics == topics


def test_aiokafkas_producers_use_it() -> None:
    assert sender.ProduceRequest is ProduceRequest
