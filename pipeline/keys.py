"""Every Redis key, on one screen.

    recur:<model>:{<topic>-<partition>}                 the partition's watermark
    recur:<model>:{<topic>-<partition>}:<account_id>    an account's state

The braces are Redis Cluster's hash tag: a partition's states and its watermark lie in one
slot, so that one MGET reads them and one script writes them, atomically. ``<model>`` is the
checkpoint's digest: a new model starts with states of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Names the keys of one model's states on one transactions topic.

    >>> keys = Keys("recur", "0f3a", "transactions")
    >>> keys.watermark(3)
    b'recur:0f3a:{transactions-3}'
    >>> keys.accounts(3, ["A1", "A2"])
    [b'recur:0f3a:{transactions-3}:A1', b'recur:0f3a:{transactions-3}:A2']
    """

    prefix: str
    model: str
    topic: str

    def watermark(self, partition: int) -> bytes:
        """Key of a partition's watermark."""
        return f"{self.prefix}:{self.model}:{{{self.topic}-{partition}}}".encode()

    def accounts(self, partition: int, account_ids: list[str]) -> list[bytes]:
        """Keys of accounts' states, in the order given."""
        start = f"{self.prefix}:{self.model}:{{{self.topic}-{partition}}}:"
        return [(start + account_id).encode() for account_id in account_ids]

    def watermarks_pattern(self) -> str:
        """SCAN pattern of this topic's watermarks."""
        return f"{self.prefix}:{self.model}:{{{self.topic}-*}}"
