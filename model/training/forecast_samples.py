"""Samples for the forecast head: accounts at moments of asking, and their days after them.

    log -> states along the serving path -> (account, moment) pairs -> inputs and the days to come

A state is what Redis holds: it is computed step by step, with float16 rounding. A third of the
samples are of accounts that began at a random payment, so that short histories are known too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.features.account import ACCOUNT_FEATURES, AccountHistory, Float32, observe
from model.features.spec import Encoder, FeatureSpec
from model.forecast.inputs import AskedStates, asked_states, weekday_of
from model.forecast.shape import DAYS_MAX
from model.stepper import Stepper
from model.training.sequences import Sequences
from model.units import DAY_MS, HOUR_MS

ACCOUNTS_MAX = 20_000
"""Most accounts from which samples are taken. Above it, a random sample."""

TRANSACTIONS_MAX = 4_000_000
"""Most transactions that are stepped through for one set of samples; fewer accounts then."""

SHORTEST_AGE_MS = HOUR_MS
"""Shortest time from an account's first payment to the moment of asking."""

Rows = NDArray[np.intp]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Moments:
    """Moments of asking.

    Attributes:
        part: [m] places in the sequences.
        position: [m] positions in ``sequences.row`` of the last payment before.
        asked_ms: [m] epoch milliseconds.
    """

    part: Rows
    position: Rows
    asked_ms: Int64


@dataclass(frozen=True)
class DaysAfter:
    """The truth of m forecasts of T days.

    Attributes:
        count: [m, T] payments.
        amount: [m, T] sum of the amounts.
        largest: [m, T] largest payment; 0 without one.
        is_fraud: [m, T] whether a payment is fraud.
        known: [m, T] whether the data have the day.
        weekday: [m, T] 0 is Monday.
    """

    count: Float32
    amount: Float32
    largest: Float32
    is_fraud: NDArray[np.bool_]
    known: NDArray[np.bool_]
    weekday: Int64


@dataclass(frozen=True)
class ForecastSamples:
    """Samples with their truth.

    Attributes:
        account: [m] accounts of the data set.
        asked: their states.
        asked_ms: [m] moments.
        after: their days.
    """

    account: NDArray[np.int64]
    asked: AskedStates
    asked_ms: Int64
    after: DaysAfter

    def __len__(self) -> int:
        return len(self.account)

    def take(self, rows: Rows) -> ForecastSamples:
        """Return these samples."""
        return ForecastSamples(
            self.account[rows],
            _rows_of(self.asked, rows),
            self.asked_ms[rows],
            _rows_of(self.after, rows),
        )

    @classmethod
    def joined(cls, parts: list[ForecastSamples]) -> ForecastSamples:
        """Join sets of samples."""
        return cls(
            np.concatenate([p.account for p in parts]),
            _joined([p.asked for p in parts]),
            np.concatenate([p.asked_ms for p in parts]),
            _joined([p.after for p in parts]),
        )


def _rows_of(columns: Any, rows: Rows) -> Any:
    return type(columns)(**{name: value[rows] for name, value in vars(columns).items()})


def _joined(parts: list[Any]) -> Any:
    names = vars(parts[0])
    return type(parts[0])(**{n: np.concatenate([vars(p)[n] for p in parts]) for n in names})


