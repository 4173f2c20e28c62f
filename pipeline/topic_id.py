"""Ids of topics: what tells a log that was deleted and made again from the one before.

A name and offsets do not tell. The watermark names the id of the log that its states are of, and
an offset that the group commits names it in the metadata that Kafka keeps with it.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

from pipeline.errors import StartupError

NO_ID = bytes(16)
"""Of a topic whose id nobody told: by an older broker, or in an older watermark."""


def is_other(known: bytes, found: bytes) -> bool:
    """Whether two ids are of two logs; one that is not told is of no other."""
    return NO_ID not in (known, found) and known != found


def shown(log_id: bytes) -> str:
    """An id as Kafka's own tools print it.

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
        made = super().__new__(cls, offset)
        made.log_id = log_id
        return made


def log_of(offset: int) -> bytes:
    """The id of the log that an offset is of; :data:`NO_ID` for one that does not tell."""
    return offset.log_id if isinstance(offset, LogOffset) else NO_ID


def commit_metadata(offset: int) -> str:
    """What is committed with an offset, so that it tells its log."""
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
    """What is said of a topic that was deleted and made again.

    Args:
        what: is in Redis of the log before.
    """
    return StartupError(
        f"the {what} in Redis are of another {topic} than the one that is there: it was deleted"
        f" and made again, or the cluster is another one (topic id {shown(known)} then,"
        f" {shown(found)} now). Nothing of the new log is skipped. Run `recur state rebuild"
        " --new-log` to begin from the new log, or set RECUR_ON_NEW_LOG=begin"
    )
