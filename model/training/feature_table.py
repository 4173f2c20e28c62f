"""Raw features of a whole dataset, on disk, account by account; and the inputs read from them.

The columns are those of :mod:`model.features.account`, computed by the same functions as in the
worker, for some accounts (or merchants) at a time. A training reads a stretch of each of some dozen
accounts at once, so that account by account is the order in which they lie.

Memory: about 300 bytes for each of :data:`GROUP_TRANSACTIONS`, and for each transaction 32 bytes
(where it lies, and whose it is). A merchant's transactions are worked on together, however many
they are.
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
"""Whole accounts, or merchants, are worked on together up to so many transactions."""

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]
Weigh = Callable[[Float32, Rows], NDArray[np.uint8]]
"""Gives the merchant weights [m] of frauds at positions [m] of raw features [N, R], in which the
merchants' columns are still empty."""


def write_raw(
    dataset: Dataset,
    sequences: Sequences,
    spec: FeatureSpec,
    path: Path,
    weigh: Weigh | None = None,
    show: Callable[[float], None] = lambda _: None,
) -> Float32:
    """Compute raw features, and map the file that holds them into memory.

    Labels become known ``spec.label_delay_days`` after their transaction.

    Args:
        sequences: of the dataset's accounts.
        spec: its fields, scale and label delay count; its inputs do not.
        path: file to write.
        weigh: how far frauds count at their merchants; None: in full.
        show: called with the share that is done.

    Returns:
        raw: [N, R] in the order of ``sequences.row``, for reading only.

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
    """What :func:`write_raw` has written."""
    return _open(path, (len(dataset), len(spec.names)))


def _written(path: Path, shape: tuple[int, int], fill: Callable[[Float32], None]) -> Float32:
    """A file of float32, whole or not at all, mapped for reading."""
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
    """Inputs and sequences of the same log, had each account's state been lost once.

    Only such a log shows what accounts without a past look like, where all of them are there from
    the beginning.

    Args:
        sequences: of the dataset's accounts.
        inputs: of the whole log.
        until_row: states are lost at transactions before this row of the log.
        path: file to write.
        show: called with the share that is done.

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
    """As :func:`model.features.account.field_column` gives them, of some rows."""
    if field.kind == "numeric":
        numbers = dataset.numeric[field.name]
        return lambda rows: np.asarray(numbers[rows])
    codes = field_column(field)([None, *dataset.texts[field.name]])
    found = dataset.categorical[field.name]
    return lambda rows: codes[found[rows] + 1]  # MISSING is -1


def _groups(lengths: NDArray[np.intp] | NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of whole accounts, each up to :data:`GROUP_TRANSACTIONS` long.

    >>> list(_groups(np.array([1_500_000, 400_000, 200_000, 3_000_000])))
    [(0, 1900000), (1900000, 2100000), (2100000, 5100000)]
    """
    ends = np.cumsum(lengths)
    begin = 0
    while begin < (ends[-1] if len(ends) else 0):
        last = int(np.searchsorted(ends, begin + GROUP_TRANSACTIONS, side="right")) - 1
        end = int(ends[last]) if last >= 0 and ends[last] > begin else begin
        if end == begin:  # one that is longer than a group
            end = int(ends[np.searchsorted(ends, begin, side="right")])
        yield begin, end
        begin = end


class EncodedInputs:
    """Inputs that are encoded when they are asked for (a :class:`Inputs`)."""

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
        """The same inputs but for the accounts' features [N, A], in the same order."""
        other = copy.copy(self)
        other._accounts = accounts
        return other

    def at(self, position: NDArray[np.intp]) -> Tensor:
        """[..., I] of positions [...]."""
        raw = self._raw[position.ravel()]
        if self._accounts is not None:
            raw[:, : len(ACCOUNT_FEATURES)] = self._accounts[position.ravel()]
        encoded = self._encoder.encode(raw)
        return torch.from_numpy(encoded).view(*position.shape, self._inputs).to(self._device)
