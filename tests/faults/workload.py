"""The transactions that are sent, and which of them must have a score."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.simulator.handbook import account_id
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, ahead
from pipeline.replay.simulated import Columns, SimulatedStream, SimulatedTransactions
from pipeline.settings import Settings

CUSTOMERS = 5_000
TERMINALS = 2_000
START_DATE = "2018-04-01"
PIECE_TRANSACTIONS = 500
"""That are made at once: a fraction of a second of them."""

PIECE_TRANSACTIONS_FLAT_OUT = BLOCK_TRANSACTIONS
"""Likewise, where there is no rate."""

PATIENCE_SECONDS = 120.0
"""So long the broker may be away, and the load goes on when it is back."""

NO_TRANSACTION = -1
"""Number of a record that must have no score."""


class Sent(NamedTuple):
    """Records in the order in which they are sent, in columns of equal length.

    Attributes:
        numbers: int64[n], of the transaction; :data:`NO_TRANSACTION` for what is none.
    """

    keys: Sequence[bytes]
    values: Sequence[bytes]
    numbers: NDArray[np.int64]


ChangeColumns = Callable[[Columns, np.random.Generator], Columns]
"""Transactions before they are encoded; as many come out as go in."""

ChangeRecords = Callable[[Sent, np.random.Generator], Sent]
"""Records before they are sent; others may be added."""


def as_they_are(columns: Columns, rng: np.random.Generator) -> Columns:
    """No change."""
    return columns


def nothing_else(sent: Sent, rng: np.random.Generator) -> Sent:
    """No change."""
    return sent


class Load:
    """The simulator's transactions; may be stopped and started again.

    Args:
        seed: of the simulator, and of the changes.
        change_columns, change_records: what a fault does to them.
    """

    def __init__(
        self,
        settings: Settings,
        seed: int,
        change_columns: ChangeColumns = as_they_are,
        change_records: ChangeRecords = nothing_else,
    ) -> None:
        self._settings = settings
        self._stream = SimulatedStream(CUSTOMERS, TERMINALS, START_DATE, seed)
        self._rng = np.random.default_rng(seed)
        self._change_columns = change_columns
        self._change_records = change_records
        self._accounts: list[NDArray[np.int64]] = []
        self._runs: list[_Run] = []
        self._first_run_in_states = 0

    async def start(self, rate: float | None, history: int = 0, most: int | None = None) -> None:
        """Send ``history`` records as fast as the broker takes them, then go on at ``rate``.

        Args:
            rate: records/s; None: as fast as the broker takes them.
            most: transactions besides the history; None: until it is stopped.

        Raises:
            RecurError: the broker is away.
        """
        run = _Run(Feed(self._settings, timeout_seconds=PATIENCE_SECONDS))
        await run.feed.__aenter__()
        self._runs.append(run)
        if history:
            await run.feed.run(ahead(self._blocks(run, PIECE_TRANSACTIONS_FLAT_OUT, history)))
        piece = PIECE_TRANSACTIONS_FLAT_OUT if rate is None else PIECE_TRANSACTIONS
        run.feeding = asyncio.create_task(
            run.feed.run(ahead(self._blocks(run, piece, most)), rate=rate, stop=run.stop)
        )

    def raise_failure(self) -> None:
        """Raise what ended the load, if something did.

        Raises:
            RecurError: the broker did not take it.
        """
        for run in self._runs:
            if run.feeding is not None and run.feeding.done():
                run.feeding.result()

    async def stop(self) -> None:
        """Send no more, and wait until the broker has what was sent.

        Raises:
            RecurError: the broker does not take it.
        """
        for run in self._runs:
            run.stop.set()
            await run.end()

    async def abandon(self) -> None:
        """Stop at once, whatever the broker has."""
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
            sent = self._change_records(Sent(block.keys, block.values, numbers), self._rng)
            run.numbers.append(sent.numbers)
            yield Block(sent.keys, sent.values)

    def states_begin(self) -> None:
        """States begin anew with what is sent from now on; the load is stopped."""
        self._first_run_in_states = len(self._runs)

    # what must have come out ------------------------------------------------------------

    def numbers_sent(self) -> NDArray[np.int64]:
        """int64[n]: the number of each record that was sent, in order."""
        nothing = np.empty(0, np.int64)
        return np.concatenate([nothing, *(run.numbers_sent() for run in self._runs)])

    def _numbers_in_states(self) -> NDArray[np.int64]:
        runs = self._runs[self._first_run_in_states :]
        return np.concatenate([np.empty(0, np.int64), *(run.numbers_sent() for run in runs)])

    def transactions_made(self) -> int:
        """Those of the stream that were made, sent or not: numbers are less than this."""
        return sum(map(len, self._accounts))

    def transactions_of_accounts(self) -> dict[str, int]:
        """How many distinct transactions of each account must be in its state."""
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
    """From a start to a stop; what was made and not sent then is never sent."""

    feed: Feed
    numbers: list[NDArray[np.int64]] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    feeding: asyncio.Task[None] | None = None

    async def end(self) -> None:
        """Wait for its end and for the acks.

        Raises:
            RecurError: the broker does not take it.
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
        """int64[n]: of the records that were sent, in order."""
        return np.concatenate([np.empty(0, np.int64), *self.numbers])[: self.feed.count.sent]


def of_one_account(share: float) -> ChangeColumns:
    """This share of all transactions becomes one account's."""

    def change(columns: Columns, rng: np.random.Generator) -> Columns:
        account = columns.account.copy()
        account[rng.random(len(account)) < share] = 0
        return replace(columns, account=account)

    return change


def backwards(columns: Columns, rng: np.random.Generator) -> Columns:
    """Times within a piece run backwards, and a piece may lie years before the one before it."""
    years_ms = int(rng.integers(0, 3)) * 365 * 86_400_000
    return replace(columns, timestamp_ms=columns.timestamp_ms[::-1] - years_ms)


def sent_twice(share: float) -> ChangeRecords:
    """This share of all records is sent a second time at once, as a producer does that retries."""

    def change(sent: Sent, rng: np.random.Generator) -> Sent:
        order = np.repeat(np.arange(len(sent.keys)), 1 + (rng.random(len(sent.keys)) < share))
        return Sent(
            [sent.keys[i] for i in order.tolist()],
            [sent.values[i] for i in order.tolist()],
            sent.numbers[order],
        )

    return change
