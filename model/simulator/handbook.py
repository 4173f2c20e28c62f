"""Simulated card transactions with fraud, by the published rules of the Fraud Detection Handbook.

The rules (Le Borgne, Siblini, Lebichot, Bontempi: "Reproducible Machine Learning for Credit
Card Fraud Detection - Practical Handbook", chapter 3, "Transaction data simulator"):

- Customers and terminals lie uniformly on a map of 100 x 100. A customer pays at terminals
  within a radius of 5, all equally likely. A customer without one makes no transaction.
- A customer's mean amount is U(5, 100); the deviation is half of it. Its rate is U(0, 4) a day.
- Each day a customer makes Poisson(rate) transactions, at times normal around noon with a
  deviation of 20,000 s. Times outside the day are dropped.
- Amounts are normal; a negative one is redrawn from U(0, 2 mean).
- Fraud 1: an amount over 220.
- Fraud 2: each day two terminals are drawn. All their transactions on that day and the next 27
  are fraud.
- Fraud 3: each day three customers are drawn. On that day and the next 13, each of their
  transactions is fraud with probability 1/3, and its amount is multiplied by 5.

If rules overlap, the higher number names the scenario. Fraud 1 depends on the amount before it is
multiplied.

These rules are the world :data:`model.simulator.world.HANDBOOK`. The world
:data:`model.simulator.world.WIDE` has more accounts, shops and kinds of fraud.

The simulator streams a day at a time, in memory bounded by customers and terminals. The seed, the
number of the day and the days before decide a day. So the beginning of a stream does not depend on
its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import count

import numpy as np
from numpy.typing import NDArray

from model.simulator.payments import Payments
from model.simulator.reach import MAP_SIZE, Reach
from model.simulator.wide_world import WideSimulation
from model.simulator.world import (
    CUSTOMER_COMPROMISED_DAYS,
    CUSTOMER_FRAUD_FACTOR,
    CUSTOMER_FRAUD_PROBABILITY,
    CUSTOMERS_COMPROMISED_PER_DAY,
    HANDBOOK,
    HIGH_AMOUNT,
    TERMINAL_COMPROMISED_DAYS,
    TERMINALS_COMPROMISED_PER_DAY,
    World,
)
from model.units import DAY_MS

MEAN_AMOUNT_RANGE = (5.0, 100.0)
RATE_RANGE_PER_DAY = (0.0, 4.0)
NOON_SECONDS = 43_200.0
TIME_DEVIATION_SECONDS = 20_000.0

CUSTOMERS_MAX = 10_000_000
TERMINALS_MAX = 10_000_000

_POPULATION_STREAM = 0
_DAY_STREAM = 1
_WIDE_POPULATION_STREAM = 2
_WIDE_DAY_STREAM = 3


class SimulatorError(ValueError):
    """A simulator cannot be made with these values; the message names the value."""


@dataclass(frozen=True)
class DayOfTransactions:
    """The transactions of one day, in order of time: columns of the same length.

    Attributes:
        day: number of the day; 0 is the start date.
        transaction_id: counts from 0 over the whole stream.
        timestamp_ms: epoch milliseconds.
        account: 0 up to customers; see :func:`account_id`.
        merchant: 0 up to terminals; see :func:`merchant_id`.
        amount: EUR, rounded to cents.
        is_fraud: whether it is fraud.
        scenario: the kind of fraud, a place in :data:`model.simulator.world.SCENARIOS`; 0 is
            legitimate.
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
    """Return the id of an account.

    >>> account_id(1234)
    'A0001234'
    """
    return f"A{account:07d}"


def merchant_id(merchant: int) -> str:
    """Return the id of a merchant.

    >>> merchant_id(123)
    'M0000123'
    """
    return f"M{merchant:07d}"


def transaction_id(number: int) -> str:
    """Return the id of a transaction.

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
        world: the simulated accounts, merchants and frauds.

    Raises:
        SimulatorError: an argument is out of bounds.

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
        world: World = HANDBOOK,
    ) -> None:
        if not 1 <= customers <= CUSTOMERS_MAX:
            raise SimulatorError(f"customers is {customers}; it must be 1 to {CUSTOMERS_MAX}")
        if not 1 <= terminals <= TERMINALS_MAX:
            raise SimulatorError(f"terminals is {terminals}; it must be 1 to {TERMINALS_MAX}")
        if world.is_wide and terminals < 2:
            raise SimulatorError(f"terminals is {terminals}; the wide world needs 2 or more")
        if seed < 0:
            raise SimulatorError(f"seed is {seed}; it must be 0 or more")
        self.customers = customers
        self.terminals = terminals
        self.seed = seed
        self.world = world
        self._start_ms = _midnight_ms(start_date)
        rng = np.random.default_rng([seed, _POPULATION_STREAM])
        place = rng.uniform(0, MAP_SIZE, (customers, 2))
        self._mean_amount = rng.uniform(*MEAN_AMOUNT_RANGE, customers)
        self._rate_per_day = rng.uniform(*RATE_RANGE_PER_DAY, customers)
        self._on_map = max(
            1, min(round(terminals * world.map_terminals), terminals - world.is_wide)
        )
        self._reach = Reach(place, rng.uniform(0, MAP_SIZE, (self._on_map, 2)))
        self._reaches = self._reach.any(rng)
        self._rate_per_day[~self._reaches] = 0.0

    def days(self) -> Iterator[DayOfTransactions]:
        """Yield the days without end; each call starts at the first."""
        return self._wide_days() if self.world.is_wide else self._handbook_days()

    def wide_world(self) -> WideSimulation:
        """Return the wide world before its first day."""
        rng = np.random.default_rng([self.seed, _WIDE_POPULATION_STREAM])
        shops = self.terminals - self._on_map
        mean, reach, reaches = self._mean_amount, self._reach, self._reaches
        return WideSimulation(rng, mean, reach, reaches, self._on_map, shops, self.world)

    def _wide_days(self) -> Iterator[DayOfTransactions]:
        wide = self.wide_world()
        transactions = 0
        for day in count():
            rng = np.random.default_rng([self.seed, _WIDE_DAY_STREAM, day])
            account, time_ms, amount = self._payments(rng)
            follows = wide.accounts.follows_handbook[account]
            # Rounded at the end only: five times a rounded amount would be a trace of fraud.
            amount = np.abs(amount + rng.uniform(-0.005, 0.005, len(amount)))
            handbook = Payments.of(account, time_ms, amount).at(follows)
            paid = wide.day(day, handbook, rng)
            yield self._day(day, transactions, paid)
            transactions += len(paid)

    def _handbook_days(self) -> Iterator[DayOfTransactions]:
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
            paid = Payments(account, time_ms, amount, merchant, scenario)
            yield self._day(day, transactions, paid)
            transactions += len(account)
            day += 1

    def _day(self, day: int, transactions: int, paid: Payments) -> DayOfTransactions:
        """Make a day of payments in order of time; ``transactions`` is the number before it."""
        return DayOfTransactions(
            day=day,
            transaction_id=np.arange(transactions, transactions + len(paid)),
            timestamp_ms=self._start_ms + day * DAY_MS + paid.time_ms,
            account=paid.account,
            merchant=paid.merchant,
            amount=paid.amount,
            is_fraud=paid.scenario > 0,
            scenario=paid.scenario,
        )

    def _payments(
        self, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Draw accounts, milliseconds since midnight and amounts of a day, in order of time."""
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
