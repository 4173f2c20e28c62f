"""A merchant's profile as bytes, and many profiles as columns.

    format u8, 3 spare, head u32       8 bytes
    ring of counts u16               640 bytes, bucket j at j % BUCKETS
    known frauds                      16 bytes each: transaction id's hash u64, its bucket u32,
                                      merchant weight u8, the bucket in which the label came u24

All numbers are big-endian, as Redis's BITFIELD expects: workers add to the ring in place. A
value of another format or size counts as absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from model.features.merchant import BUCKETS, WEIGHT_MAX, MerchantProfiles

PROFILE_FORMAT = 3
"""Version of the layout; raise it with every change of the layout."""

HEAD_NONE = 0xFFFF_FFFF
"""Head of a profile without transactions."""

HEADER_BYTES = 8
FIXED_BYTES = HEADER_BYTES + 2 * BUCKETS
FRAUD_BYTES = 16

FRAUDS_MAX = 1000
"""Maximum number of known frauds in a profile; the oldest entries are dropped."""

FRAUD_BUCKETS_MAX = 384
"""Buckets (48 days): a new label drops known frauds that are older by this much."""

KNOWN_BITS = 24
KNOWN_MAX = (1 << KNOWN_BITS) - 1
"""Last bucket for a label's arrival, in the year 7711; a later arrival counts as this one."""

FIXED = np.dtype(
    [("format", "u1"), ("spare", "u1", (3,)), ("head", ">u4"), ("counts", ">u2", (BUCKETS,))]
)
FRAUD = np.dtype([("id_hash", ">u8"), ("bucket", ">u4"), ("weight_known", ">u4")])
EMPTY_VALUE = np.array(
    (PROFILE_FORMAT, (0, 0, 0), HEAD_NONE, np.zeros(BUCKETS, "u2")), FIXED
).tobytes()
assert FIXED.itemsize == FIXED_BYTES == len(EMPTY_VALUE)
assert FRAUD.itemsize == FRAUD_BYTES


@dataclass(frozen=True)
class Fraud:
    """A known fraud of a merchant.

    Attributes:
        id_hash: hash of the transaction's id.
        bucket: time bucket of the transaction.
        known: time bucket in which the first fraud label arrived.
        weight: merchant weight, up to :data:`model.features.merchant.WEIGHT_MAX`.
    """

    id_hash: int
    bucket: int
    known: int
    weight: int = WEIGHT_MAX


