"""Stream of generated transactions in order of time, of any number of accounts and days.

A window of time at a time: each account unrolls up to the window's end, and the window's
transactions are sorted. In memory are the accounts' states, about 1 kB each, and one window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import FRAUD, LEGITIMATE, MISSING, Dataset
from model.generator.draws import keys_of
from model.generator.generator import Generator
from model.generator.profiles import AT, with_given
from model.generator.settings import GeneratorError
from model.generator.unroller import Cast, GeneratedTransactions, Unroller
from model.units import DAY_MS

ACCOUNTS_MAX = 20_000_000
DAYS_MAX = 36_500
WINDOW_TRANSACTIONS = 200_000
"""About the number of transactions of a window."""
WINDOW_LEAST_MS = 60_000

ROWS_AT_ONCE = 4096
"""Accounts of one step: their arrays fit into a core's cache."""

THREADS = 2
_GIVEN_STREAM = 3


@dataclass(frozen=True)
class Wish:
    """A request for histories.

    Attributes:
        accounts: number of accounts.
        days: length of the histories.
        seed: the same seed gives the same histories.
        start_ms: midnight of the first day; None: that of the training data.
        given: numbers of every account's profile, by the keys of
            :data:`model.generator.profiles.GIVEN`; the others are drawn.

    Raises:
        GeneratorError: a value is out of bounds; the message names it.
    """

    accounts: int
    days: int
    seed: int = 1
    start_ms: int | None = None
    given: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, most in (("accounts", ACCOUNTS_MAX), ("days", DAYS_MAX)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise GeneratorError(f"{name} is {value}; it must be 1 to {most:,}")
        if not 0 <= self.seed < 2**63:
            raise GeneratorError(f"seed is {self.seed}; it must be 0 or more, under 2^63")


class HistoryStream:
    """Generated transactions.

    Args:
        generator: the generator.
        wish: what to generate.
        threads: threads that share the accounts; their number leaves no trace.

    Raises:
        GeneratorError: a key or value of the given profile is wrong.
    """

    def __init__(self, generator: Generator, wish: Wish, threads: int = THREADS) -> None:
        self.generator = generator
        start_ms = generator.header.start_ms if wish.start_ms is None else wish.start_ms
        start_ms -= start_ms % DAY_MS
        self._cast = Cast(wish.seed, wish.accounts, start_ms, start_ms + wish.days * DAY_MS)
        self._threads = threads
        accounts = np.arange(wish.accounts)
        profiles = generator.density.draw(wish.seed, accounts)
        keys = keys_of(wish.seed, _GIVEN_STREAM, accounts)
        self._profiles = with_given(profiles, wish.given, keys)
        self._expected = float(np.exp(self._profiles[:, AT["rate"]]).sum())  # a day
        self.done = 0.0

    @property
    def expected(self) -> int:
        """About the number of transactions."""
        return round(self._expected * (self._cast.end_ms - self._cast.begin_ms) / DAY_MS)

    def parts(self) -> Iterator[GeneratedTransactions]:
        """Yield the transactions in order of time, a window at a time."""
        cast = self._cast
        window_ms = max(int(WINDOW_TRANSACTIONS / self._expected * DAY_MS), WINDOW_LEAST_MS)
        groups = np.array_split(np.arange(cast.accounts), self._threads)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="generate") as pool:
            unrollers = list(pool.map(self._unroller, [g for g in groups if len(g)]))
            begin_ms = cast.begin_ms
            while begin_ms < cast.end_ms:
                until_ms = min(begin_ms + window_ms, cast.end_ms)
                taken = [
                    part
                    for parts in pool.map(lambda u, t=until_ms: u.until(t, ROWS_AT_ONCE), unrollers)
                    for part in parts
                ]
                begin_ms = until_ms
                self.done = (begin_ms - cast.begin_ms) / (cast.end_ms - cast.begin_ms)
                if taken:
                    found = GeneratedTransactions.joined(taken)
                    yield found.at(np.lexsort((found.account, found.time_ms)))

    def _unroller(self, accounts: NDArray[np.int64]) -> Unroller:
        return Unroller(self.generator, self._cast, accounts, self._profiles[accounts])


def generated_dataset(stream: HistoryStream) -> Dataset:
    """Return all transactions of a stream in memory, as a data set for training.

    Raises:
        GeneratorError: there are none.
    """
    parts = list(stream.parts())
    if not parts:
        raise GeneratorError("no transaction was generated: raise accounts or days")
    found = GeneratedTransactions.joined(parts)
    merchant = np.unique(found.merchant, return_inverse=True)[1].astype(np.int32)
    numeric, categorical = {}, {}
    texts: dict[str, Sequence[str]] = {}
    for place, field_ in enumerate(stream.generator.header.fields):
        classes = found.fields[:, place].astype(np.int64)
        if field_.is_numeric:
            values = field_.numbers(classes, found.shares[:, place].astype(np.float64))
            numeric[field_.name] = values.astype(np.float32)
        else:
            codes = np.where(classes < len(field_.texts), classes, MISSING)
            categorical[field_.name] = codes.astype(np.int32)
            texts[field_.name] = field_.texts
    account = np.unique(found.account, return_inverse=True)[1].astype(np.int32)
    label = np.where(found.is_fraud, FRAUD, LEGITIMATE).astype(np.int8)
    return Dataset(
        account=account,
        merchant=merchant,
        amount=found.amount,
        timestamp_ms=found.time_ms,
        label=label,
        scenario=label.copy(),
        numeric=numeric,
        categorical=categorical,
        texts=texts,
        currency=stream.generator.header.currency,
    )
