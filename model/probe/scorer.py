"""Scores of possible next transactions of accounts: many variants in one batch.

Probes reach features and network only through this module. The states are those of a worker:
histories, and hidden states rounded to float16 after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
from model.stepper import sigmoid
from model.training.sequences import one_core_each
from model.units import DAY_MS

CHUNK = 1024
"""Number of variants in a batch; larger products do not fit the cache."""

THREADS = 2
"""Chunks that are scored in parallel, each on one core; see :func:`one_core_each`."""

BUCKETS_PER_DAY = DAY_MS // BUCKET_MS

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Frauds:
    """Known frauds of one bucket of a merchant.

    Attributes:
        days_ago: age of the bucket.
        known_days_ago: days since the labels arrived.
        count: number of frauds.
        among: least number of transactions in the bucket, frauds included.
    """

    days_ago: float
    known_days_ago: float
    count: int
    among: int = 0


@dataclass(frozen=True)
class Merchant:
    """A merchant with the profile that its attributes describe.

    Attributes:
        per_day: transactions a day, spread evenly over the buckets.
        age_days: days since its first transaction; 0 is a merchant never seen.
        frauds: known frauds.
    """

    per_day: float
    age_days: float = 40.0
    frauds: tuple[Frauds, ...] = ()


UNKNOWN_MERCHANT = Merchant(0.0, 0.0)
USUAL_MERCHANT = Merchant(20.0)
SMALL_MERCHANT = Merchant(1.0)
LARGE_MERCHANT = Merchant(500_000.0)


def merchant_raw(merchants: Sequence[Merchant], now_ms: int, label_delay_ms: int) -> Float32:
    """Compute the raw features [m, M] of merchants for a transaction at ``now_ms``."""
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
    """States of n accounts.

    Attributes:
        history: histories of the features.
        hidden: [n, L, H] float32, rounded to float16.
        fields: [n, F] raw columns of the extra fields of the next transaction.
    """

    history: AccountHistory
    hidden: Float32
    fields: Float32

    def __len__(self) -> int:
        return len(self.history)

    def take(self, rows: Rows) -> ProbeStates:
        """Return copies of these rows in this order."""
        return ProbeStates(self.history.take(rows), self.hidden[rows], self.fields[rows])

    def put(self, rows: Rows, other: ProbeStates) -> None:
        """Overwrite these rows with the rows of ``other``."""
        self.history.put(rows, other.history)
        self.hidden[rows] = other.hidden
        self.fields[rows] = other.fields


class ProbeScorer:
    """Scorer of possible transactions by one checkpoint."""

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
        """Score several chunks in parallel, each on one core."""
        with one_core_each(THREADS) as self._pool:
            try:
                yield
            finally:
                self._pool = None

    @property
    def states_ranges(self) -> bool:
        """Whether the checkpoint states ranges of its inputs."""
        return bool(self._ranges)

    def merchants(self, merchants: Sequence[Merchant], now_ms: int) -> Float32:
        """Compute the raw features [m, M] of merchants."""
        return merchant_raw(merchants, now_ms, self.spec.label_delay_ms)

    def empty(self, n: int) -> ProbeStates:
        """Return the states of n accounts without a transaction; extra fields are missing."""
        fields = np.array(
            [np.nan if field.kind == "numeric" else 0.0 for field in self.spec.fields], np.float32
        )
        return ProbeStates(
            AccountHistory.empty(n),
            self.checkpoint.stepper.empty_hidden(n),
            np.tile(fields, (n, 1)),
        )

    def usual(self, states: ProbeStates) -> Float64:
        """Return the lesser of the usual and the mean amount of each account [n].

        It is at least the floor of amounts. Above it more money must not lower a score.
        """
        history, scale = states.history, self.spec.scale
        mean = history.decayed_amount[:, -1] / np.maximum(history.decayed_count[:, -1], 1.0)
        usual = np.minimum(history.usual_amount, mean).astype(np.float64)
        usual = np.where(history.count > 0, usual, scale.usual)
        return np.maximum(usual, scale.floor)

    def raw(
        self, states: ProbeStates, amount: Float64, timestamp_ms: Int64, merchant: Float32
    ) -> Float32:
        """Compute the raw features [n, R] of each account's next transaction.

        Args:
            states: of n accounts.
            amount: [n].
            timestamp_ms: [n].
            merchant: [n, M], or [1, M] for one merchant.
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
        """Score m variants of the next transaction.

        Args:
            states: of n accounts.
            rows: [m] account of each variant.
            amount: [m].
            timestamp_ms: [m].
            merchant: [m, M], or [1, M] for one merchant.
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
        """Apply a transaction of each account; return the scores [n] and the states after it."""
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
            rounded = hidden.astype(np.float16).astype(np.float32)
            after.put(rows, ProbeStates(history, rounded, taken.fields))

        self._each_chunk(len(states), advance)
        return scores, after

    def outside(self, raw: Float32) -> NDArray[np.bool_]:
        """Return which raw features [n, R] are out of the checkpoint's ranges."""
        with np.errstate(invalid="ignore"):
            return np.asarray((raw < self._low) | (raw > self._high))

    def range_of(self, name: str) -> tuple[float, float]:
        """Return the lowest and highest value of a raw feature before its input is clipped."""
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

    def _step(self, raw: Float32, hidden: Float32) -> tuple[Float32, Float32]:
        logits, advanced = self.checkpoint.stepper.step(self.checkpoint.encode(raw), hidden)
        return sigmoid(logits), advanced


def _part(merchant: Float32, chunk: slice) -> Float32:
    return merchant if len(merchant) == 1 else merchant[chunk]


def currency_scale(checkpoint: Checkpoint) -> float:
    """Return the factor from euros to the checkpoint's currency, a power of ten.

    It is 1 if the median amount is about 40. Amounts of the catalogue then look natural.
    """
    amounts = checkpoint.header.amounts
    if amounts is None or len(amounts.tail) < 2 or not amounts.tail[1] > 0:
        return 1.0
    return float(10.0 ** round(float(np.log10(amounts.tail[1] / 40.0))))


def _ranges(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Return the ranges by names of raw features; empty if the checkpoint states none."""
    stated = getattr(checkpoint.header.features, "ranges", None)
    if not stated:
        return {}
    pairs = (
        stated.items()
        if isinstance(stated, Mapping)
        else zip(checkpoint.header.features.names, stated, strict=False)
    )
    return {str(name): (float(pair[0]), float(pair[1])) for name, pair in pairs}
