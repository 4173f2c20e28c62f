"""Scores of a whole log of transactions, offline: by unrolling, or a step at a time.

:func:`score_unrolled` is the fast way (training, evaluation). :func:`score_stepwise` does what
a worker does, with its rounding, and so says what any worker must come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint import Checkpoint
from model.features.account import (
    ACCOUNT_FEATURES,
    AccountHistory,
    Float32,
    Float64,
    Int64,
    observe,
    rounds_of,
)
from model.network import Network

UNROLL_STEPS = 256
UNROLL_ACCOUNTS = 256


UNROLL_THREADS = 2
"""Groups of accounts that are unrolled at once. Each on one core: a recurrent network's products
are too small to share out, and threads that wait for each other crawl on a busy machine."""


class Inputs(Protocol):
    """The network's inputs, account by account (positions in :attr:`Sequences.row`)."""

    def at(self, position: NDArray[np.intp]) -> Tensor:
        """[..., I] of positions [...]; the caller may change it."""
        ...


class TensorInputs:
    """Inputs that are held in memory.

    Args:
        inputs: [N, I] in the order of the log.
        sequences: of its accounts.
    """

    def __init__(self, inputs: Tensor, sequences: Sequences) -> None:
        self._inputs = inputs
        self._row = sequences.row

    def at(self, position: NDArray[np.intp]) -> Tensor:
        return self._inputs[torch.from_numpy(self._row[position]).to(self._inputs.device)]


class Sequences:
    """Transactions of a log as one sequence per account: where to find them.

    Attributes:
        row: [N] rows of the log, account by account, each in order of time.
        start: [accounts] position in ``row`` of each account's first transaction.
        length: [accounts] its transactions.
    """

    def __init__(self, account: Int64 | NDArray[np.int32]) -> None:
        self.row = np.argsort(account, kind="stable")
        self.length = np.unique(account, return_counts=True)[1]
        self.start = np.cumsum(self.length) - self.length

    def before(self, row: int) -> Sequences:
        """Only the transactions before a row of the log; positions stay what they are."""
        there = np.concatenate(([0], np.cumsum(self.row < row)))
        length = there[self.start + self.length] - there[self.start]
        return self._with(self.start, length)

    def restarted(self, within: NDArray[np.intp], seed: int) -> Sequences:
        """Each account's transactions in two parts, the second of an account without a past.

        Args:
            within: [accounts] the second part begins at a random one of so many first
                transactions, or after them.
        """
        cut = np.random.default_rng(seed).integers(0, within, endpoint=True)
        start = np.stack((self.start, self.start + cut), 1).ravel()
        return self._with(start, np.stack((cut, self.length - cut), 1).ravel())

    def _with(self, start: NDArray[np.intp], length: NDArray[np.intp]) -> Sequences:
        """Other sequences of the same rows; positions stay what they are."""
        other = Sequences.__new__(Sequences)
        other.row, other.start, other.length = self.row, start, length
        return other

    def chunks(
        self, accounts: NDArray[np.intp], steps: int
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
        """Cuts the accounts' sequences into chunks of ``steps``, from the beginning on.

        The longest sequence comes first, so those that go on are the first rows of the chunk
        before. Yields positions in ``row`` [n, steps] and whether a transaction is there
        [n, steps]; where none is, the position is the account's last.
        """
        accounts = accounts[np.argsort(-self.length[accounts], kind="stable")]
        start, length = self.start[accounts], self.length[accounts]
        for begin in range(0, int(length.max(initial=0)), steps):
            active = int((length > begin).sum())
            step = np.arange(begin, begin + steps)
            there = step < length[:active, None]
            within = np.minimum(step, length[:active, None] - 1)
            yield start[:active, None] + within, there


def score_unrolled(
    network: Network, inputs: Tensor, account: Int64, sequences: Sequences | None = None
) -> Float32:
    """Scores [N] of a log in order of time, in the order of the log.

    Args:
        network: in evaluation mode.
        inputs: [N, I] on the network's device.
        account: [N].
        sequences: of ``account``, if they are at hand.
    """
    sequences = sequences or Sequences(account)
    logits = unrolled_logits(network, TensorInputs(inputs, sequences), sequences)
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def unrolled_logits(network: Network, inputs: Inputs, sequences: Sequences) -> Float32:
    """Logits [N] in the order of the log; NaN where ``sequences`` leave transactions out.

    Args:
        network: in evaluation mode.
    """
    logits = np.full(len(sequences.row), np.nan, np.float32)
    longest_first = np.argsort(-sequences.length, kind="stable")

    def unroll(begin: int) -> None:
        group = longest_first[begin : begin + UNROLL_ACCOUNTS]
        hidden: Tensor | None = None
        with torch.inference_mode():
            for position, there in sequences.chunks(group, UNROLL_STEPS):
                before = None if hidden is None else hidden[: len(position)]
                given, hidden = network.unroll(inputs.at(position), before)  # [n, T]
                logits[sequences.row[position][there]] = given.cpu().numpy()[there]

    with one_core_each(UNROLL_THREADS) as pool:
        for _ in pool.map(unroll, range(0, len(longest_first), UNROLL_ACCOUNTS)):
            pass
    return logits


@contextmanager
def one_core_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose operations keep to one core each."""
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # of threads that begin from here on, too
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="unroll") as pool:
            yield pool
    finally:
        torch.set_num_threads(intra_op)


def score_stepwise(
    checkpoint: Checkpoint,
    account: Int64,
    amount: Float64,
    timestamp_ms: Int64,
    others: Float32 | None = None,
    hidden_dtype: torch.dtype = torch.float16,
) -> tuple[Float32, AccountHistory, Tensor]:
    """What a worker computes of a log, from empty account states, in one thread's order.

    Args:
        checkpoint: on the CPU.
        account: [N] the log is in the order in which it is applied.
        amount: [N].
        timestamp_ms: [N].
        others: [N, R - A] the columns of ``raw`` after the account's; zeros if there are none.
        hidden_dtype: the hidden is rounded to it after each step.

    Returns:
        scores: [N] in the order of the log.
        history: of each account, in ascending order of ``account``.
        hidden: [accounts, L, H] float32, the same order.
    """
    rounds = rounds_of(account)
    order = account[rounds[0]] if rounds else account  # of the accounts in every round
    history = AccountHistory.empty(len(order))
    hidden = checkpoint.network.empty_hidden(len(order))
    scores = np.empty(len(account), np.float32)
    scale = checkpoint.header.features.scale
    if others is None:
        columns = len(checkpoint.header.features.names) - len(ACCOUNT_FEATURES)
        others = np.zeros((len(account), columns), np.float32)
    with torch.inference_mode():
        for rows in rounds:
            n = len(rows)
            active = slice(0, n)
            taken = history.take(active)
            raw, after = observe(taken, amount[rows], timestamp_ms[rows], scale)
            history.put(active, after)
            inputs = torch.from_numpy(checkpoint.encode(np.hstack((raw, others[rows]))))
            logits, advanced = checkpoint.network.step(inputs, hidden[:n])
            hidden[:n] = advanced.to(hidden_dtype)
            scores[rows] = torch.sigmoid(logits).numpy()
    ascending = np.argsort(order)
    return scores, history.take(ascending), hidden[torch.from_numpy(ascending)].clone()
