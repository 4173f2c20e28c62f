"""The id of a topic, asked of the broker at most four times a second."""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from pipeline.kafka.polls import LogUnavailableError
from pipeline.scoring.retry import Retrier
from pipeline.topic_id import NO_ID

MAX_AGE_SECONDS = 0.25
"""Maximum age of a cached id.

No topic can be deleted, created again and filled past a worker's position in less time. One
request costs as much as a small poll."""


class TopicIdReader(Protocol):
    """Interface to the id of a topic."""

    async def topic_id(self, topic: str) -> bytes | None:
        """Return a topic's current id, or None if there is no such topic.

        Raises:
            LogUnavailableError: the broker does not answer.
        """


class TopicIdCache:
    """The id of one topic, as the broker gave it now or a moment ago.

    Args:
        topic: full name.
        reader: asks the broker.
        retrier: waits for a broker that does not answer, and for a missing topic.
    """

    def __init__(self, topic: str, reader: TopicIdReader, retrier: Retrier) -> None:
        self._topic = topic
        self._reader = reader
        self._retrier = retrier
        self._last = NO_ID
        self._expires_at = 0.0

    @property
    def last(self) -> bytes:
        """The last id; :data:`NO_ID` before the first request."""
        return self._last

    async def get(self, *, now: bool) -> bytes:
        """Return the id; with ``now`` ask the broker even if the cached id is young."""
        if now or monotonic() >= self._expires_at:
            expires_at = monotonic() + MAX_AGE_SECONDS
            self._last = await self._retrier.retry_kafka(self._ask)
            self._expires_at = expires_at
        return self._last

    async def _ask(self) -> bytes:
        found = await self._reader.topic_id(self._topic)
        if found is None:
            raise LogUnavailableError(f"there is no topic {self._topic}")
        return found
