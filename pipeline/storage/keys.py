"""Every Redis key, on one screen.

    recur:<model>:{<topic>-<partition>}                 the partition's watermark
    recur:<model>:{<topic>-<partition>}:<account_id>    an account's state
    recur:evictions:<model>:<topic>                     up to which evictions states are repaired
    recur:evictions:<model>:<topic>:lock                a worker repairs them
    recur:merchant:{<slot>}:<merchant_id>               a merchant's profile
    recur:labels:{<slot>}:<topic>-<partition>           the slot's watermark of a labels partition
    recur:labels:<topic>-<partition>                    up to where all slots have booked it
    recur:labels:<topic>-<partition>:id                 the id of the log that is booked
    recur:note:{<slot>}:<hash of the transaction id>    what its labels need to know of it

The braces are Redis Cluster's hash tag: a partition's states and its watermark lie in one
slot, so that one MGET reads them and one script writes them, atomically. ``<model>`` is the
checkpoint's digest: a new model starts with states of its own. Merchants are every model's:
``<slot>`` is a number under 256 that the merchant's id gives, and what a script changes
together has the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

MERCHANT_SLOTS = 16
"""Hash tags of merchants: enough to spread over a cluster as partitions do, few enough to say of
each with every poll of labels how far it is booked, and to read a micro-batch's merchants in as
many calls."""


def merchant_slot(merchant_id: str) -> int:
    """The slot of a merchant, in [0, MERCHANT_SLOTS)."""
    return xxhash.xxh3_64_intdigest(merchant_id.encode()) % MERCHANT_SLOTS


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

    def evictions(self) -> bytes:
        """Key of the numbers of evicted keys up to which the states are repaired."""
        return f"{self.prefix}:evictions:{self.model}:{self.topic}".encode()

    def evictions_lock(self) -> bytes:
        """Key that keeps other workers from repairing at the same time."""
        return self.evictions() + b":lock"

    def accounts_pattern(self, partition: int | None = None) -> str:
        """SCAN pattern of this topic's states, of one partition or all.

        :meth:`account_of` knows which keys are states.
        """
        place = "*" if partition is None else partition
        return f"{self.prefix}:{self.model}:{{{self.topic}-{place}}}:*"

    def account_of(self, key: bytes) -> tuple[int, str] | None:
        """Partition and account id of a state's key; None for a key of something else.

        >>> Keys("recur", "0f3a", "transactions").account_of(b"recur:0f3a:{transactions-3}:A1")
        (3, 'A1')
        """
        start = f"{self.prefix}:{self.model}:{{{self.topic}-".encode()
        number, braces, account = key.removeprefix(start).partition(b"}:")
        if not (key.startswith(start) and braces and number.isdigit()):
            return None
        try:
            return int(number), account.decode()
        except UnicodeDecodeError:
            return None


@dataclass(frozen=True)
class MerchantKeys:
    """Names the keys of merchants, which all models share.

    >>> keys = MerchantKeys("recur")
    >>> keys.profile("M1")
    b'recur:merchant:{2}:M1'
    >>> keys.labels_watermark(merchant_slot("M1"), "labels", 3)
    b'recur:labels:{2}:labels-3'
    >>> keys.note(merchant_slot("M1"), 255)
    b'recur:note:{2}:00000000000000ff'
    """

    prefix: str

    def profile(self, merchant_id: str) -> bytes:
        """Key of a merchant's profile."""
        name = merchant_id.encode()
        slot = xxhash.xxh3_64_intdigest(name) % MERCHANT_SLOTS
        return b"%b:merchant:{%d}:%b" % (self.prefix.encode(), slot, name)

    def labels_watermark(self, slot: int, topic: str, partition: int) -> bytes:
        """Key of the offset before which all labels of a partition are booked in a slot."""
        return f"{self.prefix}:labels:{{{slot}}}:{topic}-{partition}".encode()

    def labels_log(self, topic: str, partition: int) -> bytes:
        """Key of the id of the log that a labels partition is booked from."""
        return f"{self.prefix}:labels:{topic}-{partition}:id".encode()

    def note(self, slot: int, transaction_hash: int) -> bytes:
        """Key of what is remembered of a transaction."""
        return f"{self.prefix}:note:{{{slot}}}:{transaction_hash:016x}".encode()

    def labels_watermarks(self, slot: int, topic: str, partitions: int) -> list[bytes]:
        """Keys of how far each labels partition is booked in a slot's profiles."""
        return [self.labels_watermark(slot, topic, partition) for partition in range(partitions)]

    def profiles_begin(self) -> bytes:
        """What every profile's key begins with."""
        return f"{self.prefix}:merchant:{{".encode()
