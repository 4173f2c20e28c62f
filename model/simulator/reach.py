"""Terminals on a map, drawn within a radius of each customer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAP_SIZE = 100.0
RADIUS = 5.0

_DRAWS_BEFORE_LOOKING_AT_ALL = 40
_CELLS = int(MAP_SIZE / RADIUS)  # a side; 3 x 3 cells hold all terminals in reach of a customer


class Reach:
    """Sampler of terminals within the radius of customers, without a list per customer.

    Terminals are sorted by cell of a grid. The terminals in reach of a customer lie in three runs
    of neighbouring cells. Terminals are drawn from these until one is near enough.
    """

    def __init__(self, customers: NDArray[np.float64], terminals: NDArray[np.float64]) -> None:
        cell = _cell(terminals)
        self._terminal = np.lexsort((cell[:, 1], cell[:, 0]))  # grid position -> terminal
        self._place = terminals[self._terminal]
        self._customers = customers
        flat = (cell[:, 0] * _CELLS + cell[:, 1])[self._terminal]
        home = _cell(customers)
        row = home[:, :1] + np.array([-1, 0, 1])  # [customers, 3]
        outside = (row < 0) | (row >= _CELLS)
        first = row * _CELLS + np.maximum(home[:, 1:] - 1, 0)
        last = row * _CELLS + np.minimum(home[:, 1:] + 1, _CELLS - 1)
        begin = np.searchsorted(flat, first, side="left")
        end = np.searchsorted(flat, last, side="right")
        end[outside] = begin[outside]
        self._begin = begin
        # [customers, 3] candidates up to the end of each run.
        self._ends = np.cumsum(end - begin, axis=1)

    def any(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return whether each customer reaches a terminal: by some draws, then by all terminals."""
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
        """Draw a terminal for each account [n]; each account must reach one."""
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
        """Return the grid positions of the customers' k-th candidates."""
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
