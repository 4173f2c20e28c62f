"""Lasting and passing changes in the lives of accounts: moved, salary, holiday, closed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.simulator import draws
from model.simulator.payments import Floats, Ints
from model.simulator.world import World

RATE_RANGE = (0.1, 10.0)
"""Bounds of the factor of an account's rate."""


class LifeChanges:
    """Changes of each account's rate and level.

    Args:
        customers: number of accounts.
        world: options of the world.

    Attributes:
        rate: [customers] factor of the payments a day that lasts.
        closed: [customers] whether the account makes no payment any more.
    """

    def __init__(self, customers: int, world: World) -> None:
        self._world = world
        self.rate = np.ones(customers)
        self.closed = np.zeros(customers, np.bool_)
        self._holiday_until = np.zeros(customers, np.int64)
        self._holiday_rate = np.ones(customers)

    def live(self, day: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
        """Begin today's changes; return the accounts whose level changes, and the factors."""
        n, world = len(self.rate), self._world
        moved = draws.events(rng, world.moves, n)
        factor = draws.log_uniform(rng, *world.move_rate, len(moved))
        self.rate[moved] = np.clip(self.rate[moved] * factor, *RATE_RANGE)
        of_move = draws.log_uniform(rng, *world.move_level, len(moved))
        paid = draws.events(rng, world.salary_changes, n)
        of_salary = draws.log_uniform(rng, *world.salary_level, len(paid))
        away = draws.events(rng, world.holidays, n)
        self._holiday_until[away] = day + draws.whole_numbers(rng, world.holiday_days, len(away))
        self._holiday_rate[away] = draws.log_uniform(rng, *world.holiday_rate, len(away))
        self.closed[draws.events(rng, world.closures, n)] = True
        return np.concatenate((moved, paid)), np.concatenate((of_move, of_salary))

    def rates(self, day: int) -> NDArray[np.float64]:
        """Return today's factor of each account's payments a day [customers]."""
        holiday = np.where(self._holiday_until > day, self._holiday_rate, 1.0)
        return np.asarray(self.rate * holiday)
