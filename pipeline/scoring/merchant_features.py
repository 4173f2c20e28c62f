"""Merchants' features for micro-batches: loaded once in a time bucket, then held in memory.

Features depend on closed buckets only. So a merchant's features are the same for all its
transactions in one bucket. A worker of live transactions loads a merchant once in three hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES, observe_merchants, present_bucket
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.retry import Retrier
from pipeline.storage.merchant_profile import decode_profiles
from pipeline.storage.merchant_store import MerchantStore

M = len(MERCHANT_FEATURES)
NONE_SEEN = -1
"""Bucket number that no transaction has."""


@dataclass(frozen=True)
class BatchMerchantFeatures:
    """Features of a micro-batch's merchants; those not in memory must still be loaded.

    Attributes:
        raw: float32[n, M]; the rows of ``missing`` are not filled yet.
        missing: intp[k], the rows to load.
        merchant_ids: n ids.
        timestamp_ms: int64[n], event time.
    """

    raw: NDArray[np.float32]
    missing: NDArray[np.intp]
    merchant_ids: Sequence[str]
    timestamp_ms: NDArray[np.int64]


class MerchantFeatureCache:
    """Cache of merchants' features.

    Args:
        store: profiles.
        label_delay_ms: label delay of the checkpoint.
        size_max: maximum number of merchants; a merchant too many clears the cache.
    """

    def __init__(
        self,
        *,
        store: MerchantStore,
        retrier: Retrier,
        metrics: Metrics,
        label_delay_ms: int,
        size_max: int,
    ) -> None:
        self._store = store
        self._retrier = retrier
        self._metrics = metrics
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
        self._metrics.profiles.labels("cached").inc(len(row) - len(missing))
        return BatchMerchantFeatures(self._raw[row], missing, merchant_ids, timestamp_ms)

    async def load(self, features: BatchMerchantFeatures) -> None:
        """Load the missing features, and cache the newest of each merchant."""
        names = [features.merchant_ids[i] for i in features.missing.tolist()]
        place_of: dict[str, int] = {}
        place = np.array([place_of.setdefault(name, len(place_of)) for name in names], np.intp)
        values = await self._retrier.retry_redis(lambda: self._store.load(list(place_of)))
        profiles, invalid = decode_profiles(values)
        times = features.timestamp_ms[features.missing]
        raw = observe_merchants(profiles, place, times, self._label_delay_ms)
        features.raw[features.missing] = raw
        self._put(list(place_of), place, present_bucket(times), raw)
        absent = values.count(None)
        counter = self._metrics.profiles
        counter.labels("refused").inc(invalid)
        counter.labels("missing").inc(absent)
        counter.labels("loaded").inc(len(values) - absent - invalid)

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
        order = np.argsort(
            present, kind="stable"
        )  # a merchant's newest features come last and stay
        rows = rows[place[order]]
        newer = present[order] >= self._present[rows]
        rows, order = rows[newer], order[newer]
        self._present[rows] = present[order]
        self._raw[rows] = raw[order]
