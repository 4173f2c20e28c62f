"""Correct merchant profiles, computed from the scores and labels topics.

A worker counts a transaction in its merchant's profile with the transaction's first score. So the
scores topic holds everything that is counted. Workers record labels in the order of their
partition, and skip a label that is older than another one of its transaction. The weight of a
fraud comes from the label, else from the score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.features.merchant import BUCKET_MS, BUCKETS, COUNT_MAX, WEIGHT_MAX
from pipeline.messages.scores import CountedScore, source_offset
from pipeline.storage.merchant_profile import Fraud, Profile
from pipeline.storage.merchant_store import MerchantLabel
from pipeline.storage.transaction_note import TransactionNote

LATE_SOURCES_MAX = 100_000
"""Bound of how far a late score's transaction may precede that of the topic's first score."""

COMPACT_LENGTH = 2_000_000
"""Counted transactions between two compactions of the arrays."""

_BUCKET_BITS = 32
_BUCKET = (1 << _BUCKET_BITS) - 1


class MerchantCounts:
    """Number of transactions of each merchant in each time bucket.

    Memory: 16 bytes for each merchant and bucket, and one byte for each transaction.

    Attributes:
        row_of: row number of each merchant id.
    """

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self._keys: list[NDArray[np.int64]] = []
        self._numbers: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, merchant_ids: Sequence[str], timestamps_ms: Sequence[int]) -> None:
        """Count each of these transactions once."""
        rows = [self.row_of.setdefault(m, len(self.row_of)) for m in merchant_ids]
        buckets = np.array(timestamps_ms, np.int64) // BUCKET_MS
        self._keys.append((np.array(rows, np.int64) << _BUCKET_BITS) | buckets)
        self._numbers.append(np.ones(len(rows), np.int64))
        self._waiting += len(rows)
        if self._waiting > COMPACT_LENGTH:
            self._compact()

    def merge(self, other: MerchantCounts) -> None:
        """Add the counts of another instance."""
        other._compact()
        rows = [self.row_of.setdefault(m, len(self.row_of)) for m in other.row_of]
        keys = other._keys[0]
        own = np.array(rows, np.int64)[keys >> _BUCKET_BITS] << _BUCKET_BITS
        self._keys.append(own | (keys & _BUCKET))
        self._numbers.append(other._numbers[0])
        self._waiting += len(keys)

    def _compact(self) -> None:
        keys = np.concatenate([np.zeros(0, np.int64), *self._keys])
        numbers = np.concatenate([np.zeros(0, np.int64), *self._numbers])
        distinct, indices = np.unique(keys, return_inverse=True)
        sums = np.zeros(len(distinct), np.int64)
        np.add.at(sums, indices, numbers)
        self._keys, self._numbers, self._waiting = [distinct], [sums], 0

    def tables(self, merchant_ids: Sequence[str], heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64[n, BUCKETS]: counts of merchants in the buckets up to each one's head.

        Args:
            heads: int64[n]; bucket j has the position j % BUCKETS, as in a profile.
        """
        self._compact()
        keys, numbers = self._keys[0], self._numbers[0]
        found = np.zeros((len(merchant_ids), BUCKETS), np.int64)
        for i, merchant in enumerate(merchant_ids):
            row = self.row_of.get(merchant)
            if row is None:
                continue
            start, stop = np.searchsorted(
                keys, [row << _BUCKET_BITS, (row + 1) << _BUCKET_BITS]
            ).tolist()
            buckets = keys[start:stop] & _BUCKET
            retained = (buckets <= heads[i]) & (buckets > heads[i] - BUCKETS)
            found[i, buckets[retained] % BUCKETS] = numbers[start:stop][retained]
        return np.minimum(found, COUNT_MAX)

    def newest(self, merchant_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return int64[n]: each merchant's newest bucket; -1 for a merchant without one."""
        self._compact()
        keys = self._keys[0]
        found = np.full(len(merchant_ids), -1, np.int64)
        for i, merchant in enumerate(merchant_ids):
            row = self.row_of.get(merchant)
            if row is not None:
                stop = int(np.searchsorted(keys, (row + 1) << _BUCKET_BITS))
                if stop and keys[stop - 1] >> _BUCKET_BITS == row:
                    found[i] = keys[stop - 1] & _BUCKET
        return found


class FirstScores:
    """Filter that lets through the first score of each transaction of a partition.

    Args:
        prefix: begin of each source: ``topic:partition:``.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._base: int | None = None
        self._seen = bytearray()

    def source(self, score: CountedScore) -> int | None:
        """Return the transaction's offset; None for a further score or another partition's."""
        source = source_offset(score.source, self._prefix)
        if source is None:
            return None
        if self._base is None:
            self._base = max(0, source - LATE_SOURCES_MAX)
        index = source - self._base
        if index < 0:
            return source
        if index >= len(self._seen):
            self._seen.extend(bytes(max(index + 1 - len(self._seen), len(self._seen), 4096)))
        if self._seen[index]:
            return None
        self._seen[index] = 1
        return source


@dataclass(frozen=True)
class LoggedLabel:
    """A label in the labels topic."""

    partition: int
    booking: MerchantLabel


@dataclass(frozen=True)
class MerchantWeights:
    """Merchant weights from the scores topic.

    Attributes:
        of_transaction: stored weights below the full one, by hash of the transaction id.
        from_bucket: first bucket of which the topic holds all scores.
    """

    of_transaction: Mapping[int, int]
    from_bucket: int = 0

    def weight(self, entry: Fraud, stored: Mapping[int, int]) -> int:
        """Return the weight of a fraud whose labels have no weight.

        Args:
            stored: weights in the profile, by hash; they count where the score is deleted.
        """
        found = self.of_transaction.get(entry.id_hash)
        if found is not None:
            return found
        if entry.bucket < self.from_bucket:
            return stored.get(entry.id_hash, WEIGHT_MAX)
        return WEIGHT_MAX


def frauds_of(
    labels: Iterable[LoggedLabel],
    booked_to: Sequence[int],
    weights: MerchantWeights,
    stored: Sequence[Fraud] = (),
    retained: Sequence[Fraud] = (),
) -> list[Fraud]:
    """Return a merchant's known frauds after its labels are recorded.

    Args:
        labels: the merchant's labels, in the order of their partition.
        booked_to: by partition, the offset up to which workers have recorded labels.
        stored: frauds in its profile.
        retained: frauds whose labels the log no longer holds.
    """
    profile = Profile(frauds=list(retained))
    notes: dict[int, TransactionNote] = {}
    weight_of = {fraud.id_hash: fraud.weight for fraud in stored}
    for label in labels:
        booking, entry = label.booking, label.booking.entry
        if booking.offset >= booked_to[label.partition]:
            continue
        before = notes.get(entry.id_hash)
        if before is None:
            before = TransactionNote(weight=weights.weight(entry, weight_of))
        note = before.with_label(booking.labelled_ms, booking.label_weight)
        if note is not None:
            notes[entry.id_hash] = note
            profile.record(replace(entry, weight=note.weight), booking.is_fraud)
    return profile.frauds


def correction(
    stored: NDArray[np.int64],
    least: NDArray[np.int64],
    due: NDArray[np.int64],
    most: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the numbers to add to counts; 0 where a count may be right.

    Args:
        stored: counts in profiles.
        least: transactions that must be counted.
        due: transactions that were most likely counted when the profiles were read.
        most: all transactions that may be counted. Workers applied those between ``least`` and
            ``most`` while the profiles were read.
    """
    least, due, most = (np.minimum(counts, COUNT_MAX) for counts in (least, due, most))
    return np.where((stored < least) | (stored > most), due - stored, 0)
