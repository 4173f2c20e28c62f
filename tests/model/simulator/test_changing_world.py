"""The changing world: accounts move, earn more or less, go on holiday and close."""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import NDArray

from model.simulator.accounts import Accounts
from model.simulator.handbook import Simulator
from model.simulator.life_changes import LifeChanges
from model.simulator.world import CHANGING, WIDE, World

CUSTOMERS, DAYS = 600, 90


def daily_counts(world: World) -> NDArray[np.int64]:
    counts = np.zeros((CUSTOMERS, DAYS), np.int64)
    for day in islice(Simulator(CUSTOMERS, 300, seed=1, world=world).days(), DAYS):
        counts[:, day.day] = np.bincount(day.account, minlength=CUSTOMERS)
    return counts


def test_rates_change_and_accounts_close_more_than_in_the_wide_world() -> None:
    spread, ended = [], []
    for world in (WIDE, CHANGING):
        counts = daily_counts(world)
        early, late = counts[:, :30].sum(axis=1), counts[:, 60:].sum(axis=1)
        steady = (early > 20) & (late > 20)
        spread.append(float(np.std(np.log(late[steady] / early[steady]))))
        ended.append(int(((early > 20) & (late == 0)).sum()))
    assert spread[1] > 1.5 * spread[0]
    assert ended[1] > ended[0]


def test_a_closed_account_stays_closed_and_a_holiday_ends() -> None:
    changes = LifeChanges(2_000, CHANGING)
    rng = np.random.default_rng(0)
    closed = changes.closed.copy()
    for day in range(40):
        changes.live(day, rng)
        assert (changes.closed >= closed).all()
        closed = changes.closed.copy()
    assert 20 < closed.sum() < 400
    on_holiday = changes.rates(40) != changes.rate
    assert 100 < on_holiday.sum() < 1_000
    assert (changes.rates(40 + 22) == changes.rate).all()


def test_other_worlds_draw_nothing_for_changes() -> None:
    for world in (WIDE, CHANGING):
        accounts = Accounts(np.random.default_rng(0), np.full(50, 20.0), world)
        rng = np.random.default_rng(1)
        accounts.live(0, rng)
        drawn = rng.random()
        rng = np.random.default_rng(1)
        Accounts(np.random.default_rng(0), np.full(50, 20.0), WIDE).live(0, rng)
        assert (drawn == rng.random()) == (world is WIDE)
