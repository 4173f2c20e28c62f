"""Discriminators that tell real from generated accounts: a GRU, and LightGBM on windows.

Both learn from one half of the accounts and are tested on the other. An account's score is the
mean over its windows. An AUC of .5 means that they cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.evaluation.history_views import Histories
from model.evaluation.lightgbm_reference import lightgbm
from model.metrics import auc_roc
from model.torch_threads import one_thread

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

WINDOW_STEPS = 64
WINDOWS_MAX = 6
"""Most windows of an account, spread over its history."""

HIDDEN_SIZE = 32
EPOCHS = 12
BATCH_WINDOWS = 128
VALIDATED_SHARE = 0.2
TREES = 200
_PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 20,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "deterministic": True,
    "num_threads": 1,
    "verbosity": -1,
}


@dataclass(frozen=True)
class Windows:
    """Windows of histories.

    Attributes:
        steps: [W, WINDOW_STEPS, V], zero after the window's end.
        length: [W].
        account: [W] the account of each.
    """

    steps: Float32
    length: Int64
    account: Int64


def windows_of(histories: Histories) -> Windows:
    """Cut histories into windows; a longer history gives at most :data:`WINDOWS_MAX`."""
    steps, length, account = [], [], []
    for number in range(histories.accounts):
        n = int(histories.length[number])
        count = min(WINDOWS_MAX, max(1, n // WINDOW_STEPS))
        last = max(n - WINDOW_STEPS, 0)
        for begin in np.round(np.linspace(0, last, count)).astype(int):
            size = min(WINDOW_STEPS, n - begin)
            at = int(histories.start[number]) + begin
            window = np.zeros((WINDOW_STEPS, histories.steps.shape[1]), np.float32)
            window[:size] = histories.steps[at : at + size]
            steps.append(window)
            length.append(size)
            account.append(number)
    return Windows(np.stack(steps), np.array(length), np.array(account))


@dataclass(frozen=True)
class Discrimination:
    """Findings of the discriminators on the accounts of the test.

    Attributes:
        gru, lightgbm: AUC over accounts.
        telling: views by the gain of LightGBM's trees, the most telling first.
    """

    gru: float
    lightgbm: float
    telling: list[str]


def discriminate(
    real: Histories,
    generated: Histories,
    seed: int,
    show: Callable[[float], None] = lambda _: None,
) -> Discrimination:
    """Train and test both discriminators.

    Raises:
        model.evaluation.lightgbm_reference.MissingRequirementError: LightGBM is not installed.
    """
    rng = np.random.default_rng(seed)
    both = [windows_of(real), windows_of(generated)]
    accounts = [real.accounts, generated.accounts]
    steps = np.concatenate([w.steps for w in both])
    length = np.concatenate([w.length for w in both])
    account = np.concatenate([both[0].account, both[1].account + accounts[0]])
    is_real = account < accounts[0]
    # A half of each kind tests; a part of the others chooses the epoch.
    part = np.concatenate([_parts(count, rng) for count in accounts])[account]
    gru = _gru(steps, length, is_real, part, account, seed, show)
    boosted, telling = _boosted(steps, length, is_real, part)
    tested = part == 2
    found = [_account_auc(s, is_real[tested], account[tested]) for s in (gru, boosted)]
    return Discrimination(found[0], found[1], telling)


def _parts(accounts: int, rng: np.random.Generator) -> Int64:
    """Return for each account whether it trains (0), validates (1) or tests (2)."""
    place = rng.permutation(accounts) / accounts
    return np.where(place < 0.5, 2, np.where(place < 0.5 + VALIDATED_SHARE / 2, 1, 0))


def _account_auc(score: Floats, is_real: Bools, account: Int64) -> float:
    codes, place = np.unique(account, return_inverse=True)
    mean = np.bincount(place, score) / np.bincount(place)
    real = np.zeros(len(codes), np.bool_)
    real[place] = is_real
    return float(auc_roc(mean, real))


class _Reader(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, HIDDEN_SIZE, batch_first=True)
        self.out = nn.Sequential(
            nn.Linear(2 * HIDDEN_SIZE, HIDDEN_SIZE), nn.ReLU(), nn.Linear(HIDDEN_SIZE, 1)
        )

    def forward(self, steps: Tensor, length: Tensor) -> Tensor:
        states, _ = self.gru(steps)
        there = torch.arange(steps.shape[1])[None, :] < length[:, None]
        mean = (states * there[..., None]).sum(1) / length[:, None]
        last = states[torch.arange(len(states)), length - 1]
        found: Tensor = self.out(torch.cat((mean, last), 1)).squeeze(1)
        return found


def _gru(
    steps: Float32,
    length: Int64,
    is_real: Bools,
    part: Int64,
    account: Int64,
    seed: int,
    show: Callable[[float], None],
) -> Floats:
    """Return the GRU's scores of the windows of the test."""
    train, valid, test = (np.flatnonzero(part == number) for number in range(3))
    flat = steps[train].reshape(-1, steps.shape[2])
    mean, scale = flat.mean(0), flat.std(0) + 1e-3
    data = torch.from_numpy((steps - mean) / scale)
    lengths, truth = torch.from_numpy(length), torch.from_numpy(is_real.astype(np.float32))
    rng = np.random.default_rng(seed)
    best, scores = -1.0, np.zeros(len(test))
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = _Reader(steps.shape[2])
        optimizer = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=1e-3)

        def score(rows: Int64) -> Floats:
            with torch.inference_mode():
                parts = [
                    reader(data[at], lengths[at]).numpy()
                    for at in np.array_split(rows, max(1, len(rows) // 512))
                ]
            return np.concatenate(parts).astype(np.float64)

        for epoch in range(EPOCHS):
            reader.train()
            for begin in range(0, len(train), BATCH_WINDOWS):
                if begin == 0:
                    order = rng.permutation(train)
                at = order[begin : begin + BATCH_WINDOWS]
                loss = nn.functional.binary_cross_entropy_with_logits(
                    reader(data[at], lengths[at]), truth[at]
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            reader.eval()
            found = _account_auc(score(valid), is_real[valid], account[valid])
            if found > best:
                best, scores = found, score(test)
            show((epoch + 1) / EPOCHS)
    return scores


def _boosted(
    steps: Float32, length: Int64, is_real: Bools, part: Int64
) -> tuple[Floats, list[str]]:
    """Return LightGBM's scores of the windows of the test, and the most telling inputs."""
    module = lightgbm()
    inputs, names = _summaries(steps, length)
    train, valid, test = (np.flatnonzero(part == number) for number in range(3))
    known = module.Dataset(inputs[train], is_real[train].astype(int))
    check = module.Dataset(inputs[valid], is_real[valid].astype(int), reference=known)
    booster = module.train(
        {**_PARAMETERS, "metric": "auc"},
        known,
        TREES,
        valid_sets=[check],
        callbacks=[module.early_stopping(40, verbose=False)],
    )
    gain = booster.feature_importance("gain")
    telling = [names[place] for place in np.argsort(-gain)[:8]]
    return np.asarray(booster.predict(inputs[test], num_threads=1)), telling


def _summaries(steps: Float32, length: Int64) -> tuple[Floats, list[str]]:
    """Return numbers [W, D] of each window, and their names."""
    from model.evaluation.history_views import STEP_VIEWS

    there = np.arange(steps.shape[1])[None, :] < length[:, None]
    masked = np.where(there[..., None], steps, np.nan).astype(np.float64)
    columns, names = [length.astype(float)], ["length"]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nanmean(masked, 1)
        deviation = np.nanstd(masked, 1)
        quantiles = np.nanquantile(masked, [0.0, 0.1, 0.5, 0.9, 1.0], axis=1)
        off = np.nan_to_num(masked - mean[:, None])
        lagged = (off[:, 1:] * off[:, :-1]).sum(1) / np.maximum((off**2).sum(1), 1e-9)
        with_amount = (off * off[:, :, 1:2]).mean(1) / np.maximum(
            deviation * deviation[:, 1:2], 1e-9
        )
    for name, table in (
        ("mean", mean),
        ("deviation", deviation),
        ("least", quantiles[0]),
        ("q10", quantiles[1]),
        ("median", quantiles[2]),
        ("q90", quantiles[3]),
        ("most", quantiles[4]),
        ("autocorrelation", lagged),
        ("with amount", with_amount),
    ):
        for place, view in enumerate(STEP_VIEWS):
            columns.append(table[:, place])
            names.append(f"{view} {name}")
    return np.stack(columns, 1), names
