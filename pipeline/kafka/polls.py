"""Polls of a log: records by partition, and the bounds of a partition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec


class LogUnavailableError(Exception):
    """The broker did not answer. The caller may try again."""


@dataclass(frozen=True)
class Bounds:
    """First and next offset of a partition: records in [begin, end) exist."""

    begin: int
    end: int


class Record(Protocol):
    """The parts of a Kafka record that the worker reads."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


class Chunk(msgspec.Struct, frozen=True):
    """One partition's part of a poll: every record of its log in [begin, end).

    Attributes:
        epoch: number of seeks of the partition when the chunk was fetched.
    """

    begin: int
    end: int
    records: Sequence[Record]
    epoch: int = 0


class Poll(msgspec.Struct):
    """All records that one fetch returned.

    Attributes:
        chunks: the chunk of each partition.
        applied: the offset that may be committed for each partition; set by the processor.
    """

    chunks: dict[int, Chunk]
    applied: dict[int, int] = {}
