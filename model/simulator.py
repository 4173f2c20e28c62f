"""Simulated card transactions with fraud, by the published rules of the Fraud Detection Handbook.

The rules (Le Borgne, Siblini, Lebichot, Bontempi: "Reproducible Machine Learning for Credit
Card Fraud Detection - Practical Handbook", chapter 3, "Transaction data simulator"):

- Customers and terminals lie uniformly on a map of 100 x 100. A customer pays at terminals
  within a radius of 5, each as likely as the other; one without any makes no transaction.
- A customer's mean amount is U(5, 100) and the deviation half of it; its rate is U(0, 4) a day.
- Each day a customer makes Poisson(rate) transactions, at times normal around noon with a
  deviation of 20,000 s. What falls out of the day is dropped.
- Amounts are normal; a negative one is drawn again from U(0, 2 mean).
- Fraud 1: an amount over 220.
- Fraud 2: each day two terminals are drawn; all their transactions that day and the next 27
  are fraud.
- Fraud 3: each day three customers are drawn; that day and the next 13 each of their
  transactions, with a probability of 1/3, has its amount times 5 and is fraud.

Where rules overlap the one with the higher number names the scenario, and the amount of
fraud 1 is the one before it is multiplied.

It streams: a day at a time, in memory bounded by customers and terminals. A day is drawn from
the seed and its number alone, so a stream's beginning does not depend on where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
from numpy.typing import NDArray

MAP_SIZE = 100.0
RADIUS = 5.0
MEAN_AMOUNT_RANGE = (5.0, 100.0)
RATE_RANGE_PER_DAY = (0.0, 4.0)
NOON_SECONDS = 43_200.0
TIME_DEVIATION_SECONDS = 20_000.0
DAY_MS = 86_400_000

HIGH_AMOUNT = 220.0
TERMINALS_COMPROMISED_PER_DAY = 2
TERMINAL_COMPROMISED_DAYS = 28
CUSTOMERS_COMPROMISED_PER_DAY = 3
CUSTOMER_COMPROMISED_DAYS = 14
CUSTOMER_FRAUD_PROBABILITY = 1 / 3
CUSTOMER_FRAUD_FACTOR = 5.0

CUSTOMERS_MAX = 10_000_000
TERMINALS_MAX = 10_000_000

_POPULATION_STREAM = 0
_DAY_STREAM = 1
_DRAWS_BEFORE_LOOKING_AT_ALL = 40
_CELLS = int(MAP_SIZE / RADIUS)  # a side; what a customer reaches is in 3 x 3 of them


class SimulatorError(ValueError):
    """A simulator cannot be made with these values; the message names the value."""


@dataclass(frozen=True)
class DayOfTransactions:
    """The transactions of one day, in order of time: columns of the same length.

    Attributes:
        day: 0 is the start date.
        transaction_id: counts from 0 through the whole stream.
        timestamp_ms: epoch milliseconds.
        account: 0 up to customers; see :func:`account_id`.
        merchant: 0 up to terminals; see :func:`merchant_id`.
        amount: EUR, rounded to cents.
        is_fraud: the truth.
        scenario: 0 genuine, else 1, 2 or 3.
    """

    day: int
    transaction_id: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    is_fraud: NDArray[np.bool_]
    scenario: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.transaction_id)


def account_id(account: int) -> str:
    """
    >>> account_id(1234)
    'A0001234'
    """
    return f"A{account:07d}"


def merchant_id(merchant: int) -> str:
    """
    >>> merchant_id(123)
    'M0000123'
    """
    return f"M{merchant:07d}"


def transaction_id(number: int) -> str:
    """
    >>> transaction_id(5)
    'T000000005'
    """
    return f"T{number:09d}"


class Simulator:
    """An endless stream of transactions.

    Args:
        customers: 1 or more.
        terminals: 1 or more.
        start_date: first day, ISO 8601; days are UTC days.
        seed: 0 or more; the same seed gives the same stream.

    Raises:
        SimulatorError: an argument is out of its bounds.

    >>> first = next(Simulator(customers=50, terminals=1000, seed=1).days())
    >>> first.day, account_id(int(first.account[0])), bool((np.diff(first.timestamp_ms) >= 0).all())
    (0, 'A0000019', True)
    """

    def __init__(
        self,
        customers: int = 5000,
        terminals: int = 10_000,
        start_date: str = "2018-04-01",
        seed: int = 0,
    ) -> None:
        if not 1 <= customers <= CUSTOMERS_MAX:
            raise SimulatorError(f"customers is {customers}; it must be 1 to {CUSTOMERS_MAX}")
        if not 1 <= terminals <= TERMINALS_MAX:
            raise SimulatorError(f"terminals is {terminals}; it must be 1 to {TERMINALS_MAX}")
        if seed < 0:
            raise SimulatorError(f"seed is {seed}; it must be 0 or more")
        self.customers = customers
        self.terminals = terminals
        self.seed = seed
        self._start_ms = _midnight_ms(start_date)
        rng = np.random.default_rng([seed, _POPULATION_STREAM])
        place = rng.uniform(0, MAP_SIZE, (customers, 2))
        self._mean_amount = rng.uniform(*MEAN_AMOUNT_RANGE, customers)
        self._rate_per_day = rng.uniform(*RATE_RANGE_PER_DAY, customers)
        self._reach = _Reach(place, rng.uniform(0, MAP_SIZE, (terminals, 2)))
        self._rate_per_day[~self._reach.any(rng)] = 0.0

    def days(self) -> Iterator[DayOfTransactions]:
        """The days from the first on, without end. Each call begins anew."""
        terminal_compromised_until = np.zeros(self.terminals, np.int64)  # first day after it
        customer_compromised_until = np.zeros(self.customers, np.int64)
        transactions = 0
        day = 0
        while True:
            rng = np.random.default_rng([self.seed, _DAY_STREAM, day])
            _compromise(
                terminal_compromised_until,
                TERMINALS_COMPROMISED_PER_DAY,
                day + TERMINAL_COMPROMISED_DAYS,
                rng,
            )
            _compromise(
                customer_compromised_until,
                CUSTOMERS_COMPROMISED_PER_DAY,
                day + CUSTOMER_COMPROMISED_DAYS,
                rng,
            )
            account, time_ms, amount = self._payments(rng)
            merchant = self._reach.draw(account, rng)
            taken_over = rng.random(len(account)) < CUSTOMER_FRAUD_PROBABILITY
            taken_over &= customer_compromised_until[account] > day
            scenario = np.zeros(len(account), np.int8)
            scenario[amount > HIGH_AMOUNT] = 1
            scenario[terminal_compromised_until[merchant] > day] = 2
            scenario[taken_over] = 3
            amount[taken_over] = np.round(amount[taken_over] * CUSTOMER_FRAUD_FACTOR, 2)
            yield DayOfTransactions(
                day=day,
                transaction_id=np.arange(transactions, transactions + len(account)),
                timestamp_ms=self._start_ms + day * DAY_MS + time_ms,
                account=account,
                merchant=merchant,
                amount=amount,
                is_fraud=scenario > 0,
                scenario=scenario,
            )
            transactions += len(account)
            day += 1

    def _payments(
        self, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """A day's accounts, milliseconds since midnight and amounts, in order of time."""
        account = np.repeat(np.arange(self.customers), rng.poisson(self._rate_per_day))
        time_ms = np.floor(
            rng.normal(NOON_SECONDS, TIME_DEVIATION_SECONDS, len(account)) * 1000
        ).astype(np.int64)
        mean = self._mean_amount[account]
        amount = rng.normal(mean, mean / 2)
        negative = np.flatnonzero(amount < 0)
        amount[negative] = rng.uniform(0, 2 * mean[negative])
        amount = np.round(amount, 2)
        in_day = np.flatnonzero((time_ms >= 0) & (time_ms < DAY_MS))
        in_order = in_day[np.argsort(time_ms[in_day], kind="stable")]
        return account[in_order], time_ms[in_order], amount[in_order]


