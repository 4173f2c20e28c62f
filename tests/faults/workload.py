"""Workload of a fault: the transactions that are sent, and those that must have a score."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.simulator.handbook import account_id
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, ahead
from pipeline.replay.simulated import SimulatedColumns, SimulatedStream, SimulatedTransactions
from pipeline.settings import Settings

CUSTOMERS = 5_000
TERMINALS = 2_000
START_DATE = "2018-04-01"
PIECE_TRANSACTIONS = 500
"""Transactions made at once: a fraction of a second of the workload."""

PIECE_TRANSACTIONS_FULL_SPEED = BLOCK_TRANSACTIONS
"""Transactions made at once if there is no rate."""

BROKER_LIMIT_SECONDS = 120.0
"""Time for which the broker may be unreachable before the workload fails."""

NO_TRANSACTION = -1
"""Number of a record that must not have a score."""


class SentRecords(NamedTuple):
    """Records in sending order, in columns of the same length.

    Attributes:
        numbers: int64[n], number of the transaction, or :data:`NO_TRANSACTION`.
    """

    keys: Sequence[bytes]
    values: Sequence[bytes]
    numbers: NDArray[np.int64]


ChangeColumns = Callable[[SimulatedColumns, np.random.Generator], SimulatedColumns]
"""Change of transactions before they are encoded; their number stays the same."""

ChangeRecords = Callable[[SentRecords, np.random.Generator], SentRecords]
"""Change of records before they are sent; it may add records."""


def unchanged_columns(columns: SimulatedColumns, rng: np.random.Generator) -> SimulatedColumns:
    """Change nothing."""
    return columns


def unchanged_records(sent: SentRecords, rng: np.random.Generator) -> SentRecords:
    """Change nothing."""
    return sent


class Workload:
    """Workload of simulated transactions that can be stopped and started again.

    Args:
        seed: seed of the simulator and of the changes.
        change_columns: a fault's change of the transactions.
        change_records: a fault's change of the records.
    """

    def __init__(
        self,
        settings: Settings,
        seed: int,
        change_columns: ChangeColumns = unchanged_columns,
        change_records: ChangeRecords = unchanged_records,
    ) -> None:
        self._settings = settings
        self._stream = SimulatedStream(CUSTOMERS, TERMINALS, START_DATE, seed)
        self._rng = np.random.default_rng(seed)
        self._change_columns = change_columns
        self._change_records = change_records
        self._accounts: list[NDArray[np.int64]] = []
        self._runs: list[_Run] = []
        self._taken: list[NDArray[np.int64]] = []
        self._first_run_in_states = 0

    async def start(self, rate: float | None, history: int = 0, most: int | None = None) -> None:
        """Send ``history`` records at full speed, then go on at ``rate``.

        Args:
            rate: records/s. None: full speed.
            most: limit of transactions after the history. None: until :meth:`stop`.

        Raises:
            RecurError: the broker is unreachable.
        """
        run = _Run(Feed(self._settings, timeout_seconds=BROKER_LIMIT_SECONDS))
        await run.feed.__aenter__()
        self._runs.append(run)
        if history:
            await run.feed.run(ahead(self._blocks(run, PIECE_TRANSACTIONS_FULL_SPEED, history)))
        piece = PIECE_TRANSACTIONS_FULL_SPEED if rate is None else PIECE_TRANSACTIONS
        run.feeding = asyncio.create_task(
            run.feed.run(ahead(self._blocks(run, piece, most)), rate=rate, stop=run.stop)
        )

    def raise_failure(self) -> None:
        """Raise the error that ended the workload, if one did.

        Raises:
            RecurError: the broker did not accept the records.
        """
        for run in self._runs:
            if run.feeding is not None and run.feeding.done():
                run.feeding.result()

    async def stop(self) -> None:
        """Stop sending and wait until the broker has all sent records.

        Raises:
            RecurError: the broker does not accept them.
        """
        for run in self._runs:
            run.stop.set()
            await run.end()

    async def abandon(self) -> None:
        """Stop at once without waiting for acks."""
        for run in self._runs:
            if run.feeding is not None:
                run.feeding.cancel()
                await asyncio.gather(run.end(), return_exceptions=True)

    def _blocks(self, run: _Run, at_once: int, most: int | None = None) -> Iterator[Block]:
        left = most
        while left is None or left > 0:
            size = at_once if left is None else min(at_once, left)
            left = None if left is None else left - size
            piece = self._stream.take(size)
            columns = self._change_columns(piece.columns, self._rng)
            self._accounts.append(columns.account)
            (block,) = SimulatedTransactions(piece.first, columns).blocks()
            numbers = np.arange(piece.first, piece.first + len(columns))
            sent = self._change_records(SentRecords(block.keys, block.values, numbers), self._rng)
            run.numbers.append(sent.numbers)
            yield Block(sent.keys, sent.values)

    def take(self, transactions: int) -> list[bytes]:
        """Make transactions that a fault sends by itself; the workload must be stopped.

        They count as sent.

        Returns:
            their records' values.
        """
        piece = self._stream.take(transactions)
        columns = self._change_columns(piece.columns, self._rng)
        self._accounts.append(columns.account)
        self._taken.append(np.arange(piece.first, piece.first + len(columns)))
        blocks = SimulatedTransactions(piece.first, columns).blocks()
        return [value for block in blocks for value in block.values]

    def restart_states(self) -> None:
        """Expect states to start with the next records; the workload must be stopped."""
        self._first_run_in_states = len(self._runs)

    # expectations -----------------------------------------------------------------------

    def numbers_sent(self) -> NDArray[np.int64]:
        """Numbers of the records that were sent, in order, as int64[n]."""
        nothing = np.empty(0, np.int64)
        of_runs = (run.numbers_sent() for run in self._runs)
        return np.concatenate([nothing, *of_runs, *self._taken])

    def _numbers_in_states(self) -> NDArray[np.int64]:
        runs = self._runs[self._first_run_in_states :]
        of_runs = (run.numbers_sent() for run in runs)
        return np.concatenate([np.empty(0, np.int64), *of_runs, *self._taken])

    def transactions_made(self) -> int:
        """Count the transactions that were made, sent or not; all numbers are lower."""
        return sum(map(len, self._accounts))

    def transactions_of_accounts(self) -> dict[str, int]:
        """Count the distinct transactions that each account's state must have."""
        numbers = self._numbers_in_states()
        distinct = np.unique(numbers[numbers != NO_TRANSACTION])
        accounts = np.concatenate([*self._accounts, np.empty(0, np.int64)])[distinct]
        names, counts = np.unique(accounts, return_counts=True)
        return {
            account_id(name): count
            for name, count in zip(names.tolist(), counts.tolist(), strict=True)
        }


