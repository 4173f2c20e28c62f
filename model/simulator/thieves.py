"""The thieves of the wide world: their victims and their payments.

Every theft takes one day, except that of a patient thief. All its payments are fraud, including
tests of the card. The amounts are multiples of the account's usual amount, for small accounts as
for large ones.
"""

from __future__ import annotations

import numpy as np

from model.simulator import draws
from model.simulator.accounts import Accounts
from model.simulator.payments import Floats, Ints, Payments
from model.simulator.world import (
    BURST,
    CARD_TEST,
    HUGE_PAYMENT,
    NEW_ACCOUNT,
    PATIENT,
    SMALL_AMOUNTS,
    TAKEOVER,
    World,
)
from model.units import HOUR_MS, MINUTE_MS

AMOUNT_MAX = 100_000.0
"""Largest payment of a thief, EUR."""
HUGE_FACTOR = (5.0, 3_000.0)
YOUNG_PAYMENTS_MAX = 20
"""Most earlier payments of a young account; a third of the huge payments are on such accounts."""
SILENT_DAYS = 21
"""Days of silence before a takeover."""

TESTS = (1.0, 5.0)
TESTS_OF_NOTHING = 0.6
"""Share of the card tests that pay 0.00, 0.01 or 1.00; the others pay small amounts."""
SMALL_TEST = (0.5, 5.0)
DRAINS = (1.0, 8.0)
DRAIN_FACTOR = (2.0, 300.0)
DRAIN_RISE = (1.0, 2.5)
"""Factor between consecutive payments of a drain."""
DRAIN_MAX = (2_000.0, 50_000.0)
"""Limit of the card that a drain stays under, EUR."""

TAKEOVER_PAYMENTS, TAKEOVER_FACTOR = (1.0, 8.0), (1.0, 50.0)
BURST_PAYMENTS, BURST_SPREAD = (10.0, 60.0), 0.3
SMALL_PAYMENTS, SMALL_FACTOR = (1.0, 6.0), (0.05, 0.6)
PATIENT_DAYS, PATIENT_PAYMENTS = (1.0, 7.0), (4.0, 60.0)
"""Days and payments a day of a patient theft."""
PATIENT_FACTOR, PATIENT_SPREAD, PATIENT_RISE = (0.7, 15.0), 0.3, (1.0, 1.08)
"""Multiple of the usual amount, its spread, and the factor between a day's payments."""
PATIENT_HOURS = (1.0, 24.0)
NEW_ACCOUNT_PAYMENTS, NEW_ACCOUNT_AMOUNT = (1.0, 5.0), (20.0, 10_000.0)


class PatientThieves:
    """Thefts over several days, near the usual amount so that no payment stands out.

    Args:
        accounts: number of accounts.
    """

    def __init__(self, accounts: int) -> None:
        self._until = np.zeros(accounts, np.int64)
        self._factor = np.zeros(accounts)
        self._payments = np.zeros(accounts)

    def pay(self, day: int, begun: Ints, usual: Floats, rng: np.random.Generator) -> Payments:
        """Return the payments of a day, including those of thefts that begin today."""
        n = len(begun)
        self._until[begun] = day + draws.whole_numbers(rng, PATIENT_DAYS, n)
        self._factor[begun] = draws.log_uniform(rng, *PATIENT_FACTOR, n)
        self._payments[begun] = draws.log_uniform(rng, *PATIENT_PAYMENTS, n)
        victim = np.flatnonzero(self._until > day)
        count = np.maximum(1, rng.poisson(self._payments[victim]))
        group, number = draws.group_members(count)
        rise = rng.uniform(*PATIENT_RISE, len(victim))[group] ** number
        amount = usual[victim][group] * self._factor[victim][group] * rise
        amount = amount * np.exp(PATIENT_SPREAD * rng.standard_normal(len(group)))
        amount = _under(np.full(len(group), AMOUNT_MAX), amount, rng)
        hours = rng.uniform(*PATIENT_HOURS, len(victim))
        time_ms = draws.times_within(rng, count, (hours * HOUR_MS).astype(np.int64))
        return Payments.of(victim[group], time_ms, amount, PATIENT)


def thefts(
    day: int,
    accounts: Accounts,
    patient: PatientThieves,
    world: World,
    rng: np.random.Generator,
) -> Payments:
    """Return the payments of thieves on a day; their merchants are still to be drawn."""
    victims = np.flatnonzero(accounts.is_honest(day) & (accounts.payments > 0))
    quiet = accounts.quiet(day, SILENT_DAYS)
    usual, people = accounts.usual, len(accounts)

    def victims_of(per_account: float, of: Ints) -> Ints:
        """Draw different accounts for a day's thefts of one kind."""
        count = min(rng.poisson(per_account * people), len(of))
        return rng.choice(of, count, replace=False)

    return Payments.joined(
        [
            _tests_and_drains(victims_of(world.card_tests, victims), usual, rng),
            _takeovers(victims_of(world.takeovers, quiet), usual, rng),
            _bursts(victims_of(world.bursts, victims), usual, rng),
            _small(victims_of(world.small_frauds, victims), usual, rng),
            _huge(_huge_victims(victims, accounts, world, rng), usual, rng),
            _new(accounts.opened_by_thief(day), accounts, rng),
            patient.pay(day, victims_of(world.patient_thieves, victims), usual, rng),
        ]
    )


