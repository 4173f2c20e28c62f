"""What merchants' profiles must be, computed from the scores and labels topics.

A transaction is counted in its merchant's profile when its score is published for the first time;
so the scores tell what is counted. A label is booked in the order of its partition, but for one
that is older than another of its transaction; a fraud weighs what the label tells, or the score.
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

SOURCES_BEFORE = 100_000
"""A score that is published late may be of a transaction so much before the topic's first."""

_COMPACT = 2_000_000
_BUCKET_BITS = 32
_BUCKET = (1 << _BUCKET_BITS) - 1


class MerchantCounts:
    """How many transactions each merchant had in each time bucket.

    Memory: 16 bytes for each merchant and bucket, and one byte for each transaction.

    Attributes:
        row_of: of each merchant id.
    """

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self._keys: list[NDArray[np.int64]] = []
        self._numbers: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, merchant_ids: Sequence[str], timestamps_ms: Sequence[int]) -> None:
        """Count transactions, each once."""
        rows = [self.row_of.setdefault(m, len(self.row_of)) for m in merchant_ids]
        buckets = np.array(timestamps_ms, np.int64) // BUCKET_MS
        self._keys.append((np.array(rows, np.int64) << _BUCKET_BITS) | buckets)
        self._numbers.append(np.ones(len(rows), np.int64))
        self._waiting += len(rows)
        if self._waiting > _COMPACT:
            self._compact()

    def absorb(self, other: MerchantCounts) -> None:
        """Count what another has counted."""
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
        distinct, places = np.unique(keys, return_inverse=True)
        sums = np.zeros(len(distinct), np.int64)
        np.add.at(sums, places, numbers)
        self._keys, self._numbers, self._waiting = [distinct], [sums], 0

    def tables(self, merchant_ids: Sequence[str], heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[n, BUCKETS]: counts of merchants in the buckets up to each one's head.

        Args:
            heads: int64[n]; bucket j stands at j % BUCKETS, as in a profile.
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
            kept = (buckets <= heads[i]) & (buckets > heads[i] - BUCKETS)
            found[i, buckets[kept] % BUCKETS] = numbers[start:stop][kept]
        return np.minimum(found, COUNT_MAX)

    def newest(self, merchant_ids: Sequence[str]) -> NDArray[np.int64]:
        """int64[n]: each merchant's newest bucket; -1 where it has none."""
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
    """Which of a partition's scores is the first one of its transaction.

    Args:
        prefix: what sources begin with: ``topic:partition:``.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._base: int | None = None
        self._seen = bytearray()

    def source(self, score: CountedScore) -> int | None:
        """The transaction's offset; None for a further score, and for what is none."""
        source = source_offset(score.source, self._prefix)
        if source is None:
            return None
        if self._base is None:
            self._base = max(0, source - SOURCES_BEFORE)
        place = source - self._base
        if place < 0:
            return source
        if place >= len(self._seen):
            self._seen.extend(bytes(max(place + 1 - len(self._seen), len(self._seen), 4096)))
        if self._seen[place]:
            return None
        self._seen[place] = 1
        return source


@dataclass(frozen=True)
class LoggedLabel:
    """A label as the labels topic has it."""

    partition: int
    booking: MerchantLabel


@dataclass(frozen=True)
class MerchantWeights:
    """How far transactions explain a fraud, by their scores.

    Attributes:
        of_transaction: stored weights under the full one, by hash of the transaction id.
        from_bucket: scores of transactions before it may be deleted.
    """

    of_transaction: Mapping[int, int]
    from_bucket: int = 0

    def weight(self, entry: Fraud, standing: Mapping[int, int]) -> int:
        """The weight of a fraud whose labels tell none.

        Args:
            standing: weights in the profile, by hash: what counts where the log says nothing.
        """
        found = self.of_transaction.get(entry.id_hash)
        if found is not None:
            return found
        if entry.bucket < self.from_bucket:
            return standing.get(entry.id_hash, WEIGHT_MAX)
        return WEIGHT_MAX


def frauds_of(
    labels: Iterable[LoggedLabel],
    booked_to: Sequence[int],
    weights: MerchantWeights,
    standing: Sequence[Fraud] = (),
    kept: Sequence[Fraud] = (),
) -> list[Fraud]:
    """A merchant's known frauds after its labels are booked.

    Args:
        labels: the merchant's, in the order of their partition.
        booked_to: by partition, the offset up to which labels are booked.
        standing: those in its profile.
        kept: frauds whose labels the log has no more.
    """
    profile = Profile(frauds=list(kept))
    notes: dict[int, TransactionNote] = {}
    weight_of = {fraud.id_hash: fraud.weight for fraud in standing}
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
    standing: NDArray[np.int64],
    least: NDArray[np.int64],
    due: NDArray[np.int64],
    most: NDArray[np.int64],
) -> NDArray[np.int64]:
    """What is to be added to counts; 0 where they may be right.

    Args:
        standing: counts in profiles.
        least, most: transactions that must be in them, and all that may be: those between were
            applied while the profiles were read.
        due: those that were most likely applied when they were read.
    """
    least, due, most = (np.minimum(counts, COUNT_MAX) for counts in (least, due, most))
    return np.where((standing < least) | (standing > most), due - standing, 0)
