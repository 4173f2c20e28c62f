"""Raw features of a whole data set on disk, and the inputs encoded from them.

The same functions as in the worker compute the columns, for a group of accounts or merchants at a
time. The table is ordered by account, because a training reads consecutive transactions of a few
dozen accounts at once.

Memory: about 300 bytes for each of :data:`GROUP_TRANSACTIONS`, and 32 bytes for each transaction
(its position and its account). All transactions of one merchant are processed together.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Dataset, DatasetError
from model.features.account import ACCOUNT_FEATURES, observe_log
from model.features.amount_scale import AmountScale
from model.features.merchant import WEIGHT_MAX, Labels, observe_merchant_log
from model.features.spec import FEATURES, Encoder, FeatureSpec, Field, field_column
from model.training.sequences import Sequences

GROUP_TRANSACTIONS = 2_000_000
"""Most transactions in a group of whole accounts or merchants."""

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]
Weigh = Callable[[Float32, Rows], NDArray[np.uint8]]
"""Function that gives the merchant weights [m] of frauds at positions [m] of raw features [N, R].

The merchants' columns are still empty when it is called."""


def write_raw(
    dataset: Dataset,
    sequences: Sequences,
    spec: FeatureSpec,
    path: Path,
    weigh: Weigh | None = None,
    show: Callable[[float], None] = lambda _: None,
) -> Float32:
    """Compute the raw features of all transactions into a file mapped into memory.

    A label becomes known ``spec.label_delay_days`` after its transaction.

    Args:
        dataset: the transactions.
        sequences: the transactions of each account.
        spec: specification; only its fields, scale and label delay matter here.
        path: file to write.
        weigh: gives the merchant weights of frauds. None: each fraud has the full weight.
        show: called with the share done.

    Returns:
        raw: [N, R] read-only, in the order of ``sequences.row``.

    Raises:
        DatasetError: the file cannot be written, or the disk is full.
    """

    def fill(raw: Float32) -> None:
        _accounts(dataset, sequences, spec.scale, raw, lambda done: show(done * 0.3))
        _fields(dataset, sequences, spec, raw)
        weight = np.full(len(dataset), WEIGHT_MAX, np.uint8)
        if weigh is not None:
            fraud = np.flatnonzero(dataset.is_fraud[sequences.row])
            weight[sequences.row[fraud]] = weigh(raw, fraud)
        _merchants(dataset, sequences, spec, weight, raw, lambda done: show(0.5 + done * 0.5))

    return _written(path, (len(dataset), len(spec.names)), fill)


def open_raw(path: Path, dataset: Dataset, spec: FeatureSpec) -> Float32:
    """Open the file that :func:`write_raw` wrote."""
    return _open(path, (len(dataset), len(spec.names)))


