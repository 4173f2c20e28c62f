"""Errors that tell a transactional producer that another one has taken its partition."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.errors import (
    KafkaError,
    NotEnoughReplicasError,
    PolicyViolationError,
    ProducerFenced,
    UnknownError,
)

from pipeline.kafka.producer import Outgoing, PartOutput, PublishError
from pipeline.kafka.transactional_producer import FencedError, PartitionProducer
from pipeline.settings import load_settings


class FailingClient:
    """An aiokafka producer without a broker.

    Args:
        errors: by the name of a call, the error that it raises.
    """

    def __init__(self, errors: dict[str, KafkaError]) -> None:
        self._errors = errors

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: object, **options: object) -> asyncio.Future[bool]:
            if name in self._errors:
                raise self._errors[name]
            delivery = asyncio.get_running_loop().create_future()
            delivery.set_result(True)
            return delivery

        return call


def commit(errors: dict[str, KafkaError]) -> None:
    """Commit an offset and a dead letter in a transaction of which these calls fail."""
    producer = PartitionProducer(load_settings(), 0)
    producer._producer = FailingClient(errors)
    asyncio.run(producer.commit(PartOutput((), (), [Outgoing(b"A", b"junk")], 1, 1)))


def wrapped(error: KafkaError) -> KafkaError:
    """Wrap an error as aiokafka's sender does."""
    outer = KafkaError("Unexpected error during batch delivery")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("call", ["send", "send_offsets_to_transaction", "commit_transaction"])
@pytest.mark.parametrize("error", [ProducerFenced(), wrapped(ProducerFenced())])
def test_a_fenced_producer_is_told_at_every_step(call: str, error: KafkaError) -> None:
    with pytest.raises(FencedError):
        commit({call: error})


def test_an_unknown_error_at_the_end_of_a_transaction_may_be_a_fencing() -> None:
    for error in (UnknownError(), wrapped(UnknownError())):
        with pytest.raises(FencedError):
            commit({"commit_transaction": error})
        with pytest.raises(FencedError):
            commit({"send": PolicyViolationError(), "abort_transaction": error})


@pytest.mark.parametrize("call", ["begin_transaction", "send", "send_offsets_to_transaction"])
def test_an_unknown_error_before_the_end_of_a_transaction_is_no_fencing(call: str) -> None:
    with pytest.raises(PublishError):
        commit({call: wrapped(UnknownError())})


def test_another_refusal_is_no_fencing() -> None:
    with pytest.raises(PublishError):
        commit({"commit_transaction": NotEnoughReplicasError()})
