"""Distances between real and generated histories: marginals, dependence and frauds.

Most are Kolmogorov and Smirnov's distance: the largest difference of two distribution functions,
0 to 1. Beside each stands the distance of two groups of real accounts, which is chance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.evaluation.history_views import Histories, account_vectors
from model.metrics import auc_roc
from model.units import DAY_MS

Floats = NDArray[np.float64]

MEASURES = (
    *("amount", "gap", "hour", "weekday", "payments an account", "merchants an account"),
    *("accounts a merchant", "repeat visits", "autocorrelation of amounts"),
    *("frauds an account", "run of frauds"),
)
AUTOCORRELATION_LEAST = 20
"""Fewest transactions of an account whose autocorrelation is measured."""

_BLOCK_ROWS = 512


def quantities(histories: Histories) -> dict[str, Floats]:
    """Return what is compared, by name: values by transaction, by account or by run of frauds."""
    account = np.repeat(np.arange(histories.accounts), histories.length)
    time, amount = histories.column("timestamp_ms"), histories.column("amount")
    fraud = histories.log.is_fraud[histories.row]
    merchant = histories.log.merchant[histories.row]
    new = np.bincount(account, ~histories.seen, histories.accounts)
    return {
        "amount": amount,
        "gap": histories.gap_hours[np.isfinite(histories.gap_hours)],
        "hour": time % DAY_MS,
        "weekday": (time // DAY_MS + 3) % 7,
        "payments an account": histories.length.astype(float),
        "merchants an account": new,
        "accounts a merchant": np.bincount(merchant[~histories.seen]).astype(float),
        "repeat visits": histories.visits.astype(float),
        "autocorrelation of amounts": _autocorrelations(histories, account, amount),
        "frauds an account": np.bincount(account, fraud, histories.accounts),
        "run of frauds": _runs(fraud, account),
    }


def distances(real: Histories, other: Histories) -> dict[str, float]:
    """Return the distance of each quantity, by name."""
    first, second = quantities(real), quantities(other)
    return {name: kolmogorov_smirnov(first[name], second[name]) for name in MEASURES}


def kolmogorov_smirnov(first: Floats, second: Floats) -> float:
    """Return the largest difference of two distribution functions; 1 if one has no values.

    >>> kolmogorov_smirnov(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    0.5
    """
    if not len(first) or not len(second):
        return 1.0
    grid = np.unique(np.concatenate((first, second)))
    shares = [
        np.searchsorted(np.sort(values), grid, side="right") / len(values)
        for values in (first, second)
    ]
    return float(np.abs(shares[0] - shares[1]).max())


def _autocorrelations(histories: Histories, account: NDArray[np.intp], amount: Floats) -> Floats:
    count = histories.length
    mean = np.bincount(account, amount, histories.accounts) / count
    off = amount - mean[account]
    same = np.diff(account) == 0
    product = np.bincount(account[1:][same], (off[1:] * off[:-1])[same], histories.accounts)
    total = np.bincount(account, off**2, histories.accounts)
    found = product / np.maximum(total, 1e-9)
    return np.asarray(found[count >= AUTOCORRELATION_LEAST])


def _runs(fraud: NDArray[np.bool_], account: NDArray[np.intp]) -> Floats:
    """Return the lengths of the runs of frauds without a legitimate transaction between."""
    start = fraud.copy()
    start[1:] &= ~fraud[:-1] | (np.diff(account) != 0)
    group = np.cumsum(start)[fraud]
    return np.bincount(group)[1:].astype(float) if len(group) else np.zeros(0)


def privacy(members: Histories, others: Histories, generated: Histories) -> dict[str, float]:
    """Measure whether generated accounts are closer to the training's accounts than to others.

    Returns:
        closest_real: median distance of a generated account to its closest one of the training.
        closest_held_out: that of a real account that did not train.
        membership_auc: AUC of guessing the training's accounts by their distance to the closest
            generated one.
    """
    vectors = [account_vectors(histories) for histories in (members, others, generated)]
    mean, scale = vectors[0].mean(0), vectors[0].std(0) + 1e-9
    member, other, made = ((vector - mean) / scale for vector in vectors)
    near_members, near_others = _closest(member, made), _closest(other, made)
    truth = np.concatenate((np.ones(len(member), np.bool_), np.zeros(len(other), np.bool_)))
    guess = -np.concatenate((near_members, near_others))
    return {
        "closest_real": float(np.median(_closest(made, member))),
        "closest_held_out": float(np.median(_closest(other, member))),
        "membership_auc": float(auc_roc(guess, truth)),
    }


def _closest(rows: Floats, among: Floats) -> Floats:
    """Return the distance of each row [n] to the closest one among others."""
    found = []
    for begin in range(0, len(rows), _BLOCK_ROWS):
        block = rows[begin : begin + _BLOCK_ROWS]
        square = (block**2).sum(1)[:, None] - 2 * block @ among.T + (among**2).sum(1)
        found.append(np.sqrt(np.maximum(square.min(1), 0)))
    return np.concatenate(found)
