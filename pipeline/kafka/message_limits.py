"""The largest batch of records that topics accept, which producers must not exceed.

A topic's ``max.message.bytes`` bounds a batch, not a record. Its default is 1 MiB, and 256 KiB is
common. An operator may lower it while a producer runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiokafka import errors as kafka_errors

from pipeline.errors import RecurError, StartupError
from pipeline.kafka.topics import TopicRole, batch_limits
from pipeline.settings import Settings

PRODUCE_BATCH_BYTES = 512 * 1024
"""Largest batch of several records, even if a topic accepts more."""

KAFKA_LIMIT_BYTES = 1_048_588
"""Default limit of a topic."""

LARGEST_OUTPUT_BYTES = 16_384
"""Largest score or alert: ids have 256 characters at most. A dead letter is cut to fit."""

TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
"""Errors of a broker for a batch that is larger than its topic accepts."""

OUTPUTS: tuple[TopicRole, ...] = ("scores", "alerts", "dead_letter")

log = logging.getLogger(__name__)


class MessageLimits:
    """Limits on batches to the topics that a producer writes to.

    Args:
        settings: names topics and broker.
        roles: roles of the topics.
        least_bytes: the limit that each topic must have at least.

    Attributes:
        batch_bytes: the largest batch of several records.
        record_bytes: the largest batch of one record: the lowest limit of all topics.
    """

    def __init__(
        self,
        settings: Settings,
        roles: Sequence[TopicRole] = OUTPUTS,
        least_bytes: int = LARGEST_OUTPUT_BYTES,
    ) -> None:
        self._settings = settings
        self._roles = roles
        self._least_bytes = least_bytes
        self.batch_bytes = PRODUCE_BATCH_BYTES
        self.record_bytes = KAFKA_LIMIT_BYTES

    async def read(self) -> None:
        """Ask the broker for the limits.

        Raises:
            StartupError: it does not answer, or a topic accepts less than a record may need.
        """
        limits = await batch_limits(self._settings, self._roles)
        for role, limit in limits.items():
            if limit < self._least_bytes:
                raise StartupError(
                    f"topic {self._settings.topic(role)} takes {limit} bytes at most"
                    f" (max.message.bytes), and a record may need {self._least_bytes}: raise it"
                    " with kafka-configs --alter --add-config"
                    f" max.message.bytes={KAFKA_LIMIT_BYTES}"
                )
        self.record_bytes = min(limits.values(), default=KAFKA_LIMIT_BYTES)
        self.batch_bytes = min(PRODUCE_BATCH_BYTES, self.record_bytes)

    async def learn(self, refused_bytes: int) -> None:
        """Find new limits after the broker refused a batch as too large.

        Args:
            refused_bytes: batch size of the producer that was refused.

        Raises:
            RecurError: a topic accepts less than a record may need.
        """
        if self.batch_bytes < refused_bytes:
            return  # another producer was refused first, and the limits are new
        await self.read()
        if self.batch_bytes >= refused_bytes:  # the broker does not tell its limit
            self.batch_bytes = self.record_bytes = refused_bytes // 2
        if self.batch_bytes < self._least_bytes:
            topics = ", ".join(self._settings.topic(role) for role in self._roles)
            raise RecurError(
                f"a batch of {refused_bytes} bytes is refused as too large for one of the topics"
                f" {topics}: raise its max.message.bytes with kafka-configs"
            )
        log.warning(
            "the broker accepts smaller batches than before", extra={"bytes": self.batch_bytes}
        )
