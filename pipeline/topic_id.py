"""Ids of topics: they tell a recreated log from the one before it.

Name and offsets cannot tell the two apart. So a watermark holds the id of its states' log, and a
committed offset holds it in the metadata that Kafka stores with it.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

from pipeline.errors import StartupError

NO_ID = bytes(16)
"""The id of a topic if an older broker or an older watermark does not tell it."""


def is_other(known: bytes, found: bytes) -> bool:
    """Tell whether two ids belong to two logs. An unknown id counts as the same log."""
    return NO_ID not in (known, found) and known != found


def shown(log_id: bytes) -> str:
    """Format an id as Kafka's own tools print it.

    >>> shown(bytes(range(16)))
    'AAECAwQFBgcICQoLDA0ODw'
    """
    return urlsafe_b64encode(log_id).decode().rstrip("=")


class LogOffset(int):
    """An offset that tells which log it is of.

    Attributes:
        log_id: :data:`NO_ID` where nobody told.
    """

    log_id: bytes

    def __new__(cls, offset: int, log_id: bytes = NO_ID) -> LogOffset:
        """Make an int that also holds its log's id."""
        made = super().__new__(cls, offset)
        made.log_id = log_id
        return made


def log_of(offset: int) -> bytes:
    """The id of the log that an offset is of; :data:`NO_ID` for one that does not tell."""
    return offset.log_id if isinstance(offset, LogOffset) else NO_ID


def commit_metadata(offset: int) -> str:
    """Return the metadata to commit with an offset: the id of its log."""
    log_id = log_of(offset)
    return "" if log_id == NO_ID else shown(log_id)


def committed_offset(offset: int, metadata: str | None) -> LogOffset:
    """An offset as it was committed; metadata that this version did not write tell no log."""
    try:
        log_id = urlsafe_b64decode(f"{metadata or ''}==")
    except ValueError:
        log_id = NO_ID
    return LogOffset(offset, log_id if len(log_id) == len(NO_ID) else NO_ID)


def other_log(topic: str, known: bytes, found: bytes, what: str = "states") -> StartupError:
    """Describe a topic that was deleted and created again.

    Args:
        topic: its full name.
        known: id of the earlier log.
        found: the topic's id now.
        what: the data in Redis that belongs to the earlier log.
    """
    return StartupError(
        f"the {what} in Redis belong to an earlier {topic}: the topic was deleted and created"
        f" again, or this is another cluster (topic id {shown(known)} then, {shown(found)} now)."
        " The worker stops, so that it skips nothing of the new log. Run `recur state rebuild"
        " --new-log` to begin from the new log, or set RECUR_ON_NEW_LOG=begin"
    )
