"""The wide world: the Handbook's customers, other accounts, shops of all sizes, and thieves.

The options are described in :mod:`model.simulator.world`. There are no refunds, because an amount
is 0 or more in Recur's transactions. The number of accounts and merchants bounds the state between
days. The state, the seed and the number of the day decide the day's payments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.simulator import draws
from model.simulator.accounts import HANDBOOK_KIND, Accounts
from model.simulator.payments import TO_DRAW, Floats, Ints, Payments
from model.simulator.reach import Reach
from model.simulator.thieves import PatientThieves, thefts
from model.simulator.world import (
    CUSTOMER_COMPROMISED_DAYS,
    CUSTOMER_FRAUD_FACTOR,
    CUSTOMER_FRAUD_PROBABILITY,
    HIGH_AMOUNT,
    MERCHANT_IN_PART,
    OVER_220,
    SKIMMED_TERMINAL,
    STOLEN_CARD,
    TERMINAL_COMPROMISED_DAYS,
    World,
)

THIEVES_AT_TERMINALS = 0.25
"""Share of the thieves' payments at terminals of the map; the others are at shops."""

SMALL_SHOP = 3.0
"""Payments a day below which a compromise affects all payments of a shop, not a part."""
IN_PART_DAYS = (4.0, 28.0)
IN_PART_SHARE = (0.01, 0.3)
IN_PART_FRAUDS = 10.0
"""Approximate most frauds a day at one shop, while the share stays in bounds."""


