"""Answers to records that ask for one: the header, the answer key's value, and what is published.

A gateway produces a transaction with the header :data:`REPLY_HEADER`. The worker that saves its
state sets the transaction's answer key (:meth:`pipeline.storage.keys.Keys.answers`) in the same
script, and then publishes the answers of the poll to the gateway's channel.

The answer key's value is one byte for the kind, 16 bytes for the content, and what follows:

    P  the epoch milliseconds of the claim, u64    a gateway produces the record
    A  the offset of the score, u64                the score stands in the scores topic
    R  the reason in UTF-8                         the record went to the dead-letter topic
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import msgspec

REPLY_HEADER = "recur-reply-to"
"""Header of a record that asks for an answer. Its value is the gateway's id, new at each start."""

GATEWAY_ID_MAX = 64
"""Most characters of a gateway's id."""

HASH_BYTES = 16
"""Bytes of a content hash."""

CLAIMED, ANSWERED, REJECTED = "P", "A", "R"
"""Kinds of an answer key's value."""

DUPLICATE = "D"
"""Kind of a published answer: the account had this transaction before, so it got no new score."""

ANSWER_BYTES_MAX = 1 + HASH_BYTES + 64
"""Most bytes of an answer key's value; a longer reason is cut."""

NUMBER_BYTES = 8

_GATEWAY_ID = re.compile(rb"[A-Za-z0-9_.-]{1,%d}" % GATEWAY_ID_MAX)


def content_hash(value: bytes | None) -> bytes:
    """Hash the value of a record, [16] bytes: records with one id and another hash conflict."""
    return blake2b(value or b"", digest_size=HASH_BYTES).digest()


def gateway_of(headers: Sequence[tuple[str, bytes]]) -> str | None:
    """Return the id of the gateway that waits for the answer; None without a valid one."""
    for name, value in headers:
        if name == REPLY_HEADER and _GATEWAY_ID.fullmatch(value):
            return value.decode("ascii")
    return None


class StoredAnswer(msgspec.Struct, frozen=True):
    """The value of a transaction's answer key.

    Attributes:
        kind: :data:`CLAIMED`, :data:`ANSWERED` or :data:`REJECTED`.
        content: hash of the record's value, [16] bytes.
        number: time of the claim in epoch milliseconds, or offset of the score in the scores
            partition that has the number of the transaction's partition.
        reason: the reason of the dead letter.

    >>> StoredAnswer("A", bytes(16), 7).to_bytes().hex()
    '41000000000000000000000000000000000000000000000007'
    """

    kind: Literal["P", "A", "R"]
    content: bytes
    number: int = 0
    reason: str = ""

    def to_bytes(self) -> bytes:
        """Encode the value."""
        head = self.kind.encode() + self.content
        if self.kind == REJECTED:
            return (head + self.reason.encode())[:ANSWER_BYTES_MAX]
        return head + self.number.to_bytes(NUMBER_BYTES, "big")

    @classmethod
    def from_bytes(cls, value: bytes) -> StoredAnswer:
        """Decode the value.

        Raises:
            ValueError: it is no answer of this version.
        """
        kind, content, rest = value[:1], value[1 : 1 + HASH_BYTES], value[1 + HASH_BYTES :]
        if len(content) == HASH_BYTES:
            if kind == b"R":
                return cls("R", content, reason=rest.decode(errors="replace"))
            if len(rest) == NUMBER_BYTES and kind in (b"P", b"A"):
                number = int.from_bytes(rest, "big")
                return cls("P" if kind == b"P" else "A", content, number)
        raise ValueError("not an answer")


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """A published answer to one record.

    Attributes:
        transaction_id: id in the record.
        kind: :data:`ANSWERED`, :data:`REJECTED` or :data:`DUPLICATE`.
        offset: offset of the score in its partition; 0 without one.
        value: bytes of the score's record, or the reason; empty for a duplicate.
    """

    transaction_id: str
    kind: str
    offset: int
    value: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Reply])


def encode_replies(replies: Sequence[Reply]) -> bytes:
    """Encode the message of one poll to one gateway: a msgpack list of lists of four."""
    return _encoder.encode(replies)


def decode_replies(message: bytes) -> list[Reply]:
    """Decode a message.

    Raises:
        ValueError: it is no such message.
    """
    try:
        return _decoder.decode(message)
    except msgspec.DecodeError as error:
        raise ValueError("not a message of replies") from error
