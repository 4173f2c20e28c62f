"""Offline scores of a whole log, by unrolling or one transaction at a time.

:func:`score_unrolled` is the fast way, for training and evaluation. :func:`score_stepwise` computes
exactly what a worker computes, with its rounding, and is the reference for tests and audits.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
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
from model.stepper import sigmoid
from model.torch_threads import one_thread

UNROLL_STEPS = 256
UNROLL_ACCOUNTS = 256


UNROLL_THREADS = 2
"""Groups of accounts that are unrolled in parallel, each on one core.

The products of a recurrent network are too small to split. Threads that wait for each other are
slow on a busy machine."""


class Inputs(Protocol):
    """Inputs of the network by position, account by account (see :attr:`Sequences.row`)."""

    def at(self, position: NDArray[np.intp]) -> Tensor:
        """Return the inputs [..., I] at positions [...]; the caller may change them."""
        ...


class TensorInputs:
    """Inputs held in memory.

    Args:
        inputs: [N, I] in the order of the log.
        sequences: the transactions of each account.
    """

    def __init__(self, inputs: Tensor, sequences: Sequences) -> None:
        self._inputs = inputs
        self._row = sequences.row

    def at(self, position: NDArray[np.intp]) -> Tensor:
        """Return the inputs [..., I] at positions [...]."""
        return self._inputs[torch.from_numpy(self._row[position]).to(self._inputs.device)]


class Sequences:
    """Transactions of a log as one sequence for each account.

    Attributes:
        row: [N] rows of the log, account by account, each in order of time.
        start: [accounts] position in ``row`` of each account's first transaction.
        length: [accounts] number of its transactions.
    """

    def __init__(self, account: Int64 | NDArray[np.int32]) -> None:
        self.row = np.argsort(account, kind="stable")
        self.length = np.unique(account, return_counts=True)[1]
        self.start = np.cumsum(self.length) - self.length

    def before(self, row: int) -> Sequences:
        """Return only the transactions before a row of the log; positions stay the same."""
        there = np.concatenate(([0], np.cumsum(self.row < row)))
        length = there[self.start + self.length] - there[self.start]
        return self._with(self.start, length)

    def restarted(self, within: NDArray[np.intp], seed: int) -> Sequences:
        """Split each account's transactions in two; the second part has no history.

        Args:
            within: [accounts] the second part begins at a random transaction among the first
                ``within``, or after them.
            seed: decides where the second parts begin.
        """
        cut = np.random.default_rng(seed).integers(0, within, endpoint=True)
        start = np.stack((self.start, self.start + cut), 1).ravel()
        return self._with(start, np.stack((cut, self.length - cut), 1).ravel())

    def with_lengths(self, length: NDArray[np.intp]) -> Sequences:
        """Return only the first transactions of each account, ``length`` [accounts] of them."""
        return self._with(self.start, length)

    def _with(self, start: NDArray[np.intp], length: NDArray[np.intp]) -> Sequences:
        """Return other sequences of the same rows; positions stay the same."""
        other = Sequences.__new__(Sequences)
        other.row, other.start, other.length = self.row, start, length
        return other

    def chunks(
        self, accounts: NDArray[np.intp], steps: int
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
        """Cut the accounts' sequences into chunks of ``steps`` transactions.

        The longest sequence comes first, so accounts that continue are the first rows of the
        previous chunk.

        Yields:
            Positions [n, steps] in ``row``, and whether there is a transaction [n, steps]. Without
            one the position is the account's last.
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
    """Score a log in order of time; the scores [N] are in the order of the log.

    Args:
        network: in evaluation mode.
        inputs: [N, I] on the network's device.
        account: [N].
        sequences: the sequences of ``account``, if known.
    """
    sequences = sequences or Sequences(account)
    logits = unrolled_logits(network, TensorInputs(inputs, sequences), sequences)
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def unrolled_logits(network: Network, inputs: Inputs, sequences: Sequences) -> Float32:
    """Compute the logits [N] in the order of the log; NaN for transactions in no sequence.

    Args:
        network: in evaluation mode.
        inputs: the inputs by position.
        sequences: the transactions to score.
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
    """Open a pool of threads in which each operation uses one core."""
    with one_thread(), ThreadPoolExecutor(threads, thread_name_prefix="unroll") as pool:
        yield pool


def score_stepwise(
    checkpoint: Checkpoint,
    account: Int64,
    amount: Float64,
    timestamp_ms: Int64,
    others: Float32 | None = None,
    hidden_dtype: DTypeLike = np.float16,
) -> tuple[Float32, AccountHistory, Float32]:
    """Score a log exactly as a worker does, from empty account states.

    Args:
        account: [N] in the order in which the transactions are applied.
        amount: [N].
        timestamp_ms: [N].
        others: [N, R - A] raw columns after those of the account. None: zeros.
        hidden_dtype: type to which hidden states are rounded after each step.

    Returns:
        scores: [N] in the order of the log.
        history: history of each account, by ascending ``account``.
        hidden: [accounts, L, H] float32, by ascending ``account``.
    """
    rounds = rounds_of(account)
    order = account[rounds[0]] if rounds else account  # accounts have this order in every round
    history = AccountHistory.empty(len(order))
    hidden = checkpoint.stepper.empty_hidden(len(order))
    scores = np.empty(len(account), np.float32)
    scale = checkpoint.header.features.scale
    if others is None:
        columns = len(checkpoint.header.features.names) - len(ACCOUNT_FEATURES)
        others = np.zeros((len(account), columns), np.float32)
    for rows in rounds:
        active = slice(0, len(rows))
        taken = history.take(active)
        raw, after = observe(taken, amount[rows], timestamp_ms[rows], scale)
        history.put(active, after)
        inputs = checkpoint.encode(np.hstack((raw, others[rows])))
        logits, advanced = checkpoint.stepper.step(inputs, hidden[active])
        hidden[active] = advanced.astype(hidden_dtype)
        scores[rows] = sigmoid(logits)
    ascending = np.argsort(order)
    return scores, history.take(ascending), hidden[ascending]