@dataclass
class Profile:
    """One merchant's profile, with the operations of the Lua scripts in Python.

    Attributes:
        head: the newest bucket that ``counts`` holds; -1 before the first.
        counts: uint16[BUCKETS], bucket j at j % BUCKETS.
        frauds: known frauds in the order in which they were recorded.
    """

    head: int = -1
    counts: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(BUCKETS, np.uint16))
    frauds: list[Fraud] = field(default_factory=list)

    def count(self, bucket: int, n: int) -> bool:
        """Add n transactions to a bucket, unless it is older than the ring.

        Returns:
            whether the ring moved forward.
        """
        moved = bucket > self.head
        if moved:
            gap = min(bucket - self.head, BUCKETS) if self.head >= 0 else BUCKETS
            self.counts[np.arange(bucket - gap + 1, bucket + 1) % BUCKETS] = 0
            self.head = bucket
        if bucket > self.head - BUCKETS:
            place = bucket % BUCKETS
            self.counts[place] = min(65_535, int(self.counts[place]) + n)
        return moved

    def record(self, fraud: Fraud, is_fraud: bool) -> bool:
        """Record the newest label of a transaction so far.

        A repeated fraud label changes the weight but keeps the time of the first one: features
        computed since then depend on it.

        Returns:
            whether the profile changed.
        """
        same = [f for f in self.frauds if f.id_hash == fraud.id_hash]
        others = [f for f in self.frauds if f.id_hash != fraud.id_hash]
        if not is_fraud:
            self.frauds = others
            return bool(same)
        entry = replace(fraud, known=same[0].known if same else fraud.known)
        oldest = fraud.known - FRAUD_BUCKETS_MAX
        self.frauds = [*(f for f in others if f.bucket > oldest), entry][-FRAUDS_MAX:]
        return True

    def set_weight(self, id_hash: int, weight: int) -> bool:
        """Change the weight of a known fraud.

        Returns:
            whether the profile changed.
        """
        before = list(self.frauds)
        self.frauds = [replace(f, weight=weight) if f.id_hash == id_hash else f for f in before]
        return self.frauds != before

    def to_bytes(self) -> bytes:
        """Return the value that Redis holds."""
        fixed = np.zeros(1, FIXED)
        fixed["format"] = PROFILE_FORMAT
        fixed["head"] = HEAD_NONE if self.head < 0 else self.head
        fixed["counts"] = self.counts
        return fixed.tobytes() + b"".join(encode_frauds(self.frauds))

    @classmethod
    def from_bytes(cls, value: bytes) -> Profile:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: the value has another format or size.
        """
        if not is_valid(value):
            raise ValueError(f"a merchant profile of {len(value)} bytes in an unknown format")
        fixed = np.frombuffer(value, FIXED, 1)[0]
        head = int(fixed["head"])
        frauds = [
            Fraud(id_hash, bucket, packed & KNOWN_MAX, packed >> KNOWN_BITS)
            for id_hash, bucket, packed in np.frombuffer(value, FRAUD, -1, FIXED_BYTES).tolist()
        ]
        return cls(-1 if head == HEAD_NONE else head, fixed["counts"].astype(np.uint16), frauds)


def is_valid(value: bytes) -> bool:
    """Return whether a value is a profile in this format."""
    size = len(value)
    return (
        size >= FIXED_BYTES
        and value[0] == PROFILE_FORMAT
        and (size - FIXED_BYTES) % FRAUD_BYTES == 0
    )


def decode_profiles(values: Sequence[bytes | None]) -> tuple[MerchantProfiles, int]:
    """Decode n values into columns; None is an unknown merchant.

    Returns:
        the profiles, and the number of invalid values, which count as None.
    """
    invalid = 0
    fixed: list[bytes] = []
    tails: list[bytes] = []
    tail_rows: list[int] = []
    for row, value in enumerate(values):
        if value is None:
            fixed.append(EMPTY_VALUE)
        elif len(value) == FIXED_BYTES and value[0] == PROFILE_FORMAT:
            fixed.append(value)
        elif is_valid(value):
            fixed.append(value[:FIXED_BYTES])
            tails.append(value[FIXED_BYTES:])
            tail_rows.append(row)
        else:
            fixed.append(EMPTY_VALUE)
            invalid += 1
    table = np.frombuffer(b"".join(fixed), FIXED)
    head = table["head"].astype(np.int64)
    head[head == HEAD_NONE] = -1
    frauds = np.frombuffer(b"".join(tails), FRAUD)
    counts_of_rows = [len(tail) // FRAUD_BYTES for tail in tails]
    return (
        MerchantProfiles(
            head=head,
            counts=table["counts"].astype(np.uint16),
            fraud_row=np.repeat(np.array(tail_rows, np.intp), counts_of_rows),
            fraud_bucket=frauds["bucket"].astype(np.int64),
            fraud_known=(frauds["weight_known"] & KNOWN_MAX).astype(np.int64),
            fraud_weight=(frauds["weight_known"] >> KNOWN_BITS).astype(np.uint8),
        ),
        invalid,
    )


def transaction_hash(transaction_id: str) -> int:
    """Hash a transaction's id, as profiles and notes hold it, uint64."""
    return xxhash.xxh3_64_intdigest(transaction_id.encode())


def encode_frauds(frauds: Sequence[Fraud]) -> list[bytes]:
    """Encode known frauds, each as an entry of 16 bytes."""
    entries: NDArray[Any] = np.array(
        [(f.id_hash, f.bucket, f.weight << KNOWN_BITS | min(f.known, KNOWN_MAX)) for f in frauds],
        FRAUD,
    )
    blob = entries.tobytes()
    return [blob[start : start + FRAUD_BYTES] for start in range(0, len(blob), FRAUD_BYTES)]