def _tests_and_drains(victim: Ints, usual: Floats, rng: np.random.Generator) -> Payments:
    """Draw thefts of one to five tests of the card, then rising payments."""
    n = len(victim)
    tests, drains = draws.whole_numbers(rng, TESTS, n), draws.whole_numbers(rng, DRAINS, n)
    group, number = draws.group_members(tests + drains)
    test = np.where(
        rng.random(n) < TESTS_OF_NOTHING, draws.check_amounts(rng, n), rng.uniform(*SMALL_TEST, n)
    )
    first = usual[victim] * draws.log_uniform(rng, *DRAIN_FACTOR, n)
    rise = rng.uniform(*DRAIN_RISE, n)
    most = draws.log_uniform(rng, *DRAIN_MAX, n)
    step = np.maximum(number - tests[group], 0)
    amount = _under(most[group], first[group] * rise[group] ** step, rng)
    amount = np.where(number < tests[group], test[group], amount)
    seconds = _several_hours(n, rng)
    return Payments.of(
        victim[group], draws.times_within(rng, tests + drains, seconds), amount, CARD_TEST
    )


def _takeovers(victim: Ints, usual: Floats, rng: np.random.Generator) -> Payments:
    count = draws.whole_numbers(rng, TAKEOVER_PAYMENTS, len(victim))
    group, _ = draws.group_members(count)
    factor = draws.log_uniform(rng, *TAKEOVER_FACTOR, len(victim))[group]
    amount = usual[victim][group] * factor * np.exp(0.4 * rng.standard_normal(len(group)))
    amount = _under(np.full(len(group), AMOUNT_MAX), amount, rng)
    time_ms = draws.times_within(rng, count, _several_hours(len(victim), rng))
    return Payments.of(victim[group], time_ms, amount, TAKEOVER)


def _bursts(victim: Ints, usual: Floats, rng: np.random.Generator) -> Payments:
    """Draw bursts of payments of about the usual amount within an hour."""
    count = draws.whole_numbers(rng, BURST_PAYMENTS, len(victim))
    group, _ = draws.group_members(count)
    amount = usual[victim][group] * np.exp(BURST_SPREAD * rng.standard_normal(len(group)))
    duration = rng.integers(5 * MINUTE_MS, HOUR_MS, len(victim))
    return Payments.of(victim[group], draws.times_within(rng, count, duration), amount, BURST)


def _small(victim: Ints, usual: Floats, rng: np.random.Generator) -> Payments:
    count = draws.whole_numbers(rng, SMALL_PAYMENTS, len(victim))
    group, _ = draws.group_members(count)
    amount = usual[victim][group] * rng.uniform(*SMALL_FACTOR, len(group))
    time_ms = draws.times_within(rng, count, _several_hours(len(victim), rng))
    return Payments.of(victim[group], time_ms, np.maximum(amount, 0.01), SMALL_AMOUNTS)


def _huge_victims(
    victims: Ints, accounts: Accounts, world: World, rng: np.random.Generator
) -> Ints:
    """Draw victims of huge payments.

    A third of them have few payments; some others had nothing but card checks.
    """
    possible = victims[accounts.usual[victims] * HUGE_FACTOR[0] < AMOUNT_MAX]
    young = possible[accounts.payments[possible] <= YOUNG_PAYMENTS_MAX]
    checked = young[accounts.only_checks[young]]
    count = rng.poisson(world.huge_payments * len(accounts) * np.array([2 / 3, 1 / 3]))
    return np.concatenate(
        [
            rng.choice(possible, min(count[0], len(possible)), replace=False),
            rng.choice(young, min(count[1], len(young)), replace=False),
            checked[draws.events(rng, world.huge_after_check, len(checked))],
        ]
    )


def _huge(victim: Ints, usual: Floats, rng: np.random.Generator) -> Payments:
    """Draw single payments of at least five times the usual amount, evenly on a log scale."""
    low, high = HUGE_FACTOR
    factor = draws.log_uniform(rng, low, np.minimum(high, AMOUNT_MAX / usual[victim]), len(victim))
    time_ms = draws.times_within(rng, np.ones(len(victim), np.int64), np.full(len(victim), HOUR_MS))
    return Payments.of(victim, time_ms, usual[victim] * factor, HUGE_PAYMENT)


def _new(account: Ints, accounts: Accounts, rng: np.random.Generator) -> Payments:
    """Draw the payments on accounts that a thief opened; half begin with a card check."""
    n = len(account)
    count = draws.whole_numbers(rng, NEW_ACCOUNT_PAYMENTS, n)
    checked = (accounts.payments[account] == 0) & (rng.random(n) < 0.5)
    group, number = draws.group_members(count + checked)
    level = draws.log_uniform(rng, *NEW_ACCOUNT_AMOUNT, n)[group]
    amount = level * np.exp(0.5 * rng.standard_normal(len(group)))
    is_check = checked[group] & (number == 0)
    amount = np.where(is_check, draws.check_amounts(rng, len(group)), amount)
    time_ms = draws.times_within(rng, count + checked, _several_hours(n, rng))
    return Payments.of(account[group], time_ms, amount, NEW_ACCOUNT)


def _under(most: Floats, amount: Floats, rng: np.random.Generator) -> Floats:
    """Redraw amounts over a limit below it; equal amounts at the limit would be a trace."""
    again: Floats = most * rng.uniform(0.3, 1.0, len(amount))
    return np.where(amount > most, again, amount)


def _several_hours(size: int, rng: np.random.Generator) -> Ints:
    """Draw durations [size] from ten minutes to eight hours, in milliseconds."""
    return draws.log_uniform(rng, 10 * MINUTE_MS, 8 * HOUR_MS, size).astype(np.int64)