class StateLog:
    """The states of accounts along a log, as workers compute them.

    Args:
        dataset: the transactions.
        sequences: the transactions of each account; positions are those of ``raw``.
        raw: [N, R] raw features by position.
        spec: specification of the inputs.
        stepper: the network.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequences: Sequences,
        raw: Float32,
        spec: FeatureSpec,
        stepper: Stepper,
    ) -> None:
        self.dataset = dataset
        self.sequences = sequences
        self._raw = raw
        self._spec = spec
        self._encoder = Encoder(spec)
        self._stepper = stepper
        self._table = DailyTable(dataset)

    def samples(
        self, sequences: Sequences, moments: Moments, until_day: int, from_day: int = 0
    ) -> ForecastSamples:
        """Return the samples at these moments.

        Args:
            sequences: sequences of the same rows, whole or restarted.
            moments: the moments of asking.
            until_day: first day, counted from the first one of the data, that is not known.
            from_day: first day that is known.
        """
        history, hidden = self._states(sequences, moments)
        asked = asked_states(history, hidden, moments.asked_ms, self._spec.scale)
        rows = sequences.row[moments.position]
        account = self.dataset.account[rows].astype(np.int64)
        after = self._table.after(account, asked.first_day, until_day, from_day)
        return ForecastSamples(account, asked, moments.asked_ms, after)

    def _states(
        self, sequences: Sequences, moments: Moments
    ) -> tuple[AccountHistory, NDArray[np.float16]]:
        """Step through the parts that are needed; return the states [m] at the moments."""
        length = np.zeros(len(sequences.length), np.intp)
        np.maximum.at(length, moments.part, moments.position - sequences.start[moments.part] + 1)
        parts = np.flatnonzero(length)
        parts = parts[np.argsort(-length[parts], kind="stable")]
        length, start = length[parts], sequences.start[parts]
        by_position = np.argsort(moments.position - sequences.start[moments.part], kind="stable")
        wanted = (moments.position - sequences.start[moments.part])[by_position]
        place = np.empty(len(sequences.length), np.intp)
        place[parts] = np.arange(len(parts))
        slot = place[moments.part[by_position]]
        m, scale = len(wanted), self._spec.scale
        architecture = self._stepper.architecture
        found = AccountHistory.empty(m)
        kept = np.zeros((m, architecture.layers, architecture.hidden_size), np.float16)
        history = AccountHistory.empty(len(parts))
        hidden = self._stepper.empty_hidden(len(parts))
        rounds = int(length[0]) if len(length) else 0
        active = np.searchsorted(-length, -np.arange(rounds), side="left")
        bounds = np.searchsorted(wanted, np.arange(rounds + 1))
        own = len(ACCOUNT_FEATURES)
        for number in range(rounds):
            n = int(active[number])
            here = slice(0, n)
            position = start[:n] + number
            row = sequences.row[position]
            raw, after = observe(
                history.take(here),
                np.asarray(self.dataset.amount[row]),
                np.asarray(self.dataset.timestamp_ms[row]),
                scale,
            )
            history.put(here, after)
            inputs = self._encoder.encode(np.hstack((raw, self._raw[position, own:])))
            _, advanced = self._stepper.step(inputs, hidden[here])
            hidden[here] = advanced.astype(np.float16)
            taken = slice(bounds[number], bounds[number + 1])
            if taken.start < taken.stop:
                of = slot[taken]
                found.put(by_position[taken], history.take(of))
                kept[by_position[taken]] = hidden[of]
        return found, kept


class DailyTable:
    """Sums of each account and day of a data set that has payments."""

    def __init__(self, dataset: Dataset) -> None:
        day = dataset.timestamp_ms // DAY_MS
        self._first_day = int(day[0])
        self._days = int(day[-1]) - self._first_day + 1
        key = dataset.account.astype(np.int64) * self._days + (day - self._first_day)
        order = np.argsort(key, kind="stable")
        key = key[order]
        begin = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        amount = np.asarray(dataset.amount)[order]
        self._key = key[begin]
        self._count = np.diff(np.append(begin, len(key))).astype(np.float32)
        self._amount = np.add.reduceat(amount, begin).astype(np.float32)
        self._largest = np.maximum.reduceat(amount, begin).astype(np.float32)
        self._fraud = np.logical_or.reduceat(dataset.is_fraud[order], begin)

    def after(
        self, account: Int64, first_day: Int64, until_day: int, from_day: int = 0
    ) -> DaysAfter:
        """Return the :data:`DAYS_MAX` days [m, T] from each first day on."""
        day = first_day[:, None] + np.arange(DAYS_MAX)
        since = day - self._first_day
        known = (since >= from_day) & (since < min(until_day, self._days))
        key = account[:, None] * self._days + np.where(known, since, 0)
        at = np.minimum(np.searchsorted(self._key, key), len(self._key) - 1)
        there = known & (self._key[at] == key)
        return DaysAfter(
            np.where(there, self._count[at], 0).astype(np.float32),
            np.where(there, self._amount[at], 0).astype(np.float32),
            np.where(there, self._largest[at], 0).astype(np.float32),
            there & self._fraud[at],
            known,
            weekday_of(day),
        )


def random_moments(
    dataset: Dataset,
    sequences: Sequences,
    days: tuple[int, int],
    size: int,
    seed: int,
    *,
    young: bool = False,
) -> Moments:
    """Draw moments within days of the data, each after a payment of its account.

    Args:
        dataset: the transactions.
        sequences: the transactions of each account.
        days: first day, and first day after, counted from the first day of the data.
        size: number of moments; accounts without a payment before theirs give none.
        seed: decides them.
        young: whether an account's age is drawn evenly on a logarithmic scale.
    """
    rng = np.random.default_rng(seed)
    first = int(dataset.timestamp_ms[0]) // DAY_MS * DAY_MS
    begin, end = first + days[0] * DAY_MS, first + days[1] * DAY_MS
    parts = np.flatnonzero(sequences.length)
    began = np.asarray(dataset.timestamp_ms[sequences.row[sequences.start[parts]]])
    parts, began = parts[began < end], began[began < end]
    if not len(parts):
        empty = np.zeros(0, np.intp)
        return Moments(empty, empty, np.zeros(0, np.int64))
    chosen = rng.integers(0, len(parts), size)
    part, since = parts[chosen], began[chosen]
    if young:
        longest = np.maximum(end - since, SHORTEST_AGE_MS + 1)
        age = np.exp(rng.uniform(np.log(SHORTEST_AGE_MS), np.log(longest)))
        asked = since + age.astype(np.int64)
    else:
        asked = rng.integers(begin, end, size)
    # Within the days, and after the part's first payment.
    inside = (asked >= np.maximum(begin, since)) & (asked < end)
    part, asked = part[inside], asked[inside]
    return Moments(part, last_positions(dataset, sequences, part, asked), asked)


def last_positions(dataset: Dataset, sequences: Sequences, part: Rows, asked_ms: Int64) -> Rows:
    """Return the position [m] of the last payment of each part at or before each moment [m]."""
    low = sequences.start[part].copy()
    high = low + sequences.length[part]  # the answer is in [low, high)
    while ((high - low) > 1).any():
        middle = (low + high) // 2
        before = dataset.timestamp_ms[sequences.row[middle]] <= asked_ms
        low = np.where(before, middle, low)
        high = np.where(before, high, np.maximum(middle, low + 1))
    return low


def some_accounts(sequences: Sequences, seed: int) -> Sequences:
    """Return the sequences of at most :data:`ACCOUNTS_MAX` accounts; the others become empty."""
    order = np.random.default_rng(seed).permutation(len(sequences.length))
    total = np.cumsum(sequences.length[order])
    kept = order[: max(1, min(ACCOUNTS_MAX, int(np.searchsorted(total, TRANSACTIONS_MAX))))]
    length = np.zeros_like(sequences.length)
    length[kept] = sequences.length[kept]
    return sequences.with_lengths(length)
