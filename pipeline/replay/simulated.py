"""Stream of simulated transactions, encoded for the transactions topic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.simulator.handbook import (
    DayOfTransactions,
    Simulator,
    account_id,
    merchant_id,
    transaction_id,
)
from model.simulator.world import HANDBOOK, World
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, encode_block

CURRENCY = "EUR"
"""Currency of the simulator's amounts."""

_KINDS = (np.int64, np.int64, np.int64, np.float64, np.int8)  # of SimulatedColumns


@dataclass(frozen=True, slots=True)
class SimulatedColumns:
    """Columns of transactions in order of time; all have the same length."""

    timestamp_ms: NDArray[np.int64]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    scenario: NDArray[np.int8]
    """Index into :data:`model.simulator.world.SCENARIOS`; 0: legitimate."""

    def __len__(self) -> int:
        return len(self.account)

    def sliced(self, start: int, stop: int) -> SimulatedColumns:
        """Take the transactions from start to before stop."""
        return SimulatedColumns(*(column[start:stop] for column in self._all()))

    @staticmethod
    def joined(pieces: Sequence[SimulatedColumns]) -> SimulatedColumns:
        """Join pieces in order."""
        empty = [np.empty(0, kind) for kind in _KINDS]
        columns = zip(empty, *(piece._all() for piece in pieces), strict=True)
        joined: list[Any] = [np.concatenate(parts) for parts in columns]
        return SimulatedColumns(*joined)

    def _all(self) -> list[Any]:
        return [getattr(self, column.name) for column in fields(self)]


@dataclass(frozen=True, slots=True)
class SimulatedTransactions:
    """A piece of the stream; ``first`` is the number of its first transaction."""

    first: int
    columns: SimulatedColumns

    def __len__(self) -> int:
        return len(self.columns)

    def blocks(self) -> Iterator[Block]:
        """Encode the transactions, some thousand at a time."""
        for start in range(0, len(self), BLOCK_TRANSACTIONS):
            part = self.columns.sliced(start, start + BLOCK_TRANSACTIONS)
            number = self.first + start
            yield encode_block(
                [transaction_id(n) for n in range(number, number + len(part))],
                [account_id(account) for account in part.account.tolist()],
                [merchant_id(merchant) for merchant in part.merchant.tolist()],
                part.amount.tolist(),
                [CURRENCY] * len(part),
                part.timestamp_ms.tolist(),
            )

    def index_of(self, transaction_ids: Sequence[str]) -> NDArray[np.int64]:
        """Find the positions of ids in this piece as int64[n]; -1: not in this piece."""
        index = np.array([int(name[1:]) for name in transaction_ids], np.int64) - self.first
        index[(index < 0) | (index >= len(self))] = -1
        return index


class SimulatedStream:
    """Stream of simulated transactions, numbered from 0 without gaps."""

    def __init__(
        self, customers: int, terminals: int, start_date: str, seed: int, world: World = HANDBOOK
    ) -> None:
        days = Simulator(customers, terminals, start_date, seed, world).days()
        self._columns: Iterator[SimulatedColumns] = map(_columns_of, days)
        self._left: list[SimulatedColumns] = []
        self._next = 0

    @classmethod
    def of_days(cls, days: Iterator[SimulatedColumns]) -> SimulatedStream:
        """Make a stream of days that come from elsewhere, such as a generator."""
        stream = cls.__new__(cls)
        stream._columns, stream._left, stream._next = days, [], 0
        return stream

    def take_days(self, days: int) -> SimulatedTransactions:
        """Take the rest of the present day and a number of whole days."""
        return self._piece(self._left + [self._day() for _ in range(days)], [])

    def take(self, transactions: int) -> SimulatedTransactions:
        """Take the next transactions."""
        pieces = list(self._left)
        surplus = sum(map(len, pieces)) - transactions
        while surplus < 0:
            pieces.append(self._day())
            surplus += len(pieces[-1])
        left = []
        if surplus:
            last = pieces.pop()
            pieces.append(last.sliced(0, len(last) - surplus))
            left = [last.sliced(len(last) - surplus, len(last))]
        return self._piece(pieces, left)

    def _day(self) -> SimulatedColumns:
        return next(self._columns)

    def _piece(
        self, pieces: list[SimulatedColumns], left: list[SimulatedColumns]
    ) -> SimulatedTransactions:
        self._left = left
        piece = SimulatedTransactions(self._next, SimulatedColumns.joined(pieces))
        self._next += len(piece)
        return piece


def _columns_of(day: DayOfTransactions) -> SimulatedColumns:
    return SimulatedColumns(day.timestamp_ms, day.account, day.merchant, day.amount, day.scenario)
