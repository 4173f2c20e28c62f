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
from pipeline.scoring.health import Health
from pipeline.topic_id import is_other, other_log, shown

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


class TopicWatcher:
    """Sees topics go, and has the worker end where they do not come back.

    Args:
        topics: full names.
        read: those of them that the worker reads, and what is in Redis of each.
        scores_topic: what is lost with it is told.
        stops: whether another topic of one that is read ends the worker.
        seconds: so long a topic that is gone is waited for.
        logs: knows ids.
        health: is told what is missing.

    Attributes:
        changed: topics that are read and were made again since the last look.
    """

    def __init__(
        self,
        topics: Sequence[str],
        read: Mapping[str, str],
        scores_topic: str,
        stops: bool,
        seconds: float,
        logs: AsksIds,
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
        """The topics that are there.

        Raises:
            LogUnavailableError: the broker does not answer.
            TopicGoneError: one has been gone for too long; the message says what to do.
            StartupError: one that is read is another.
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
        self.changed = {
            topic
            for topic, topic_id in found.items()
            if is_other(self._ids.get(topic, topic_id), topic_id)
        }
        for topic in self.changed & self._read.keys() if self._stops else ():
            raise other_log(topic, self._ids[topic], found[topic], self._read[topic])
        if self._scores_topic in self.changed:
            log.warning(
                "the scores topic was deleted and made again: the scores that it held are gone,"
                " and a rebuild computes without the merchants' features in them",
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
