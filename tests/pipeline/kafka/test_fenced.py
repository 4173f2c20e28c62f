"""Errors that tell a transactional producer that another one has taken its partition."""

from __future__ import annotations

import pytest
from aiokafka.errors import KafkaError, NotEnoughReplicasError, ProducerFenced, UnknownError

from pipeline.kafka.transactional_producer import _is_fenced


@pytest.mark.parametrize("cause", [ProducerFenced(), UnknownError()])
def test_an_error_that_aiokafka_wraps_tells_a_fenced_producer(cause: KafkaError) -> None:
    wrapped = KafkaError("Unexpected error during batch delivery")
    wrapped.__cause__ = cause

    assert _is_fenced(cause)
    assert _is_fenced(wrapped)


def test_another_refusal_is_no_fencing() -> None:
    assert not _is_fenced(NotEnoughReplicasError())
