"""Interface to the consumer besides polls: committed offsets and seeks."""

from __future__ import annotations

from typing import Protocol


class PartitionConsumer(Protocol):
    """The consumer of one topic, as far as recovery needs it."""

    async def committed(self, partition: int) -> int | None:
        """Return the group's committed offset, with its topic id; None for a group without one.

        Raises:
            LogUnavailableError: the broker does not answer.
        """

    async def seek(self, partition: int, offset: int) -> int:
        """Fetch the partition from ``offset`` on; return the epoch of the polls to come."""
