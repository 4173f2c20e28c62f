"""Scores of what an account might do next: many variants of a transaction in one batch.

Everything that a probe knows of features and network goes through this module. ProbeStates are what
a worker holds: histories, and hidden states rounded to float16 after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint import Checkpoint
from model.features.account import AccountHistory, Float32, Float64, Int64, observe
from model.features.merchant import (
    BUCKET_MS,
    BUCKETS,
    COUNT_MAX,
    DEPTH,
    WEIGHT_MAX,
    MerchantProfiles,
    bucket_of,
    observe_merchants,
    present_bucket,
)
from model.training.sequences import one_core_each
from model.units import DAY_MS

CHUNK = 1024
"""Variants that are scored at once: larger products do not fit the cache."""

THREADS = 2
"""Chunks that are scored at once, each on one core; see :func:`one_core_each`."""

BUCKETS_PER_DAY = DAY_MS // BUCKET_MS

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Frauds:
    """Known frauds of one bucket of a merchant.

    Attributes:
        days_ago: age of the bucket.
        known_days_ago: when the labels arrived.
        count: frauds.
        among: transactions that the bucket holds at least, the frauds included.
    """

    days_ago: float
    known_days_ago: float
    count: int
    among: int = 0


@dataclass(frozen=True)
class Merchant:
    """A merchant as its profile shows it.

    Attributes:
        per_day: transactions, spread evenly over the day's buckets.
        age_days: since its first transaction; 0 is a merchant never seen.
        frauds: known ones.
    """

    per_day: float
    age_days: float = 40.0
    frauds: tuple[Frauds, ...] = ()


UNKNOWN_MERCHANT = Merchant(0.0, 0.0)
USUAL_MERCHANT = Merchant(20.0)
SMALL_MERCHANT = Merchant(1.0)
LARGE_MERCHANT = Merchant(500_000.0)


def merchant_raw(merchants: Sequence[Merchant], now_ms: int, label_delay_ms: int) -> Float32:
    """Raw features [m, M] of merchants, as a transaction at ``now_ms`` sees them."""
    present = int(present_bucket(np.array([now_ms]))[0])
    head = int(bucket_of(np.array([now_ms]))[0])
    counts = np.zeros((len(merchants), BUCKETS), np.int64)
    row: list[int] = []
    bucket: list[int] = []
    known: list[int] = []
    for i, merchant in enumerate(merchants):
        depth = min(round(merchant.age_days * BUCKETS_PER_DAY), DEPTH)
        ages = np.arange(depth, 0, -1)  # buckets before the present one
        so_far = np.floor(np.arange(depth + 1) * merchant.per_day / BUCKETS_PER_DAY)
        counts[i, (present - ages) % BUCKETS] = np.diff(so_far).astype(np.int64)
        for frauds in merchant.frauds:
            of = present - max(1, round(frauds.days_ago * BUCKETS_PER_DAY))
            at = present - max(1, round(frauds.known_days_ago * BUCKETS_PER_DAY))
            if of > present - BUCKETS:
                place = of % BUCKETS
                counts[i, place] = max(int(counts[i, place]), frauds.count, frauds.among)
            row += [i] * frauds.count
            bucket += [of] * frauds.count
            known += [at] * frauds.count
    profiles = MerchantProfiles(
        head=np.full(len(merchants), head, np.int64),
        counts=np.minimum(counts, COUNT_MAX).astype(np.uint16),
        fraud_row=np.array(row, np.intp),
        fraud_bucket=np.array(bucket, np.int64),
        fraud_known=np.array(known, np.int64),
        fraud_weight=np.full(len(row), WEIGHT_MAX, np.uint8),
    )
    rows = np.arange(len(merchants))
    return observe_merchants(profiles, rows, np.full(len(merchants), now_ms), label_delay_ms)


@dataclass
class ProbeStates:
    """ProbeStates of n accounts.

    Attributes:
        history: what the features remember.
        hidden: [n, L, H] float32, rounded to float16.
        fields: [n, F] raw columns of further fields, as the next transaction has them.
    """

    history: AccountHistory
    hidden: Tensor
    fields: Float32

    def __len__(self) -> int:
        return len(self.history)

    def take(self, rows: Rows) -> ProbeStates:
        """Copies of those rows, in that order."""
        return ProbeStates(
            self.history.take(rows), self.hidden[torch.from_numpy(rows)], self.fields[rows]
        )

    def put(self, rows: Rows, other: ProbeStates) -> None:
        """Overwrites those rows by the rows of ``other``."""
        self.history.put(rows, other.history)
        self.hidden[torch.from_numpy(rows)] = other.hidden
        self.fields[rows] = other.fields


class ProbeScorer:
    """A checkpoint's scores of transactions that accounts might make.

    Args:
        checkpoint: on the CPU.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.header.features
        self.names = self.spec.names
        self.scale = currency_scale(checkpoint)
        self._pool: ThreadPoolExecutor | None = None
        self._ranges = _ranges(checkpoint)
        self._low, self._high = (
            np.array([self._ranges.get(name, (-np.inf, np.inf))[side] for name in self.names])
            for side in (0, 1)
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep each product on one core and score several chunks at once."""
        with one_core_each(THREADS) as self._pool:
            try:
                yield
            finally:
                self._pool = None

    @property
    def states_ranges(self) -> bool:
        """Whether the checkpoint says how far each of its inputs reaches."""
        return bool(self._ranges)

    def merchants(self, merchants: Sequence[Merchant], now_ms: int) -> Float32:
        """Raw features [m, M] of merchants."""
        return merchant_raw(merchants, now_ms, self.spec.label_delay_ms)

    def empty(self, n: int) -> ProbeStates:
        """ProbeStates of n accounts without a transaction; further fields are missing."""
        fields = np.array(
            [np.nan if field.kind == "numeric" else 0.0 for field in self.spec.fields], np.float32
        )
        return ProbeStates(
            AccountHistory.empty(n),
            self.checkpoint.network.empty_hidden(n),
            np.tile(fields, (n, 1)),
        )

    def usual(self, states: ProbeStates) -> Float64:
        """What is usual for each account [n]: the lesser of its usual and its mean amount.

        It is at least the floor of amounts. From it on more money must not lower a score.
        """
        history, scale = states.history, self.spec.scale
        mean = history.decayed_amount[:, -1] / np.maximum(history.decayed_count[:, -1], 1.0)
        usual = np.minimum(history.usual_amount, mean).astype(np.float64)
        usual = np.where(history.count > 0, usual, scale.usual)
        return np.maximum(usual, scale.floor)

    def raw(
        self, states: ProbeStates, amount: Float64, timestamp_ms: Int64, merchant: Float32
    ) -> Float32:
        """Raw features [n, R] of each account's next transaction.

        Args:
            merchant: [n, M], or [1, M] of one merchant for all.
        """
        return self._observed(states, amount, timestamp_ms, merchant)[0]

    def scores(
        self,
        states: ProbeStates,
        rows: Rows,
        amount: Float64,
        timestamp_ms: Int64,
        merchant: Float32,
    ) -> Float32:
        """Scores [m] of m variants, each the next transaction of a row of ``states``.

        Args:
            merchant: [m, M], or [1, M] of one merchant for all.
        """
        scores = np.empty(len(rows), np.float32)

        def score(begin: int) -> None:
            chunk = slice(begin, begin + CHUNK)
            taken = states.take(rows[chunk])
            raw, _ = self._observed(
                taken, amount[chunk], timestamp_ms[chunk], _part(merchant, chunk)
            )
            scores[chunk] = self._step(raw, taken.hidden)[0]

        self._each_chunk(len(rows), score)
        return scores

    def advance(
        self, states: ProbeStates, amount: Float64, timestamp_ms: Int64, merchant: Float32
    ) -> tuple[Float32, ProbeStates]:
        """Scores [n] of a transaction of each account, and the states after it."""
        scores = np.empty(len(states), np.float32)
        after = states.take(np.arange(len(states)))

        def advance(begin: int) -> None:
            chunk = slice(begin, begin + CHUNK)
            rows = np.arange(len(states))[chunk]
            taken = states.take(rows)
            raw, history = self._observed(
                taken, amount[chunk], timestamp_ms[chunk], _part(merchant, chunk)
            )
            scores[chunk], hidden = self._step(raw, taken.hidden)
            rounded = hidden.to(torch.float16).to(torch.float32)
            after.put(rows, ProbeStates(history, rounded, taken.fields))

        self._each_chunk(len(states), advance)
        return scores, after

    def outside(self, raw: Float32) -> NDArray[np.bool_]:
        """Which raw features [n, R] lie past the checkpoint's ranges; none if it states none."""
        with np.errstate(invalid="ignore"):
            return np.asarray((raw < self._low) | (raw > self._high))

    def range_of(self, name: str) -> tuple[float, float]:
        """Lowest and highest value of a raw feature that the network distinguishes."""
        return self._ranges.get(name, (-np.inf, np.inf))

    def _each_chunk(self, rows: int, work: Callable[[int], None]) -> None:
        begins = range(0, rows, CHUNK)
        if self._pool is None or len(begins) == 1:
            for begin in begins:
                work(begin)
        else:
            for _ in self._pool.map(work, begins):
                pass

    def _observed(
        self, states: ProbeStates, amount: Float64, timestamp_ms: Int64, merchant: Float32
    ) -> tuple[Float32, AccountHistory]:
        of_account, history = observe(states.history, amount, timestamp_ms, self.spec.scale)
        of_merchant = np.broadcast_to(merchant, (len(amount), merchant.shape[1]))
        return np.hstack((of_account, of_merchant, states.fields)), history

    def _step(self, raw: Float32, hidden: Tensor) -> tuple[Float32, Tensor]:
        inputs = torch.from_numpy(self.checkpoint.encode(raw))
        with torch.inference_mode():
            logits, advanced = self.checkpoint.network.step(inputs, hidden)
            return torch.sigmoid(logits).numpy(), advanced


def _part(merchant: Float32, chunk: slice) -> Float32:
    return merchant if len(merchant) == 1 else merchant[chunk]


def currency_scale(checkpoint: Checkpoint) -> float:
    """What an amount in euros is multiplied by: a power of ten, 1 where the median is about 40.

    A catalogue of amounts then reads as people of that currency write them.
    """
    amounts = checkpoint.header.amounts
    if amounts is None or len(amounts.tail) < 2 or not amounts.tail[1] > 0:
        return 1.0
    return float(10.0 ** round(float(np.log10(amounts.tail[1] / 40.0))))


def _ranges(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Ranges by the names of raw features; empty if the checkpoint states none."""
    stated = getattr(checkpoint.header.features, "ranges", None)
    if not stated:
        return {}
    pairs = (
        stated.items()
        if isinstance(stated, Mapping)
        else zip(checkpoint.header.features.names, stated, strict=False)
    )
    return {str(name): (float(pair[0]), float(pair[1])) for name, pair in pairs}