class WideSimulation:
    """Simulation of the wide world, a day at a time.

    Args:
        rng: draws the population.
        handbook_mean: [customers] mean amount of the Handbook's customers, EUR.
        reach: terminals of the map in reach of each customer.
        reaches: [customers] whether a terminal is in reach.
        terminals: number of merchants on the map.
        shops: number of other merchants; 1 or more.
        world: options of the world.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        handbook_mean: Floats,
        reach: Reach,
        reaches: NDArray[np.bool_],
        terminals: int,
        shops: int,
        world: World,
    ) -> None:
        self.accounts = Accounts(rng, handbook_mean, world)
        self._world = world
        self._reach, self._reaches = reach, reaches
        self._terminals = terminals
        rank = rng.permutation(shops) + 1.0
        self._visits = rank**-world.shop_exponent * np.exp(rng.normal(0, 0.3, shops))
        self._open_day = np.zeros(shops, np.int64)
        late = draws.events(rng, world.late_shops, shops)
        self._open_day[late] = 1 + rng.exponential(world.late_days, len(late)).astype(np.int64)
        self._open_day[np.argmax(self._visits)] = 0
        self._skimmed_until = np.zeros(terminals, np.int64)
        self._stolen_until = np.zeros(len(handbook_mean), np.int64)
        self._in_part_until = np.zeros(shops, np.int64)
        self._in_part_share = np.zeros(shops)
        self._patient = PatientThieves(len(handbook_mean))
        self._shop_payments = 0.0  # smoothed, a day

    def day(self, day: int, handbook: Payments, rng: np.random.Generator) -> Payments:
        """Return the payments of a day in order of time, with amounts in whole cents.

        Args:
            day: number of the day.
            handbook: payments of the Handbook's customers.
            rng: draws the day.
        """
        self.accounts.live(day, rng)
        shares = np.cumsum(self._visits * (self._open_day <= day))
        paid = self._at_merchants(day, self.accounts.honest(day, handbook, rng), shares, rng)
        paid = self._compromised(day, paid, shares, rng)
        stolen = thefts(day, self.accounts, self._patient, self._world, rng)
        at_shops = rng.random(len(stolen)) >= THIEVES_AT_TERMINALS
        anywhere = rng.integers(self._terminals, size=len(stolen))
        stolen.merchant[:] = np.where(at_shops, self._shops(len(stolen), shares, rng), anywhere)
        together = Payments.joined([paid, stolen])
        in_order = together.at(np.argsort(together.time_ms, kind="stable"))
        in_order.amount[:] = np.round(in_order.amount, 2)
        self.accounts.count(day, in_order)
        at_shop = int((in_order.merchant >= self._terminals).sum())
        self._shop_payments += (at_shop - self._shop_payments) / min(day + 1, 30)
        return in_order

    def _shops(self, count: int, shares: Floats, rng: np.random.Generator) -> Ints:
        """Draw open shops [count] in proportion to their visits."""
        place = np.searchsorted(shares, rng.random(count) * shares[-1], side="right")
        shop: Ints = self._terminals + np.minimum(place, len(shares) - 1)
        return shop

    def _at_merchants(
        self, day: int, paid: Payments, shares: Floats, rng: np.random.Generator
    ) -> Payments:
        """Draw the merchants: shops, terminals in reach, and any terminal on a journey."""
        account = paid.account
        is_handbook = self.accounts.kind[account] == HANDBOOK_KIND
        share = np.where(is_handbook, self._world.handbook_shop_payments, self._world.shop_payments)
        at_shop = (rng.random(len(paid)) < share) | ~self._reaches[account]
        away = self.accounts.on_journey(account, day) & ~at_shop
        near = np.flatnonzero(~at_shop & ~away & (paid.merchant == TO_DRAW))
        merchant = paid.merchant.copy()
        merchant[near] = self._reach.draw(account[near], rng)
        merchant[at_shop] = self._shops(int(at_shop.sum()), shares, rng)
        merchant[away] = rng.integers(self._terminals, size=int(away.sum()))
        return Payments(account, paid.time_ms, paid.amount, merchant, paid.scenario)

    def _compromised(
        self, day: int, paid: Payments, shares: Floats, rng: np.random.Generator
    ) -> Payments:
        """Add the Handbook's three kinds of fraud, and partly compromised shops."""
        for until, rate, days in (
            (self._skimmed_until, self._world.skimmed_terminals, TERMINAL_COMPROMISED_DAYS),
            (self._stolen_until, self._world.stolen_cards, CUSTOMER_COMPROMISED_DAYS),
        ):
            until[draws.events(rng, rate, len(until))] = day + days
        if day:  # no shop's size is known on the first day
            self._begin_in_part(day, shares, rng)
        is_handbook = self.accounts.kind[paid.account] == HANDBOOK_KIND
        scenario, amount = paid.scenario.copy(), paid.amount.copy()
        scenario[is_handbook & (np.round(amount, 2) > HIGH_AMOUNT)] = OVER_220
        shop = np.flatnonzero(paid.merchant >= self._terminals)
        place = paid.merchant[shop] - self._terminals
        hit = rng.random(len(shop)) < self._in_part_share[place]
        scenario[shop[hit & (self._in_part_until[place] > day)]] = MERCHANT_IN_PART
        terminal = np.flatnonzero(paid.merchant < self._terminals)
        skimmed = self._skimmed_until[paid.merchant[terminal]] > day
        scenario[terminal[skimmed]] = SKIMMED_TERMINAL
        taken = rng.random(len(paid)) < CUSTOMER_FRAUD_PROBABILITY
        taken &= self._stolen_until[paid.account] > day
        scenario[taken] = STOLEN_CARD
        amount[taken] *= CUSTOMER_FRAUD_FACTOR
        return Payments(paid.account, paid.time_ms, amount, paid.merchant, scenario)

    def _begin_in_part(self, day: int, shares: Floats, rng: np.random.Generator) -> None:
        """Begin compromises of shops; half of the shops are drawn by size, half evenly."""
        size = len(self._visits)
        count = rng.poisson(self._world.shops_in_part * size / 2, 2)
        by_size = self._shops(int(count[0]), shares, rng) - self._terminals
        begun = np.concatenate([by_size, rng.integers(size, size=count[1])])
        visits = self._visits[begun] / shares[-1] * self._shop_payments  # a day
        share = draws.log_uniform(rng, *IN_PART_SHARE, len(begun))
        share = np.minimum(share, IN_PART_FRAUDS / np.maximum(visits, 1e-9))
        share = np.maximum(share, IN_PART_SHARE[0])
        self._in_part_share[begun] = np.where(visits < SMALL_SHOP, 1.0, share)
        self._in_part_until[begun] = day + draws.whole_numbers(rng, IN_PART_DAYS, len(begun))
