"""The accounts of the wide world: their lifetimes, usual amounts and payments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.simulator import draws
from model.simulator.life_changes import LifeChanges
from model.simulator.payments import Floats, Ints, Payments
from model.simulator.world import FLEET, HOUSEHOLD, World
from model.units import DAY_MS, HOUR_MS, MINUTE_MS

HANDBOOK_KIND = -1
"""Kind of the accounts that pay as the Handbook's customers do."""

FLEET_BURSTS_PER_DAY = 0.05
FLEET_BURST_MINUTES = (3.0, 180.0)
FLEET_PAUSE_SECONDS = (4.0, 15.0)

HOUSEHOLD_SORTS = ((0.3, 0.12, 0.35), (0.45, 1.0, 0.6), (0.21, 1.8, 0.9), (0.04, 14.0, 0.5))
"""Sorts of payments of a household: coffee, groceries, shops, rent and the like.

Each has its share, its multiple of the usual amount, and the deviation of the logarithm."""

CHECK_TIMES = (1.0, 3.0)
"""Range of the number of card checks by a shop within an hour; a failed check is repeated."""

FRAUD_ACCOUNT_DAYS = (1, 4)
LEVEL_RANGE = (0.2, 3.0)
HONEST_MAX = 60_000.0
"""Approximate largest honest payment, EUR. Larger amounts are a thief's."""


