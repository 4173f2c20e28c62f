"""Merchants' features for micro-batches: loaded once in a time bucket, then held in memory.

Features depend on closed buckets only. So a merchant's features are the same for all its
transactions in one bucket. A worker of live transactions loads a merchant once in three hours.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES, observe_merchants, present_bucket
from pipeline.scoring.metrics import Metrics, add
from pipeline.storage.merchant_profile import decode_profiles

M = len(MERCHANT_FEATURES)
NONE_SEEN = -1
"""Bucket number that no transaction has."""


class BatchMerchantFeatures(msgspec.Struct, frozen=True, eq=False):
    """Features of a micro-batch's merchants; those not in memory must still be loaded.

    Attributes:
        raw: float32[n, M]; the rows of ``missing`` are not filled yet.
        missing: intp[k], the rows to load.
        place: intp[k], place of each missing row's merchant in ``merchant_ids``.
        merchant_ids: the distinct merchants to load.
        timestamp_ms: int64[k], event time of each missing row.
    """

    raw: NDArray[np.float32]
    missing: NDArray[np.intp]
    place: NDArray[np.intp]
    merchant_ids: list[str]
    timestamp_ms: NDArray[np.int64]


class MerchantFeatureCache:
    """Cache of merchants' features.

    Args:
        metrics: count the merchants by where their features came from.
        label_delay_ms: label delay of the checkpoint.
        size_max: maximum number of merchants; a merchant too many clears the cache.
    """

    def __init__(
        self,
        *,
        metrics: Metrics,
        label_delay_ms: int,
        size_max: int,
    ) -> None:
        self._counters = metrics.profile_results
        self._label_delay_ms = label_delay_ms
        self._size_max = size_max
        self._row_of: dict[str, int] = {}
        # The extra row at the end stands for every merchant that is not in the cache.
        self._present = np.full(size_max + 1, NONE_SEEN, np.int64)
        self._raw = np.zeros((size_max + 1, M), np.float32)

    def look_up(
        self, merchant_ids: Sequence[str], timestamp_ms: NDArray[np.int64]
    ) -> BatchMerchantFeatures:
        """Return the cached features of the merchants of n transactions."""
        unknown = self._size_max
        get = self._row_of.get
        row = np.array([get(merchant, unknown) for merchant in merchant_ids], np.intp)
        missing = np.flatnonzero(self._present[row] != present_bucket(timestamp_ms))
        add(self._counters["cached"], len(row) - len(missing))
        place_of: dict[str, int] = {}
        place = [place_of.setdefault(merchant_ids[i], len(place_of)) for i in missing.tolist()]
        return BatchMerchantFeatures(
            self._raw[row],
            missing,
            np.array(place, np.intp),
            list(place_of),
            timestamp_ms[missing],
        )

    def fill(self, features: BatchMerchantFeatures, values: Sequence[bytes | None]) -> None:
        """Fill in the missing features, and cache the newest of each merchant.

        Args:
            values: the store's value for each of ``features.merchant_ids``; None if absent.
        """
        profiles, invalid = decode_profiles(values)
        place, times = features.place, features.timestamp_ms
        raw = observe_merchants(profiles, place, times, self._label_delay_ms)
        features.raw[features.missing] = raw
        self._put(features.merchant_ids, place, present_bucket(times), raw)
        absent = values.count(None)
        add(self._counters["invalid"], invalid)
        add(self._counters["missing"], absent)
        add(self._counters["loaded"], len(values) - absent - invalid)

    def _put(
        self,
        names: Sequence[str],
        place: NDArray[np.intp],
        present: NDArray[np.int64],
        raw: NDArray[np.float32],
    ) -> None:
        """Cache features of distinct merchants, each as of its newest bucket."""
        if len(self._row_of) + len(names) > self._size_max:
            self._row_of.clear()
            self._present[:] = NONE_SEEN
        row_of = self._row_of
        free = self._size_max - len(row_of)
        rows = np.array([row_of.setdefault(name, len(row_of)) for name in names[:free]], np.intp)
        held = place < len(rows)
        place, present, raw = place[held], present[held], raw[held]
        # A merchant's newest features come last and stay.
        order = np.argsort(present, kind="stable")
        rows = rows[place[order]]
        newer = present[order] >= self._present[rows]
        rows, order = rows[newer], order[newer]
        self._present[rows] = present[order]
        self._raw[rows] = raw[order]
