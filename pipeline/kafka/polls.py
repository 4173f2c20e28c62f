"""Polls of a log: records by partition, its bounds, and a broker that does not answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class LogUnavailableError(Exception):
    """The broker did not answer; ask again."""


@dataclass(frozen=True)
class Bounds:
    """First offset that is still there, and the next to be written."""

    begin: int
    end: int


class Record(Protocol):
    """What the worker reads of a Kafka record."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Chunk:
    """A partition's part of a poll: every record of the log in [begin, end).

    Attributes:
        epoch: how often the partition had been sought back when it was fetched.
    """

    begin: int
    end: int
    records: Sequence[Record]
    epoch: int = 0


@dataclass
class Poll:
    """Everything one fetch returned.

    Attributes:
        chunks: by partition.
        applied: the offset that each partition may be committed to; filled when processed.
    """

    chunks: dict[int, Chunk]
    applied: dict[int, int] = field(default_factory=dict)
