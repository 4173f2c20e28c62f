"""The cost of faults: a log scored step by step as a worker does, with disturbed states.

Only account states are disturbed. Merchant profiles belong to all accounts and are wrong by at most
a micro-batch after a crash, so their features stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from model.checkpoint import Checkpoint
from model.data.dataset import Dataset
from model.evaluation.protocol import Fold, days_of, iso_date
from model.features.account import ACCOUNT_FEATURES, AccountHistory, Float32, observe, rounds_of
from model.metrics import average_precision
from model.stepper import sigmoid
from model.training.sequences import one_core_each
from model.units import DAY_MS

WEEK_DAYS = 7
THREADS = 2
"""Number of faults that are tried in parallel."""

RawOf = Callable[[NDArray[np.intp]], Float32]


@dataclass(frozen=True)
class Faults:
    """Faults of account states.

    Attributes:
        title: title in tables.
        hidden_dtype: type to which hidden states are rounded after each step.
        expire_days: a state that is idle for longer is dropped. None: no state is dropped.
        twice_share: share of transactions that are applied to the state twice (and scored once).
        lost_share: share of transactions whose state update is lost.
        wiped_ms: time at which all states are lost, epoch milliseconds.
        seed: decides which transactions are affected.
    """

    title: str
    hidden_dtype: DTypeLike = np.float32
    expire_days: float | None = None
    twice_share: float = 0.0
    lost_share: float = 0.0
    wiped_ms: int | None = None
    seed: int = 0


NO_FAULTS = Faults("none")
FAULTS: tuple[Faults, ...] = (
    Faults("states kept in float16", hidden_dtype=np.float16),
    Faults("states expire after 30 days", expire_days=30.0),
    Faults("1 % of transactions applied twice", twice_share=0.01),
    Faults("1 % of state writes lost", lost_share=0.01),
)
"""Faults to measure. Each must cost less than .001 of average precision."""


class FaultCost(msgspec.Struct, frozen=True):
    """Average precision on the test with a fault, and the loss by the fault."""

    title: str
    average_precision: float
    lost: float


class Week(msgspec.Struct, frozen=True):
    """Average precision in a week of the test, with all states and after their loss."""

    first_day: str
    frauds: int
    with_states: float
    states_lost: float


class Robustness(msgspec.Struct, frozen=True):
    """Costs of faults.

    Attributes:
        average_precision: average precision without faults.
        faults: cost of each fault by itself.
        weeks: weeks after the loss of all states at the start of the test.
    """

    average_precision: float
    faults: list[FaultCost]
    weeks: list[Week]


def score_with_faults(
    checkpoint: Checkpoint, log: Dataset, raw_of: RawOf, faults: Faults, end: int | None = None
) -> Float32:
    """Score the first n transactions of a log step by step, from empty account states.

    Args:
        log: the transactions.
        raw_of: gives the raw features [m, R] of rows [m] of the log. The columns of the account
            are computed again from the disturbed states.
        faults: the faults of the states.
        end: number n of transactions. None: all.
    """
    n_scored = len(log) if end is None else end
    rounds = rounds_of(log.account[:n_scored].astype(np.int64))
    n = len(rounds[0]) if rounds else 0
    history = AccountHistory.empty(n)
    hidden = checkpoint.stepper.empty_hidden(n)
    wiped = np.zeros(n, np.bool_)  # True after the account's first transaction since the wipe
    rng = np.random.default_rng(faults.seed)
    twice = rng.random(n_scored) < faults.twice_share
    lost = rng.random(n_scored) < faults.lost_share
    scores = np.empty(n_scored, np.float32)
    scale = checkpoint.header.features.scale

    def advance(
        account: NDArray[np.intp], rows: NDArray[np.intp]
    ) -> tuple[AccountHistory, Float32, Float32]:
        of_account, after = observe(
            history.take(account), log.amount[rows], log.timestamp_ms[rows], scale
        )
        whole = np.hstack((of_account, raw_of(rows)[:, len(ACCOUNT_FEATURES) :]))
        logits, advanced = checkpoint.stepper.step(checkpoint.encode(whole), hidden[account])
        return after, advanced.astype(faults.hidden_dtype), logits

    for rows in rounds:
        account = np.arange(len(rows))  # accounts have the same order in each round
        gone = _gone(history.take(account), wiped, log.timestamp_ms[rows], faults)
        history.put(gone, AccountHistory.empty(len(gone)))
        hidden[gone] = 0.0
        after, advanced, logits = advance(account, rows)
        scores[rows] = sigmoid(logits)
        kept = np.flatnonzero(~lost[rows])
        history.put(kept, after.take(kept))
        hidden[kept] = advanced[kept]
        again = np.flatnonzero(twice[rows])
        if len(again):
            after, advanced, _ = advance(again, rows[again])
            history.put(again, after)
            hidden[again] = advanced
    return scores


def _gone(
    history: AccountHistory, wiped: NDArray[np.bool_], timestamp_ms: NDArray[np.int64], f: Faults
) -> NDArray[np.intp]:
    """Return the accounts of a round whose state is gone, and mark the wiped ones."""
    gone = np.zeros(len(history), np.bool_)
    if f.expire_days is not None:
        silent_ms = timestamp_ms - history.last_event_ms
        gone |= (history.count > 0) & (silent_ms > f.expire_days * DAY_MS)
    if f.wiped_ms is not None:
        first_after = (timestamp_ms >= f.wiped_ms) & ~wiped[: len(history)]
        wiped[: len(history)] |= first_after
        gone |= first_after
    return np.flatnonzero(gone)


def measure_robustness(
    checkpoint: Checkpoint,
    log: Dataset,
    raw_of: RawOf,
    fold: Fold,
    show: Callable[[float, str], None] = lambda share, note: None,
) -> Robustness:
    """Measure the cost of each of :data:`FAULTS`, and of the loss of all states, on a test.

    Args:
        log: the transactions.
        raw_of: gives the raw features [m, R] of rows [m] of the log for this checkpoint.
        fold: its test is measured; all states are lost at its start.
        show: called with the share done and the current step.
    """
    end = fold.end_row(log)
    rows = fold.tested_rows(log)
    is_fraud = log.is_fraud[rows]
    wipe = Faults("all states lost", wiped_ms=fold.test_from * DAY_MS)
    everything = (NO_FAULTS, *FAULTS, wipe)
    scored = {}
    with one_core_each(THREADS) as pool:
        running = pool.map(
            lambda faults: score_with_faults(checkpoint, log, raw_of, faults, end), everything
        )
        for number, faults in enumerate(everything):
            show(number / len(everything), f"faults: {faults.title}")
            scored[faults.title] = next(running)[rows]
    undisturbed = scored[NO_FAULTS.title]
    best = average_precision(undisturbed, is_fraud)
    costs = []
    for faults in FAULTS:
        found = average_precision(scored[faults.title], is_fraud)
        costs.append(FaultCost(faults.title, found, best - found))
    return Robustness(
        best, costs, _weeks(fold, days_of(log)[rows], is_fraud, undisturbed, scored[wipe.title])
    )


def _weeks(
    fold: Fold,
    day: NDArray[np.int64],
    is_fraud: NDArray[np.bool_],
    with_states: Float32,
    states_lost: Float32,
) -> list[Week]:
    """Measure the weeks of the test that have fraud; the last one may be short."""
    weeks = []
    for first in range(fold.test_from, fold.test_until, WEEK_DAYS):
        chosen = (day >= first) & (day < first + WEEK_DAYS)
        truth = is_fraud[chosen]
        if not 0 < truth.sum() < len(truth):
            continue  # no precision without fraud
        ap = [average_precision(s[chosen], truth) for s in (with_states, states_lost)]
        weeks.append(Week(iso_date(first), int(truth.sum()), ap[0], ap[1]))
    return weeks