class _Reach:
    """Draws terminals within the radius of customers, without a list of them per customer.

    Terminals are sorted by cell of a grid; what a customer can reach lies in three runs of
    neighbouring cells, from which terminals are drawn until one is near enough.
    """

    def __init__(self, customers: NDArray[np.float64], terminals: NDArray[np.float64]) -> None:
        cell = _cell(terminals)
        self._terminal = np.lexsort((cell[:, 1], cell[:, 0]))  # grid position -> terminal
        self._place = terminals[self._terminal]
        self._customers = customers
        flat = (cell[:, 0] * _CELLS + cell[:, 1])[self._terminal]
        own = _cell(customers)
        row = own[:, :1] + np.array([-1, 0, 1])  # [customers, 3]
        outside = (row < 0) | (row >= _CELLS)
        first = row * _CELLS + np.maximum(own[:, 1:] - 1, 0)
        last = row * _CELLS + np.minimum(own[:, 1:] + 1, _CELLS - 1)
        begin = np.searchsorted(flat, first, side="left")
        end = np.searchsorted(flat, last, side="right")
        end[outside] = begin[outside]
        self._begin = begin
        self._ends = np.cumsum(end - begin, axis=1)  # [customers, 3] candidates up to each run

    def any(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """[customers] whether a terminal is within reach: some draws, then a look at all."""
        reaches = np.zeros(len(self._customers), np.bool_)
        waiting = np.flatnonzero(self._ends[:, 2])
        for _ in range(_DRAWS_BEFORE_LOOKING_AT_ALL):
            position = self._position(waiting, rng.integers(self._ends[waiting, 2]))
            reaches[waiting[self._near(waiting, position)]] = True
            waiting = waiting[~reaches[waiting]]
        for customer in waiting:
            candidates = np.arange(self._ends[customer, 2])
            same = np.full(len(candidates), customer)
            reaches[customer] = self._near(same, self._position(same, candidates)).any()
        return reaches

    def draw(self, account: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """[n] a terminal for each account; each account must reach one."""
        merchant = np.empty(len(account), np.int64)
        waiting = np.arange(len(account))
        while len(waiting):
            customer = account[waiting]
            position = self._position(customer, rng.integers(self._ends[customer, 2]))
            near = self._near(customer, position)
            merchant[waiting[near]] = self._terminal[position[near]]
            waiting = waiting[~near]
        return merchant

    def _position(
        self, customer: NDArray[np.int64], candidate: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Grid positions of the customers' k-th candidates."""
        ends = self._ends[customer]
        run = (candidate[:, None] >= ends[:, :2]).sum(axis=1)
        before = np.where(run > 0, ends[np.arange(len(run)), run - 1], 0)
        position: NDArray[np.int64] = self._begin[customer, run] + candidate - before
        return position

    def _near(self, customer: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.bool_]:
        away = self._place[position] - self._customers[customer]
        near: NDArray[np.bool_] = np.einsum("ij,ij->i", away, away) < RADIUS**2
        return near


def _cell(place: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.minimum(place // RADIUS, _CELLS - 1).astype(np.int64)


def _compromise(
    until: NDArray[np.int64], how_many: int, until_day: int, rng: np.random.Generator
) -> None:
    drawn = rng.choice(len(until), min(how_many, len(until)), replace=False)
    until[drawn] = until_day


def _midnight_ms(start_date: str) -> int:
    try:
        day = date.fromisoformat(start_date)
    except ValueError as error:
        raise SimulatorError(
            f"start_date is {start_date[:40]!r}; it must be a date such as 2018-04-01"
        ) from error
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    if midnight.timestamp() < 0:
        raise SimulatorError(f"start_date is {start_date}; it must be 1970-01-01 or later")
    return int(midnight.timestamp()) * 1000
