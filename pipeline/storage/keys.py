"""All Redis keys.

    recur:<model>:{<topic>-<partition>}                 the partition's watermark
    recur:<model>:{<topic>-<partition>}:<account_id>    an account's state
    recur:<model>:{<topic>-<partition>}=<hash>       a transaction's answer; the hash is its id's
    recur:evictions:<model>:<topic>                     counts of evicted keys already repaired
    recur:evictions:<model>:<topic>:lock                held by the worker that repairs
    recur:merchant:{<slot>}:<merchant_id>               a merchant's profile
    recur:labels:{<slot>}:<topic>-<partition>           the slot's watermark of a labels partition
    recur:labels:<topic>-<partition>:id                 the topic id of the recorded labels
    recur:note:{<slot>}:<hash of the transaction id>    facts of a transaction for its labels
    recur:api-keys                                      the gateways' API keys, a hash by key id
    recur:rate:<principal>                              requests taken from a rate limit
    recur:idempotency:<hash>                            content that came under an Idempotency-Key
    recur:replies:<gateway id>                          a channel, not a key: answers to a gateway

The braces are Redis Cluster's hash tag. A partition's states and its watermark lie in one slot,
so one MGET reads them and one script writes them, atomically. ``<model>`` is the checkpoint's
digest: a new model starts with states of its own. All models share the merchants. ``<slot>`` is
a small number that the merchant's id determines. A script changes keys of one slot only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import xxhash

MERCHANT_SLOTS = 16
"""Number of merchant slots. Enough to spread over a cluster as partitions do. Few enough to write
each slot's watermark with every poll of labels, and to read a micro-batch's merchants in one call
for each slot."""


def merchant_slot(merchant_id: str) -> int:
    """Return the slot of a merchant, in [0, MERCHANT_SLOTS)."""
    return xxhash.xxh3_64_intdigest(merchant_id.encode()) % MERCHANT_SLOTS


@dataclass(frozen=True)
class Keys:
    """Names of the keys of one model's states on one transactions topic.

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
        """Return the key of a partition's watermark."""
        return f"{self.prefix}:{self.model}:{{{self.topic}-{partition}}}".encode()

    def accounts(self, partition: int, account_ids: list[str]) -> list[bytes]:
        """Return the keys of accounts' states, in the given order."""
        start = f"{self.prefix}:{self.model}:{{{self.topic}-{partition}}}:"
        return [(start + account_id).encode() for account_id in account_ids]

    def answers(self, partition: int, transaction_ids: Sequence[str]) -> list[bytes]:
        """Return the keys of transactions' answers, in the given order.

        They hold no id, only its hash. No account's key ever equals one.
        """
        start = f"{self.prefix}:{self.model}:{{{self.topic}-{partition}}}=".encode()
        return [
            start + blake2b(name.encode(), digest_size=16).hexdigest().encode()
            for name in transaction_ids
        ]

    def replies(self, gateway_id: str) -> bytes:
        """Return the channel to which answers for a gateway are published."""
        return f"{self.prefix}:replies:{gateway_id}".encode()

    def evictions(self) -> bytes:
        """Return the key of the eviction record."""
        return f"{self.prefix}:evictions:{self.model}:{self.topic}".encode()

    def evictions_lock(self) -> bytes:
        """Return the key of the lock that lets only one worker repair at a time."""
        return self.evictions() + b":lock"

    def accounts_pattern(self, partition: int | None = None) -> str:
        """Return the SCAN pattern of this topic's states, of one partition or all.

        Other keys may match it, too: :meth:`account_of` tells them apart.
        """
        place = "*" if partition is None else partition
        return f"{self.prefix}:{self.model}:{{{self.topic}-{place}}}:*"

    def account_of(self, key: bytes) -> tuple[int, str] | None:
        """Return partition and account id of a state's key, or None for another key.

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
    """Names of the keys of merchants, which all models share.

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
        """Return the key of a merchant's profile."""
        name = merchant_id.encode()
        slot = xxhash.xxh3_64_intdigest(name) % MERCHANT_SLOTS
        return b"%b:merchant:{%d}:%b" % (self.prefix.encode(), slot, name)

    def labels_watermark(self, slot: int, topic: str, partition: int) -> bytes:
        """Return the key of a slot's watermark: all earlier labels of a partition are recorded."""
        return f"{self.prefix}:labels:{{{slot}}}:{topic}-{partition}".encode()

    def labels_log(self, topic: str, partition: int) -> bytes:
        """Return the key of the topic id of a partition's recorded labels."""
        return f"{self.prefix}:labels:{topic}-{partition}:id".encode()

    def note(self, slot: int, transaction_hash: int) -> bytes:
        """Return the key of a transaction's note."""
        return self.notes_begin(slot) + b"%016x" % transaction_hash

    def notes_begin(self, slot: int) -> bytes:
        """Return the prefix of the keys of a slot's notes."""
        return f"{self.prefix}:note:{{{slot}}}:".encode()

    def labels_watermarks(self, slot: int, topic: str, partitions: int) -> list[bytes]:
        """Return the keys of a slot's watermarks, one for each labels partition."""
        return [self.labels_watermark(slot, topic, partition) for partition in range(partitions)]

    def profiles_begin(self) -> bytes:
        """Return the prefix of all profile keys."""
        return f"{self.prefix}:merchant:{{".encode()


@dataclass(frozen=True)
class GatewayKeys:
    """Names of the keys that gateways share, whatever the model.

    >>> GatewayKeys("recur").rate("k3v9q2")
    b'recur:rate:k3v9q2'
    """

    prefix: str

    def api_keys(self) -> bytes:
        """Return the key of the hash of all API keys."""
        return f"{self.prefix}:api-keys".encode()

    def rate(self, principal: str) -> bytes:
        """Return the key of what a principal has taken from their rate limit."""
        return f"{self.prefix}:rate:{principal}".encode()

    def idempotency(self, principal: str, key: str) -> bytes:
        """Return the key of the content that came under a principal's Idempotency-Key."""
        digest = blake2b(f"{principal} {key}".encode(), digest_size=16).hexdigest()
        return f"{self.prefix}:idempotency:{digest}".encode()
