"""Tables from which the network's training starts: shares that are counted, not learned.

Fraud is rare. A network would need many epochs to learn from it what a count tells at once: how a
fraud changes the time, the merchant and the amount, and when the next one follows.

Each table is a log ratio of what was counted to what the simple model expects, drawn towards a
coarser table where the counts are small.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.generator import grids
from model.generator.lessons import AT_COLUMN, NO_TARGET, Lessons
from model.generator.memory import FRAUD_STATES, SINCE_STATES, since_state_of
from model.generator.network import GeneratorNetwork
from model.generator.sizes import FRAUD_CLASSES, GeneratorSizes

Floats = NDArray[np.float64]
Int64 = NDArray[np.int64]

PRIOR_STEPS = 20.0
"""Steps as which a coarser table counts, beside the counts of a finer one."""

ROUNDS = 40
LOG_ODDS_MOST = 12.0

_BLOCK_ROWS = 65_536


def starting_tables(lessons: Lessons, sizes: GeneratorSizes) -> dict[str, Floats]:
    """Count the tables, by the names of the network's parameters."""
    column = {name: lessons.targets[:, place] for name, place in AT_COLUMN.items()}
    going = column["time"] >= 0
    tables = _times(lessons, column, going)
    tables |= _odds_of_fraud(lessons, column, going)
    fraud = column["class"][going].astype(np.int64)
    tables["merchant_fraud"] = _merchants(column, going, fraud == 1, sizes)
    tables["amount_group"] = _amounts(column, going, fraud, sizes)
    for number, classes in enumerate(sizes.fields):
        counts = np.bincount(lessons.fields[going, number], minlength=classes) + 0.5
        tables[f"field_{number}.bias"] = np.log(counts / counts.sum())
    return tables


def start_from(network: GeneratorNetwork, tables: dict[str, Floats]) -> None:
    """Copy the tables into a network's parameters."""
    with torch.no_grad():
        for name, table in tables.items():
            network.get_parameter(name).copy_(torch.from_numpy(table.astype(np.float32)))


def _times(
    lessons: Lessons, column: dict[str, NDArray[np.int16]], going: NDArray[np.bool_]
) -> dict[str, Floats]:
    """Count the classes of the time and the half hours after each state of fraud."""
    found = {}
    since_last = since_state_of(column["state"].astype(np.int64))
    for name, base, target, asked in (
        ("time_state", lessons.time_base, "time", going),
        ("slot_state", lessons.slot_base, "slot", going & (column["slot"] >= 0)),
    ):
        rows = np.flatnonzero(asked & (since_last < SINCE_STATES - 1))
        state, chosen = column["state"][rows].astype(np.int64), column[target][rows]
        width = base.shape[1]
        counts = np.bincount(state * width + chosen, minlength=FRAUD_STATES * width)
        counted = counts.reshape(FRAUD_STATES, width).astype(np.float64)
        expected = np.zeros((FRAUD_STATES, width))
        for begin in range(0, len(rows), _BLOCK_ROWS):
            part = slice(begin, begin + _BLOCK_ROWS)
            share = np.exp(base[rows[part]].astype(float))
            np.add.at(expected, state[part], share / share.sum(1, keepdims=True))
        since = since_state_of(np.arange(FRAUD_STATES))
        whole, whole_expected = (np.zeros((SINCE_STATES, width)) for _ in range(2))
        np.add.at(whole, since, counted)
        np.add.at(whole_expected, since, expected)
        ratio = _ratio(whole, whole_expected, np.ones_like(whole))[since]
        found[name] = np.log(_ratio(counted, expected, ratio))
        found[name][since == SINCE_STATES - 1] = 0
    return found


def _ratio(counted: Floats, expected: Floats, coarse: Floats) -> Floats:
    """Return counted to expected [n, C], drawn towards coarser ratios."""
    total = expected.sum(1, keepdims=True)
    share = np.where(total > 0, expected / np.maximum(total, 1e-9), 1 / expected.shape[1])
    prior = PRIOR_STEPS * share + 0.02
    return np.asarray((counted + prior * coarse) / (expected + prior))