def _written(path: Path, shape: tuple[int, int], fill: Callable[[Float32], None]) -> Float32:
    """Write a file of float32 completely or not at all, and map it for reading."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.truncate(shape[0] * shape[1] * 4)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a fault later
                os.posix_fallocate(file.fileno(), 0, shape[0] * shape[1] * 4)
        values = np.memmap(partial, np.float32, "r+", shape=shape)
        fill(values)
        values.flush()
        partial.replace(path)
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error.strerror or error}; make room") from error
    return _open(path, shape)


def _open(path: Path, shape: tuple[int, int]) -> Float32:
    return np.asarray(np.memmap(path, np.float32, "r", shape=shape))


def restarted_inputs(
    dataset: Dataset,
    sequences: Sequences,
    inputs: EncodedInputs,
    until_row: int,
    path: Path,
    seed: int,
    show: Callable[[float], None] = lambda _: None,
) -> tuple[EncodedInputs, Sequences]:
    """Compute inputs and sequences of the same log in which each account restarts once.

    If all accounts exist from the first day, only such a log shows accounts without a history.

    Args:
        dataset: the transactions.
        sequences: the transactions of each account.
        inputs: inputs of the unchanged log.
        until_row: accounts restart at transactions before this row of the log.
        path: file to write.
        seed: decides where each account restarts.
        show: called with the share done.

    Raises:
        DatasetError: the file cannot be written, or the disk is full.
    """
    parts = sequences.restarted(sequences.before(until_row).length, seed)
    shape = len(dataset), len(ACCOUNT_FEATURES)
    scale = inputs.spec.scale
    accounts = _written(path, shape, lambda raw: _accounts(dataset, parts, scale, raw, show))
    return inputs.with_accounts(accounts), parts


def _accounts(
    dataset: Dataset,
    sequences: Sequences,
    scale: AmountScale,
    raw: Float32,
    show: Callable[[float], None],
) -> None:
    number = np.repeat(np.arange(len(sequences.length)), sequences.length)  # by position
    for begin, end in _groups(sequences.length):
        rows = sequences.row[begin:end]
        raw[begin:end, : len(ACCOUNT_FEATURES)] = observe_log(
            number[begin:end],
            np.asarray(dataset.amount[rows]),
            np.asarray(dataset.timestamp_ms[rows]),
            scale,
        )
        show(end / len(raw))


def _merchants(
    dataset: Dataset,
    sequences: Sequences,
    spec: FeatureSpec,
    weight: NDArray[np.uint8],
    raw: Float32,
    show: Callable[[float], None],
) -> None:
    place = np.empty(len(raw), np.intp)  # of each row of the log in raw
    place[sequences.row] = np.arange(len(raw))
    by_merchant = np.argsort(dataset.merchant, kind="stable")
    lengths = np.bincount(dataset.merchant)
    delay_ms = spec.label_delay_ms
    for begin, end in _groups(lengths):
        rows = np.sort(by_merchant[begin:end])
        times = np.asarray(dataset.timestamp_ms[rows])
        labels = Labels.delayed(dataset.is_fraud[rows], times, delay_ms, weight[rows])
        raw[place[rows], len(ACCOUNT_FEATURES) : len(FEATURES)] = observe_merchant_log(
            dataset.merchant[rows].astype(np.int64), times, labels, delay_ms
        )
        show(end / len(raw))


def _fields(dataset: Dataset, sequences: Sequences, spec: FeatureSpec, raw: Float32) -> None:
    for column, field in enumerate(spec.fields, start=len(FEATURES)):
        values = field_values(dataset, field)
        for begin in range(0, len(raw), GROUP_TRANSACTIONS):
            there = slice(begin, begin + GROUP_TRANSACTIONS)
            raw[there, column] = values(sequences.row[there])


def field_values(dataset: Dataset, field: Field) -> Callable[[Rows], Float32]:
    """Return a function that gives the raw column of a field for some rows.

    The values are those of :func:`model.features.spec.field_column`.
    """
    if field.kind == "numeric":
        numbers = dataset.numeric[field.name]
        return lambda rows: np.asarray(numbers[rows])
    codes = field_column(field)([None, *dataset.texts[field.name]])
    found = dataset.categorical[field.name]
    return lambda rows: codes[found[rows] + 1]  # MISSING is -1


def _groups(lengths: NDArray[np.intp] | NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of groups of whole accounts.

    A group has at most :data:`GROUP_TRANSACTIONS` transactions, or is one longer account.

    >>> list(_groups(np.array([1_500_000, 400_000, 200_000, 3_000_000])))
    [(0, 1900000), (1900000, 2100000), (2100000, 5100000)]
    """
    ends = np.cumsum(lengths)
    begin = 0
    while begin < (ends[-1] if len(ends) else 0):
        last = int(np.searchsorted(ends, begin + GROUP_TRANSACTIONS, side="right")) - 1
        end = int(ends[last]) if last >= 0 and ends[last] > begin else begin
        if end == begin:  # one account that is longer than a group
            end = int(ends[np.searchsorted(ends, begin, side="right")])
        yield begin, end
        begin = end


class EncodedInputs:
    """Inputs that are encoded at each access (a :class:`Inputs`)."""

    def __init__(self, raw: Float32, spec: FeatureSpec, device: torch.device) -> None:
        self._raw = raw
        self._accounts: Float32 | None = None
        self.spec = spec
        self._encoder = Encoder(spec)
        self._inputs = len(spec.inputs)
        self._device = device

    def __len__(self) -> int:
        return len(self._raw)

    def with_accounts(self, accounts: Float32) -> EncodedInputs:
        """Return the same inputs with other features of the accounts [N, A], in the same order."""
        other = copy.copy(self)
        other._accounts = accounts
        return other

    def at(self, position: NDArray[np.intp]) -> Tensor:
        """Return the inputs [..., I] at positions [...]."""
        raw = self._raw[position.ravel()]
        if self._accounts is not None:
            raw[:, : len(ACCOUNT_FEATURES)] = self._accounts[position.ravel()]
        encoded = self._encoder.encode(raw)
        return torch.from_numpy(encoded).view(*position.shape, self._inputs).to(self._device)