@dataclass
class _Run:
    """A run from a start to a stop; unsent transactions of a run are never sent."""

    feed: Feed
    numbers: list[NDArray[np.int64]] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    feeding: asyncio.Task[None] | None = None

    async def end(self) -> None:
        """Wait for the run's end and for the acks.

        Raises:
            RecurError: the broker does not accept the records.
        """
        if self.feeding is None:
            return
        feeding, self.feeding = self.feeding, None
        try:
            await feeding
        except BaseException as error:
            await self.feed.__aexit__(type(error), error, error.__traceback__)
            raise
        await self.feed.__aexit__(None, None, None)

    def numbers_sent(self) -> NDArray[np.int64]:
        """Numbers of the records that were sent, in order, as int64[n]."""
        return np.concatenate([np.empty(0, np.int64), *self.numbers])[: self.feed.count.sent]


def of_one_account(share: float) -> ChangeColumns:
    """Move a share of all transactions to one account."""

    def change(columns: SimulatedColumns, rng: np.random.Generator) -> SimulatedColumns:
        account = columns.account.copy()
        account[rng.random(len(account)) < share] = 0
        return replace(columns, account=account)

    return change


def backwards(columns: SimulatedColumns, rng: np.random.Generator) -> SimulatedColumns:
    """Reverse the times of a piece, and move some pieces back by years."""
    years_ms = int(rng.integers(0, 3)) * 365 * 86_400_000
    return replace(columns, timestamp_ms=columns.timestamp_ms[::-1] - years_ms)


def sent_twice(share: float) -> ChangeRecords:
    """Send a share of all records twice, as a producer that retries does."""

    def change(sent: SentRecords, rng: np.random.Generator) -> SentRecords:
        order = np.repeat(np.arange(len(sent.keys)), 1 + (rng.random(len(sent.keys)) < share))
        return SentRecords(
            [sent.keys[i] for i in order.tolist()],
            [sent.values[i] for i in order.tolist()],
            sent.numbers[order],
        )

    return change
