"""Requests that wait for an answer, and the replies that end their waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.messages.replies import Reply, decode_replies


class Waiter:
    """One request's wait for the answer to one transaction.

    Args:
        content: hash of the record's value.

    Attributes:
        reply: the reply, once it is there.
    """

    def __init__(self, partition: int, content: bytes) -> None:
        self.place = (partition, content)
        self.reply: Reply | None = None
        self._woken = asyncio.Event()

    def wake(self, reply: Reply | None) -> None:
        """End the wait; without a reply the answer key has news."""
        self.reply = self.reply or reply
        self._woken.set()

    async def wait(self, seconds: float) -> None:
        """Wait until it is woken, at most for this time."""
        if not self._woken.is_set() and seconds > 0:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(seconds, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                timer.cancel()
        self._woken.clear()


class Waiters:
    """The waits of a gateway, by transaction id."""

    def __init__(self) -> None:
        self._of_id: dict[str, list[Waiter]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of_id.values()))

    @contextmanager
    def waiting(self, transaction_id: str, waiter: Waiter) -> Iterator[None]:
        """Take replies to a transaction within the block."""
        of_id = self._of_id.setdefault(transaction_id, [])
        of_id.append(waiter)
        try:
            yield
        finally:
            of_id.remove(waiter)
            if not of_id and self._of_id.get(transaction_id) is of_id:
                del self._of_id[transaction_id]

    def take(self, message: bytes) -> int:
        """Give the replies in a message to those who wait.

        Returns:
            the number of replies.

        Raises:
            ValueError: it is no such message.
        """
        replies = decode_replies(message)
        for reply in replies:
            waiters = self._of_id.get(reply.transaction_id, ())
            # An id is unique for its account alone, and a reply does not name the account.
            is_clear = len({waiter.place for waiter in waiters}) == 1
            for waiter in waiters:
                waiter.wake(reply if is_clear else None)
        return len(replies)
