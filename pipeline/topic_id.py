"""Ids of topics: what tells a log that was deleted and made again from the one before.

A name and offsets do not tell. The watermark names the id of the log that its states are of.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode

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
