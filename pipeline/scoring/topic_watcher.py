"""Watch over topics: deletions, recreations, and open transactions that hold records back.

A monitor asks every few seconds, over connections of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from pipeline.errors import StartupError
from pipeline.scoring.health import Health
from pipeline.topic_id import is_other, other_log, shown

LOG_SECONDS = 60.0
"""Time between two log lines about the same open transaction."""

log = logging.getLogger(__name__)


class TopicGoneError(StartupError):
    """A topic was deleted while the worker ran, and was not created again."""


class TopicCatalog(Protocol):
    """Interface to the ids of several topics."""

    async def topic_ids(self, topics: Sequence[str]) -> dict[str, bytes]:
        """Return the ids of the existing topics among these.

        Raises:
            LogUnavailableError: the broker does not answer.
        """


class TopicWatcher:
    """Watch over topics; the worker ends if a deleted topic is not created again.

    Args:
        topics: full names.
        read: the topics that the worker reads, with the name of the data in Redis for each.
        scores_topic: full name of the scores topic; its loss is logged.
        stops: whether a recreated topic ends the worker.
        seconds: how long to wait for a deleted topic.
        logs: returns the ids of topics.
        health: gets the missing topics.

    Attributes:
        changed: topics that were created again since the last check.
    """

    def __init__(
        self,
        topics: Sequence[str],
        read: Mapping[str, str],
        scores_topic: str,
        stops: bool,
        seconds: float,
        logs: TopicCatalog,
        health: Health,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.changed: set[str] = set()
        self._topics = list(topics)
        self._read = dict(read)
        self._scores_topic = scores_topic
        self._stops = stops
        self._seconds = seconds
        self._logs = logs
        self._health = health
        self._clock = clock
        self._gone_since: dict[str, float] = {}
        self._ids: dict[str, bytes] = {}

    async def look(self) -> set[str]:
        """Check the topics, and return the existing ones.

        Raises:
            LogUnavailableError: the broker does not answer.
            TopicGoneError: a topic is missing for too long; the message says what to do.
            StartupError: a topic was deleted and created again.
        """
        found = await self._logs.topic_ids(self._topics)
        now = self._clock()
        for topic in self._topics:
            if topic in found:
                if self._gone_since.pop(topic, None) is not None:
                    log.warning("the topic exists again", extra={"topic": topic})
                continue
            if topic not in self._gone_since:
                self._gone_since[topic] = now
                log.error(
                    "a topic was deleted; waiting for its creation, then the worker ends",
                    extra={"topic": topic, "seconds": self._seconds},
                )
            elif now - self._gone_since[topic] >= self._seconds:
                raise _gone(topic, self._seconds)
        if self._gone_since:
            self._health.down("topics", f"{', '.join(sorted(self._gone_since))} was deleted")
        else:
            self._health.up("topics")
        self.changed = {
            topic
            for topic, topic_id in found.items()
            if is_other(self._ids.get(topic, topic_id), topic_id)
        }
        for topic in self.changed & self._read.keys() if self._stops else ():
            raise other_log(topic, self._ids[topic], found[topic], self._read[topic])
        if self._scores_topic in self.changed:
            log.warning(
                "the scores topic was deleted and created again: its scores are lost, and a rebuild"
                " cannot use the merchants' features in them",
                extra={
                    "topic": self._scores_topic,
                    "id_then": shown(self._ids[self._scores_topic]),
                    "id_now": shown(found[self._scores_topic]),
                },
            )
        self._ids |= found
        return set(found)


def _gone(topic: str, seconds: float) -> TopicGoneError:
    return TopicGoneError(
        f"topic {topic} was deleted while the worker ran, and was not created again within"
        f" {seconds:g} s (RECUR_TOPIC_MISSING_SECONDS): start the worker again, which creates it,"
        " and run `recur state rebuild --new-log` or set RECUR_ON_NEW_LOG=begin, to start from it"
    )


@dataclass(frozen=True)
class HeldRecords:
    """Records of a partition that a producer's open transaction holds back.

    Attributes:
        behind: offset of the transaction's first record.
        records: number of records from there to the log's end, markers included.
    """

    behind: int
    records: int


class OpenTransactions:
    """Watch over open transactions; those that stay open are logged.

    A consumer of committed records gets nothing past the first record of an open transaction. A
    transaction that is open at one check only is normal.

    Args:
        topic: full name.
    """

    def __init__(self, topic: str, clock: Callable[[], float] = monotonic) -> None:
        self._topic = topic
        self._clock = clock
        self._seen: dict[int, int] = {}
        self._logged_at: dict[int, float] = {}

    def check(
        self, ends: Mapping[int, int], stable_ends: Mapping[int, int], positions: Mapping[int, int]
    ) -> dict[int, HeldRecords]:
        """Return the held records of each partition that is read up to them.

        Args:
            ends: end of each log.
            stable_ends: end of the committed records of each log.
            positions: position of the consumer in each log.
        """
        held = {
            partition: HeldRecords(stable, end - stable)
            for partition, end in ends.items()
            if (stable := stable_ends.get(partition, end)) < end
            and positions.get(partition, 0) >= stable
        }
        now = self._clock()
        for partition, what in held.items():
            stays = self._seen.get(partition) == what.behind
            if stays and now >= self._logged_at.get(partition, now - LOG_SECONDS) + LOG_SECONDS:
                self._logged_at[partition] = now
                log.warning(
                    "a producer's transaction stays open and holds back all records behind it: end"
                    " it (kafka-transactions.sh find-hanging, abort), or find out why its producer"
                    " does not",
                    extra={
                        "topic": self._topic,
                        "partition": partition,
                        "behind_offset": what.behind,
                        "records": what.records,
                    },
                )
        self._seen = {partition: what.behind for partition, what in held.items()}
        return held