class Accounts:
    """All accounts, as arrays with an entry for each account.

    Args:
        rng: draws the population.
        handbook_mean: [customers] mean amount of an account that follows the Handbook, EUR.
        world: options of the world.

    Attributes:
        kind: [customers] place in ``world.kinds``, or :data:`HANDBOOK_KIND`.
        payments: [customers] number of payments so far.
        last_day: [customers] day of the last payment, -1 before the first.
        only_checks: [customers] whether all payments so far were card checks.
    """

    def __init__(self, rng: np.random.Generator, handbook_mean: Floats, world: World) -> None:
        n = len(handbook_mean)
        self._world = world
        self.kind = _kinds(rng, n, world)
        self.median = handbook_mean.copy()
        self.rate_per_day = np.zeros(n)
        self.spread = np.zeros(n)
        self._low, self._high = np.zeros(n), np.full(n, np.inf)
        for number, kind in enumerate(world.kinds):
            of = np.flatnonzero(self.kind == number)
            self.median[of] = draws.log_uniform(rng, *kind.median, len(of))
            self.rate_per_day[of] = draws.log_uniform(rng, *kind.rate, len(of))
            self.spread[of] = rng.uniform(*kind.spread, len(of))
            self.spread[of[draws.events(rng, kind.fixed_price, len(of))]] = 0.0
            if kind.bounds is not None:
                self._low[of], self._high[of] = kind.bounds
        self._noon_ms = rng.normal(13.5, 2.5, n) * HOUR_MS
        self._hours_ms = rng.uniform(1.5, 5.0, n) * HOUR_MS
        self._fleet_pause_ms = draws.log_uniform(rng, *FLEET_PAUSE_SECONDS, n) * 1000
        self._begin = np.zeros(n, np.int64)
        late = draws.events(rng, world.late_accounts, n)
        self._begin[late] = 1 + rng.exponential(world.late_days, len(late)).astype(np.int64)
        self._first_check = rng.random(n) < world.first_checks
        self._of_thief_days = np.zeros(n, np.int64)
        thief = late[draws.events(rng, world.fraud_accounts, len(late))]
        self._of_thief_days[thief] = rng.integers(*FRAUD_ACCOUNT_DAYS, len(thief), endpoint=True)
        self._silent_until = np.zeros(n, np.int64)
        self._journey_until = np.zeros(n, np.int64)
        self._journey_ms = np.zeros(n, np.int64)
        self._level = np.ones(n)
        self._changes = LifeChanges(n, world) if world.has_life_changes else None
        self.payments = np.zeros(n, np.int64)
        self.last_day = np.full(n, -1)
        self.only_checks = np.ones(n, np.bool_)

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def usual(self) -> Floats:
        """[customers] approximate median of the present payments, EUR."""
        return self.median * self._level

    @property
    def follows_handbook(self) -> NDArray[np.bool_]:
        """[customers] whether the account pays as the Handbook's customers do."""
        follows: NDArray[np.bool_] = self.kind == HANDBOOK_KIND
        return follows

    def is_honest(self, day: int) -> NDArray[np.bool_]:
        """Return for each account whether it is open, not a thief's, and not silent."""
        here: NDArray[np.bool_] = (self._begin <= day) & (self._of_thief_days == 0)
        if self._changes is not None:
            here &= ~self._changes.closed
        return here & (self._silent_until <= day)

    def opened_by_thief(self, day: int) -> Ints:
        """Return the accounts that a thief opened and uses today."""
        since = day - self._begin
        return np.flatnonzero((since >= 0) & (since < self._of_thief_days))

    def quiet(self, day: int, days: int) -> Ints:
        """Return the honest accounts with payments, but none in the last ``days`` days."""
        quiet = (self.payments > 0) & (self.last_day <= day - days)
        return np.flatnonzero(quiet & (self._of_thief_days == 0))

    def on_journey(self, account: Ints, day: int) -> NDArray[np.bool_]:
        """Return whether each account [n] is on a journey."""
        away: NDArray[np.bool_] = self._journey_until[account] > day
        return away

    def live(self, day: int, rng: np.random.Generator) -> None:
        """Begin today's silences, journeys and changes of level."""
        n, world = len(self), self._world
        silent = draws.events(rng, world.silences, n)
        self._silent_until[silent] = day + draws.whole_numbers(rng, world.silence_days, len(silent))
        away = draws.events(rng, world.journeys, n)
        self._journey_until[away] = day + draws.whole_numbers(rng, world.journey_days, len(away))
        self._journey_ms[away] = rng.uniform(-10 * HOUR_MS, 10 * HOUR_MS, len(away))
        moved = draws.events(rng, world.level_changes, n)
        moved = moved[self._has_level(moved)]
        level = self._level[moved] * draws.log_uniform(rng, *world.level_factor, len(moved))
        self._level[moved] = np.clip(level, *LEVEL_RANGE)
        if self._changes is not None:
            account, factor = self._changes.live(day, rng)
            factor[~self._has_level(account)] = 1.0
            np.multiply.at(self._level, account, factor)
            self._level = np.clip(self._level, *LEVEL_RANGE)

    def honest(self, day: int, handbook: Payments, rng: np.random.Generator) -> Payments:
        """Return the honest payments of a day.

        Args:
            day: number of the day.
            handbook: payments of the Handbook's customers, if all accounts were theirs.
            rng: draws the payments.
        """
        awake = self.is_honest(day)
        wide = np.flatnonzero(awake & (self.kind != HANDBOOK_KIND))
        rate = self.rate_per_day
        if self._changes is not None:
            rate = rate * self._changes.rates(day)
        usual = np.repeat(wide, rng.poisson(rate[wide]))
        seldom = np.minimum(self.rate_per_day, 1.0)
        possible = wide[self.usual[wide] * self._world.large_factor[1] < HONEST_MAX]
        large = possible[draws.events(rng, self._world.large_purchases * seldom[possible])]
        factor = draws.log_uniform(rng, *self._world.large_factor, len(large))
        here = np.flatnonzero(awake)
        check = here[draws.events(rng, self._world.checks, len(here))]
        check_times = draws.whole_numbers(rng, CHECK_TIMES, len(check))
        check_of, _ = draws.group_members(check_times)
        check_ms = draws.times_within(
            rng, check_times, rng.integers(MINUTE_MS, HOUR_MS, len(check))
        )
        check_amount = draws.check_amounts(rng, len(check))[check_of]
        parts = [
            handbook.at(awake[handbook.account]),
            Payments.of(usual, self._hours(usual, rng), self._amounts(usual, rng)),
            self._fleets(awake, rng),
            self._sprees(wide, seldom, rng),
            Payments.of(large, self._hours(large, rng), factor * self.usual[large]),
            Payments.of(check[check_of], check_ms, check_amount),
        ]
        paid = self._moved(day, Payments.joined(parts))
        pays = np.zeros(len(self), np.bool_)
        pays[paid.account] = True
        first = np.flatnonzero(pays & self._first_check & (self.payments == 0))
        first_ms = self._hours(first, rng)
        since = np.zeros(len(self), np.int64)
        since[first] = first_ms + 1  # no payment comes before an account's first check
        checks = Payments.of(first, first_ms, draws.check_amounts(rng, len(first)))
        return Payments.joined([checks, paid.at(paid.time_ms >= since[paid.account])])

    def count(self, day: int, paid: Payments) -> None:
        """Update what thieves know about the accounts."""
        self.payments += np.bincount(paid.account, minlength=len(self))
        self.last_day[paid.account] = day
        self.only_checks[paid.account[(paid.amount > 1) | (paid.scenario > 0)]] = False

    def _has_level(self, account: Ints) -> NDArray[np.bool_]:
        """Return whether the level of each account [n] changes: it has no bounds."""
        has: NDArray[np.bool_] = self.kind[account] != HANDBOOK_KIND
        has &= self._high[account] == np.inf
        return has

    def _hours(self, account: Ints, rng: np.random.Generator) -> Ints:
        """Draw times [n] in milliseconds since midnight, around each account's noon."""
        drawn = rng.normal(self._noon_ms[account], self._hours_ms[account])
        return np.floor(drawn).astype(np.int64) % DAY_MS

    def _amounts(self, account: Ints, rng: np.random.Generator) -> Floats:
        """Draw amounts [n] as each account usually pays, EUR."""
        usual, spread = self.usual[account], self.spread[account].copy()
        mixed = np.flatnonzero(np.isin(self.kind[account], self._numbers(HOUSEHOLD)))
        sorts = np.array(HOUSEHOLD_SORTS)
        sort = sorts[rng.choice(len(sorts), len(mixed), p=sorts[:, 0])]
        usual[mixed] *= sort[:, 1]
        spread[mixed] = sort[:, 2]
        amount: Floats = usual * np.exp(spread * rng.standard_normal(len(account)))
        low, high = self._low[account], self._high[account]
        again = np.flatnonzero(amount > HONEST_MAX)
        amount[again] = usual[again] * rng.uniform(0.5, 2.0, len(again))
        out = np.flatnonzero((amount < low) | (amount > high))
        amount[out] = rng.uniform(low[out], high[out])
        return amount

    def _fleets(self, awake: NDArray[np.bool_], rng: np.random.Generator) -> Payments:
        """Draw bursts of fleet accounts: payments every few seconds for minutes or hours."""
        fleet = np.flatnonzero(awake & np.isin(self.kind, self._numbers(FLEET)))
        fleet = fleet[draws.events(rng, FLEET_BURSTS_PER_DAY, len(fleet))]
        duration = draws.log_uniform(rng, *FLEET_BURST_MINUTES, len(fleet)) * MINUTE_MS
        count = (duration / self._fleet_pause_ms[fleet]).astype(np.int64)
        account = np.repeat(fleet, count)
        time_ms = draws.times_within(rng, count, duration.astype(np.int64))
        return Payments.of(account, time_ms, self._amounts(account, rng))

    def _sprees(self, wide: Ints, seldom: Floats, rng: np.random.Generator) -> Payments:
        """Draw afternoons of shopping: several payments within two hours."""
        spree = wide[draws.events(rng, self._world.sprees * seldom[wide])]
        count = draws.whole_numbers(rng, self._world.spree_payments, len(spree))
        account = spree[draws.group_members(count)[0]]
        duration = rng.integers(20 * MINUTE_MS, 2 * HOUR_MS, len(spree))
        return Payments.of(
            account, draws.times_within(rng, count, duration), self._amounts(account, rng)
        )

    def _moved(self, day: int, paid: Payments) -> Payments:
        """Shift the times of accounts on a journey, which are in another time zone."""
        shift = np.where(self.on_journey(paid.account, day), self._journey_ms[paid.account], 0)
        return Payments(
            paid.account,
            (paid.time_ms + shift) % DAY_MS,
            paid.amount,
            paid.merchant,
            paid.scenario,
        )

    def _numbers(self, name: str) -> list[int]:
        return [i for i, kind in enumerate(self._world.kinds) if kind.name == name]


def _kinds(rng: np.random.Generator, customers: int, world: World) -> NDArray[np.int64]:
    """Draw the kind of each account [customers], with the shares of the world."""
    share = np.array([world.handbook_accounts])
    others = [kind.share * (1 - world.handbook_accounts) for kind in world.kinds]
    ends = np.round(np.cumsum(np.concatenate([share, others])) * customers).astype(np.int64)
    kind = np.searchsorted(ends, np.arange(customers), side="right") + HANDBOOK_KIND
    return rng.permutation(np.minimum(kind, len(world.kinds) - 1))
