"""The largest batch that the topics take, which producers keep to.

A topic's ``max.message.bytes`` bounds a batch of records, not a record: 1 MiB unless configured,
and 256 KiB is common. It may be lowered while a producer runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiokafka import errors as kafka_errors

from pipeline.errors import RecurError, StartupError
from pipeline.kafka.topics import TopicRole, batch_limits
from pipeline.settings import Settings

PRODUCE_BATCH_BYTES = 512 * 1024
"""Largest batch of several records, whatever a topic takes."""

KAFKA_LIMIT_BYTES = 1_048_588
"""A topic's limit unless it is configured."""

LARGEST_OUTPUT_BYTES = 16_384
"""No score and no alert is larger: ids have 256 characters at most. A dead letter is cut to fit."""

TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
"""How a broker refuses a batch that is larger than its topic takes."""

OUTPUTS: tuple[TopicRole, ...] = ("scores", "alerts", "dead_letter")

log = logging.getLogger(__name__)


class MessageLimits:
    """What one batch of records may hold, of topics that a producer writes to.

    Args:
        settings: names topics and broker.
        roles: of the topics.
        least_bytes: a topic that takes less is refused.

    Attributes:
        batch_bytes: the largest batch of several records.
        record_bytes: the largest batch of one record, of the topic that takes least.
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
        """Ask the broker.

        Raises:
            StartupError: it does not answer, or a topic takes less than a record may need.
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
        """A producer of batches up to so many bytes was refused: find out what is taken now.

        Raises:
            RecurError: a topic takes less than a record may need.
        """
        if self.batch_bytes < refused_bytes:
            return  # another producer was refused before
        await self.read()
        if self.batch_bytes >= refused_bytes:  # the broker does not say what its limit is
            self.batch_bytes = self.record_bytes = refused_bytes // 2
        if self.batch_bytes < self._least_bytes:
            topics = ", ".join(self._settings.topic(role) for role in self._roles)
            raise RecurError(
                f"a batch of {refused_bytes} bytes is refused as too large for one of the topics"
                f" {topics}: raise its max.message.bytes with kafka-configs"
            )
        log.warning(
            "the broker takes smaller batches than before", extra={"bytes": self.batch_bytes}
        )
