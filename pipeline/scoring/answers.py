"""Answers of a part of a poll to the gateways that produced its records.

Which answer a record gets is decided with its score. Where that score stands is known once it is
published: only then does the answer have the offset that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from pipeline.kafka.producer import AppendResult, Outgoing
from pipeline.kafka.score_log import LoggedScore
from pipeline.messages.replies import (
    ANSWERED,
    DUPLICATE,
    REJECTED,
    Reply,
    StoredAnswer,
    encode_replies,
)


class RecordAnswer(msgspec.Struct, frozen=True, eq=False):
    """An answer to a record that asks for one.

    It is the first of these that is set: the reason, the published score, the new score. It is
    a dropped duplicate if none is.

    Attributes:
        gateway: id of the gateway that waits.
        source: offset of the record.
        transaction_id: its transaction's.
        content: hash of its value, [16] bytes.
        reason: reason of its dead letter.
        published: the score that was published before.
        new: index of its score among the part's new ones.
    """

    gateway: str
    source: int
    transaction_id: str
    content: bytes
    reason: str | None = None
    published: LoggedScore | None = None
    new: int | None = None

    def reply(
        self,
        scores: Sequence[Outgoing],
        where: AppendResult | None,
        logged: Mapping[int, LoggedScore],
    ) -> Reply | None:
        """Make the reply; None if its score is published, but cannot be found.

        Args:
            scores: the part's new scores.
            where: where they stand.
            logged: scores read from the topic, by source offset. If ``where`` is unknown, the
                new ones are among them.
        """
        name = self.transaction_id
        if self.reason is not None:
            return Reply(name, REJECTED, 0, self.reason.encode())
        published = self.published
        if published is None:
            if self.new is None:
                return Reply(name, DUPLICATE, 0, b"")
            if where is not None and where.first is not None:
                value = scores[self.new].value
                assert value is not None
                return Reply(name, ANSWERED, where.first + self.new, value)
            found = logged.get(self.source)
            published = None if found is None else found.of(name)
        if published is None:
            return None
        return Reply(name, ANSWERED, published.offset, published.value)

    def stored(self, reply: Reply) -> bytes | None:
        """Encode the value of the answer key; None for a duplicate, which leaves it as it is."""
        if reply.kind == DUPLICATE:
            return None
        if self.reason is not None:
            return StoredAnswer("R", self.content, reason=self.reason).to_bytes()
        return StoredAnswer("A", self.content, reply.offset).to_bytes()


class Answered(msgspec.Struct, frozen=True, eq=False):
    """A part's answers once its scores are published.

    Attributes:
        stored: transaction id and value of each answer key to set.
        replies: gateway and reply of each answer.
    """

    stored: Sequence[tuple[str, bytes]]
    replies: Sequence[tuple[str, Reply]]


NONE_ANSWERED = Answered((), ())


def answer_all(
    answers: Sequence[RecordAnswer],
    scores: Sequence[Outgoing],
    where: AppendResult | None,
    logged: Mapping[int, LoggedScore],
) -> Answered:
    """Answer a part's records; the arguments are those of :meth:`RecordAnswer.reply`."""
    if not answers:
        return NONE_ANSWERED
    stored, replies = [], []
    for answer in answers:
        reply = answer.reply(scores, where, logged)
        if reply is not None:
            replies.append((answer.gateway, reply))
            value = answer.stored(reply)
            if value is not None:
                stored.append((answer.transaction_id, value))
    return Answered(stored, replies)


def messages_of(replies: Iterable[tuple[str, Reply]]) -> dict[str, bytes]:
    """Encode the message to each gateway, given gateway and reply of each answer."""
    by_gateway: dict[str, list[Reply]] = {}
    for gateway, reply in replies:
        by_gateway.setdefault(gateway, []).append(reply)
    return {gateway: encode_replies(of_it) for gateway, of_it in by_gateway.items()}