def _odds_of_fraud(
    lessons: Lessons, column: dict[str, NDArray[np.int16]], going: NDArray[np.bool_]
) -> dict[str, Floats]:
    """Fit the log odds of a fraud by state, half hour and, in calm, the rate of payments.

    Newton steps for one table after the other. Each state is drawn towards all of the same time
    since the last fraud, and each half hour towards its neighbours.
    """
    rows = np.flatnonzero(going & (column["fraud"] != NO_TARGET))
    state, slot = column["state_now"][rows].astype(np.int64), column["slot_now"][rows]
    since = since_state_of(state)
    rate = lessons.time_inputs[rows, -1].astype(float)
    fraud = column["fraud"][rows].astype(float)
    base = lessons.fraud_base[rows].astype(float)
    by_since, by_state = np.full(SINCE_STATES, -4.0), np.zeros(FRAUD_STATES)
    by_slot, by_rate = np.zeros(grids.SLOTS), np.zeros(1)
    if len(rows):
        for _ in range(ROUNDS):
            around = (np.roll(by_slot, 1) + np.roll(by_slot, -1)) / 2
            for table, place, value, prior, middle in (
                (by_since, since, None, 0.05, -4.0),
                (by_state, state, None, 0.5, 0.0),
                (by_slot, slot, None, 1.0, 0.98 * around),
                (by_rate, np.zeros(len(rows), np.int64), rate, 2.0, 0.0),
            ):
                odds = base + by_since[since] + by_state[state] + by_slot[slot] + by_rate * rate
                likely = 1 / (1 + np.exp(-np.clip(odds, -30, 30)))
                given = np.ones(len(rows)) if value is None else value
                slope = np.bincount(place, (fraud - likely) * given, len(table)) - prior * (
                    table - middle
                )
                curve = np.bincount(place, likely * (1 - likely) * given**2, len(table)) + prior
                table += np.clip(slope / curve, -1, 1)
    whole = by_since[since_state_of(np.arange(FRAUD_STATES))] + by_state
    return {
        "fraud_state": np.clip(whole, -LOG_ODDS_MOST, LOG_ODDS_MOST),
        "fraud_slot": by_slot,
        "fraud_rate": by_rate,
        "fraud.bias": np.zeros(1),
    }


def _merchants(
    column: dict[str, NDArray[np.int16]],
    going: NDArray[np.bool_],
    fraud: NDArray[np.bool_],
    sizes: GeneratorSizes,
) -> Floats:
    """Count how a fraud on the account changes the classes of merchants."""
    kind = column["merchant"][going].astype(np.int64)
    kind = np.where(column["hub"][going] >= 0, column["hub"][going], kind)
    # One class of all ranks: whose merchants they are, frauds are too few to tell.
    kind = np.where(kind < grids.RANK_CLASSES, 0, kind)
    counted, usual = (
        np.bincount(kind[rows], minlength=sizes.merchants)[None].astype(float)
        for rows in (fraud, ~fraud)
    )
    expected = usual * counted.sum() / max(usual.sum(), 1)
    ratio: Floats = np.log(_ratio(counted, expected, np.ones_like(counted)))[0]
    ratio[: grids.RANK_CLASSES] = ratio[0]
    return np.asarray(ratio)


def _amounts(
    column: dict[str, NDArray[np.int16]],
    going: NDArray[np.bool_],
    fraud: Int64,
    sizes: GeneratorSizes,
) -> Floats:
    """Count the amounts by whose fraud it is and the group of the merchant, as log shares."""
    group = column["group"][going].astype(np.int64)
    amount = column["amount"][going].astype(np.int64)
    cell = np.minimum(fraud, FRAUD_CLASSES - 1) * sizes.groups + group
    cells = FRAUD_CLASSES * sizes.groups
    counted = np.bincount(cell * sizes.amounts + amount, minlength=cells * sizes.amounts)
    counted = counted.reshape(FRAUD_CLASSES, sizes.groups, sizes.amounts).astype(float)
    share = counted.sum((0, 1)) + 0.5
    share /= share.sum()
    by_fraud = counted.sum(1) + PRIOR_STEPS * share
    by_fraud /= by_fraud.sum(1, keepdims=True)
    whole = counted + PRIOR_STEPS * by_fraud[:, None]
    whole /= whole.sum(2, keepdims=True)
    return np.asarray(np.log(whole).reshape(cells, sizes.amounts))
