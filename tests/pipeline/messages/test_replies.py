"""Answers: what an answer key holds, and what is published to a gateway."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.messages.replies import (
    ANSWER_BYTES_MAX,
    REPLY_HEADER,
    Reply,
    StoredAnswer,
    content_hash,
    decode_replies,
    encode_replies,
    gateway_of,
)


@given(st.sampled_from(["P", "A"]), st.binary(), st.integers(0, 2**64 - 1))
def test_a_claim_and_an_answer_come_back_as_they_were(kind: str, value: bytes, number: int) -> None:
    answer = StoredAnswer(kind, content_hash(value), number)  # type: ignore[arg-type]

    assert StoredAnswer.from_bytes(answer.to_bytes()) == answer
    assert len(answer.to_bytes()) == 25


@given(st.text(max_size=99))
def test_a_rejection_keeps_its_reason_within_its_bound(reason: str) -> None:
    value = StoredAnswer("R", content_hash(b"x"), reason=reason).to_bytes()

    found = StoredAnswer.from_bytes(value)

    assert len(value) <= ANSWER_BYTES_MAX
    assert found.content == content_hash(b"x")
    assert found.reason == reason or len(reason.encode()) > 64


@given(st.binary(max_size=40))
def test_other_bytes_are_no_answer(value: bytes) -> None:
    try:
        answer = StoredAnswer.from_bytes(value)
    except ValueError:
        return
    assert value[:1] in (b"P", b"A", b"R")
    assert answer.content == value[1:17]


def test_published_answers_are_msgpack_lists_of_four() -> None:
    replies = [Reply("t1", "A", 7, b'{"score":0.1}'), Reply("t2", "D", 0, b"")]

    message = encode_replies(replies)

    assert msgspec.msgpack.decode(message) == [
        ["t1", "A", 7, b'{"score":0.1}'],
        ["t2", "D", 0, b""],
    ]
    assert decode_replies(message) == replies


@pytest.mark.parametrize("message", [b"", b"\xc1", msgspec.msgpack.encode([["t", "A"]])])
def test_other_messages_are_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="not a message of replies"):
        decode_replies(message)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"gw-1.a_B", "gw-1.a_B"),
        (b"a" * 64, "a" * 64),
        (b"a" * 65, None),
        (b"", None),
        (b"a:b", None),
        (b"a*", None),
        (b"a\n", None),
        (b"\xff", None),
    ],
)
def test_only_an_id_that_cannot_change_a_channel_is_a_gateways(
    value: bytes, found: str | None
) -> None:
    assert gateway_of([("other", b"x"), (REPLY_HEADER, value)]) == found
