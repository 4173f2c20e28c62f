"""Merchants' features for micro-batches: loaded once in a time bucket, then held in memory.

Features look only at closed buckets, so what is computed for one transaction of a merchant
serves every other one that sees the same present bucket. A worker whose transactions come as
they happen asks Redis for a merchant once in three hours.
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
"""A present bucket that no transaction has."""


@dataclass(frozen=True)
class MissingProfiles:
    """Features of a micro-batch's merchants, as far as they are held in memory.

    Attributes:
        raw: float32[n, M]; rows of ``missing`` are not filled.
        missing: intp[k], which must be loaded.
        merchant_ids: n of them.
        timestamp_ms: int64[n], event time.
    """

    raw: NDArray[np.float32]
    missing: NDArray[np.intp]
    merchant_ids: Sequence[str]
    timestamp_ms: NDArray[np.int64]


class Merchants:
    """What a worker knows of merchants.

    Args:
        store: profiles.
        label_delay_ms: the checkpoint's.
        cached_max: merchants whose features are held; when there are more, all are forgotten.
    """

    def __init__(
        self,
        *,
        store: MerchantStore,
        patience: Retrier,
        metrics: Metrics,
        label_delay_ms: int,
        cached_max: int,
    ) -> None:
        self._store = store
        self._patience = patience
        self._metrics = metrics
        self._label_delay_ms = label_delay_ms
        self._cached_max = cached_max
        self._row_of: dict[str, int] = {}
        # The row after the last is that of every merchant that is not held.
        self._present = np.full(cached_max + 1, NONE_SEEN, np.int64)
        self._raw = np.zeros((cached_max + 1, M), np.float32)

    def look(self, merchant_ids: Sequence[str], timestamp_ms: NDArray[np.int64]) -> MissingProfiles:
        """What is held in memory of the merchants of n transactions."""
        unknown = self._cached_max
        get = self._row_of.get
        row = np.array([get(merchant, unknown) for merchant in merchant_ids], np.intp)
        missing = np.flatnonzero(self._present[row] != present_bucket(timestamp_ms))
        self._metrics.profiles.labels("cached").inc(len(row) - len(missing))
        return MissingProfiles(self._raw[row], missing, merchant_ids, timestamp_ms)

    async def fill(self, wanted: MissingProfiles) -> None:
        """Load what is missing, and hold the newest of it."""
        names = [wanted.merchant_ids[i] for i in wanted.missing.tolist()]
        place_of: dict[str, int] = {}
        place = np.array([place_of.setdefault(name, len(place_of)) for name in names], np.intp)
        values = await self._patience.retry_redis(lambda: self._store.load(list(place_of)))
        profiles, refused = decode_profiles(values)
        times = wanted.timestamp_ms[wanted.missing]
        raw = observe_merchants(profiles, place, times, self._label_delay_ms)
        wanted.raw[wanted.missing] = raw
        self._hold(list(place_of), place, present_bucket(times), raw)
        absent = values.count(None)
        counter = self._metrics.profiles
        counter.labels("refused").inc(refused)
        counter.labels("missing").inc(absent)
        counter.labels("loaded").inc(len(values) - absent - refused)

    def _hold(
        self,
        names: Sequence[str],
        place: NDArray[np.intp],
        present: NDArray[np.int64],
        raw: NDArray[np.float32],
    ) -> None:
        """Hold features of distinct merchants, seen from the newest present bucket of each."""
        if len(self._row_of) + len(names) > self._cached_max:
            self._row_of.clear()
            self._present[:] = NONE_SEEN
        row_of = self._row_of
        free = self._cached_max - len(row_of)
        rows = np.array([row_of.setdefault(name, len(row_of)) for name in names[:free]], np.intp)
        held = place < len(rows)
        place, present, raw = place[held], present[held], raw[held]
        order = np.argsort(present, kind="stable")  # of several for one merchant the newest stays
        rows = rows[place[order]]
        newer = present[order] >= self._present[rows]
        rows, order = rows[newer], order[newer]
        self._present[rows] = present[order]
        self._raw[rows] = raw[order]
