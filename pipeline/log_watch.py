"""What a worker sees of its topics besides records: whether they are there, what is held back.

A monitor asks every few seconds, by connections that are not the consumer's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from pipeline.errors import StartupError
from pipeline.health import Health
from pipeline.log_ids import is_other, shown

TELL_SECONDS = 60.0
"""Between two lines about the same open transaction."""

log = logging.getLogger(__name__)


class TopicGoneError(StartupError):
    """A topic was deleted while the worker ran, and did not come back."""


class AsksIds(Protocol):
    """Knows topics' ids."""

    async def topic_ids(self, topics: Sequence[str]) -> dict[str, bytes]:
        """Ids of those of the topics that there are.

        Raises:
            LogUnavailableError: the broker does not answer.
        """


class TopicWatch:
    """Sees topics go, and has the worker end where they do not come back.

    Args:
        topics: full names.
        scores_topic: that of them in which another id does not stop anything.
        seconds: so long a topic that is gone is waited for.
        logs: knows ids.
        health: is told what is missing.
    """

    def __init__(
        self,
        topics: Sequence[str],
        scores_topic: str,
        seconds: float,
        logs: AsksIds,
        health: Health,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._topics = list(topics)
        self._scores_topic = scores_topic
        self._seconds = seconds
        self._logs = logs
        self._health = health
        self._clock = clock
        self._gone_since: dict[str, float] = {}
        self._scores_id: bytes | None = None

    async def look(self) -> set[str]:
        """The topics that are there.

        Raises:
            LogUnavailableError: the broker does not answer.
            TopicGoneError: one has been gone for too long; the message says what to do.
        """
        found = await self._logs.topic_ids(self._topics)
        now = self._clock()
        for topic in self._topics:
            if topic in found:
                if self._gone_since.pop(topic, None) is not None:
                    log.warning("the topic is there again", extra={"topic": topic})
                continue
            if topic not in self._gone_since:
                self._gone_since[topic] = now
                log.error(
                    "a topic was deleted; waiting for it to be made again, then the worker ends",
                    extra={"topic": topic, "seconds": self._seconds},
                )
            elif now - self._gone_since[topic] >= self._seconds:
                raise _gone(topic, self._seconds)
        if self._gone_since:
            self._health.down("topics", f"{', '.join(sorted(self._gone_since))} was deleted")
        else:
            self._health.up("topics")
        self._see_scores(found)
        return set(found)

    def _see_scores(self, found: Mapping[str, bytes]) -> None:
        scores_id = found.get(self._scores_topic)
        if scores_id is None:
            return
        if self._scores_id is not None and is_other(self._scores_id, scores_id):
            log.warning(
                "the scores topic was deleted and made again: the scores that it held are gone,"
                " and a rebuild computes without the merchants' features in them",
                extra={
                    "topic": self._scores_topic,
                    "id_then": shown(self._scores_id),
                    "id_now": shown(scores_id),
                },
            )
        self._scores_id = scores_id


def _gone(topic: str, seconds: float) -> TopicGoneError:
    return TopicGoneError(
        f"topic {topic} was deleted while the worker ran, and was not made again within"
        f" {seconds:g} s (RECUR_TOPIC_MISSING_SECONDS): start the worker again, which makes it, and"
        " run `recur state rebuild --new-log` or set RECUR_ON_NEW_LOG=begin, to begin from it"
    )


@dataclass(frozen=True)
class Held:
    """What an open transaction of a producer holds back in a partition.

    Attributes:
        behind: the offset of the transaction's first record.
        records: from there to the log's end, markers among them.
    """

    behind: int
    records: int


class OpenTransactions:
    """Sees what open transactions hold back, and tells of those that stay.

    A reader of what is committed is given nothing from the first record of an open transaction on,
    whoever wrote it. One that is there in one look alone is how transactions are.

    Args:
        topic: full name.
    """

    def __init__(self, topic: str, clock: Callable[[], float] = monotonic) -> None:
        self._topic = topic
        self._clock = clock
        self._seen: dict[int, int] = {}
        self._told_at: dict[int, float] = {}

    def see(
        self, ends: Mapping[int, int], stable_ends: Mapping[int, int], positions: Mapping[int, int]
    ) -> dict[int, Held]:
        """What is held back, of each partition that is read up to there.

        Args:
            ends: where the logs end.
            stable_ends: up to where a reader is given records.
            positions: up to where they are read.
        """
        held = {
            partition: Held(stable, end - stable)
            for partition, end in ends.items()
            if (stable := stable_ends.get(partition, end)) < end
            and positions.get(partition, 0) >= stable
        }
        now = self._clock()
        for partition, what in held.items():
            stays = self._seen.get(partition) == what.behind
            if stays and now >= self._told_at.get(partition, now - TELL_SECONDS) + TELL_SECONDS:
                self._told_at[partition] = now
                log.warning(
                    "a producer's transaction stays open and holds back all that is behind it: end"
                    " it (kafka-transactions.sh find-hanging, abort), or see why its producer does"
                    " not",
                    extra={
                        "topic": self._topic,
                        "partition": partition,
                        "behind_offset": what.behind,
                        "records": what.records,
                    },
                )
        self._seen = {partition: what.behind for partition, what in held.items()}
        return held
