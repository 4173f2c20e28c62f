"""Lessons: real histories replayed through the memory, as inputs and targets of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.generator import grids
from model.generator.memory import TIME_INPUTS, Memory, Step, input_size
from model.generator.profiles import AT
from model.generator.world import ACCOUNT_FRAUD, MERCHANT_FRAUD, MeasuredLog
from model.units import DAY_MS

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

COLUMNS = (
    *("time", "slot", "day_kind", "weekday", "fraud", "merchant", "class", "amount"),
    *("hub", "group", "state", "state_now", "slot_now"),
)
"""Integer columns of a lesson; -1 is no target.

hub               class of a hub that was seen before: chosen as a hub or by its rank; else -1
state, state_now  states of fraud at the last transaction's time and at this one's
slot_now          half hour of the transaction, also if the gap is short
"""

AT_COLUMN = {name: place for place, name in enumerate(COLUMNS)}

NO_TARGET = -1
CENSORED = -2
"""Target of the time after the last transaction: ``slot`` is the first class that is possible."""

SAME_DAY, OTHER_DAY = 0, 1


@dataclass(frozen=True)
class Lessons:
    """Steps of all accounts, account by account; a step is the way to one transaction.

    Attributes:
        start, length: [accounts] place and number of each account's steps. The last step of an
            account leads to no transaction: only that its time is after the end is known.
        inputs: [S, I] of the recurrent layer.
        time_inputs: [S, TIME_INPUTS].
        time_base: [S, T] logits.
        merchant_base: [S, M] logits.
        slot_base: [S, SLOTS] logits.
        fraud_base: [S] log odds.
        targets: [S, columns] see :data:`COLUMNS`.
        hub_edge: [S] log likelihood of a hub within its class of ranks, less that within its group.
        fields: [S, F] classes of the transactions' own fields.
    """

    start: Int64
    length: Int64
    inputs: Float32
    time_inputs: Float32
    time_base: Float32
    merchant_base: Float32
    slot_base: Float32
    fraud_base: Float32
    targets: NDArray[np.int16]
    hub_edge: Float32
    fields: NDArray[np.int8]


def make_lessons(
    log: Dataset,
    measured: MeasuredLog,
    field_classes: NDArray[np.int8],
    field_sizes: list[int],
    show: Callable[[float], None] = lambda _: None,
) -> Lessons:
    """Replay all histories of a data set, all accounts at once and step by step.

    Args:
        log: the transactions.
        measured: what was measured on them.
        field_classes: [N, F] classes of the fields of transactions.
        field_sizes: number of classes of each.
        show: called with the share done.
    """
    world = measured.world
    row = np.lexsort((log.timestamp_ms, log.account))
    count = np.bincount(log.account, minlength=len(measured.profiles))
    begin = np.cumsum(count) - count
    length = count + 1
    start = np.cumsum(length) - length
    steps = int(length.sum())
    memory = Memory(world, measured.profiles, measured.start_ms, len(field_sizes))
    scale = np.maximum(np.array(field_sizes, np.float32) - 1, 1)
    lessons = Lessons(
        start=start,
        length=length,
        inputs=np.zeros((steps, input_size(len(field_sizes), world.groups)), np.float32),
        time_inputs=np.zeros((steps, TIME_INPUTS), np.float32),
        time_base=np.zeros((steps, grids.TIME_CLASSES), np.float32),
        merchant_base=np.zeros((steps, grids.HUB + world.groups), np.float32),
        slot_base=np.zeros((steps, grids.SLOTS), np.float32),
        fraud_base=np.zeros(steps, np.float32),
        targets=np.full((steps, len(COLUMNS)), NO_TARGET, np.int16),
        hub_edge=np.zeros(steps, np.float32),
        fields=np.full((steps, len(field_sizes)), NO_TARGET, np.int8),
    )
    end_ms = int(log.timestamp_ms[-1])
    longest_first = np.argsort(-count, kind="stable")
    falling = count[longest_first]
    for step in range(int(length.max())):
        active = longest_first[: int((falling >= step).sum())]  # with the step after the last
        at = start[active] + step
        edges, base = memory.time_baseline(active)
        lessons.inputs[at] = memory.inputs(active)
        lessons.time_base[at] = base
        lessons.targets[at, AT_COLUMN["state"]] = memory.fraud_state(active, memory.last_ms[active])
        going = count[active] > step
        over = np.flatnonzero(~going)
        first = (edges[over, 1:] <= end_ms).sum(1)  # classes wholly within the data
        lessons.targets[at[over], 0] = CENSORED
        lessons.targets[at[over], 1] = np.minimum(first, grids.TIME_CLASSES - 1)
        accounts, at = active[going], at[going]
        if not len(accounts):
            continue
        rows = row[begin[accounts] + step]
        ratio = log.amount[rows] / memory.level[accounts]
        taken = _targets(lessons, memory, measured, accounts, at, edges[going], log, rows, ratio)
        lessons.fields[at] = field_classes[rows]
        memory.observe(
            accounts,
            Step(
                log.timestamp_ms[rows],
                log.merchant[rows],
                taken[0],
                measured.group[log.merchant[rows]],
                measured.is_hub[log.merchant[rows]],
                taken[1],
                measured.fraud_class[rows].astype(np.int64),
                ratio,
                field_classes[rows] / scale,
                measured.frauds_left[rows],
            ),
        )
        if step % 16 == 0:
            show(at.size and 1 - float((falling > step).sum()) / len(falling))
    return lessons


def _targets(
    lessons: Lessons,
    memory: Memory,
    measured: MeasuredLog,
    accounts: Int64,
    at: Int64,
    edges: Int64,
    log: Dataset,
    rows: Int64,
    ratio: NDArray[np.float64],
) -> tuple[Int64, Int64]:
    """Write the targets of a step; return merchants' classes and ranks."""
    world = measured.world
    time_ms, merchant = log.timestamp_ms[rows], log.merchant[rows]
    time_class = np.clip((edges[:, 1:-1] <= time_ms[:, None]).sum(1), 0, grids.TIME_CLASSES - 1)
    day_ms = time_ms - time_ms % DAY_MS
    begin, end = grids.slot_bounds(memory.last_ms[accounts] + grids.SHORT_EDGES_MS[-1], day_ms)
    slot = time_ms % DAY_MS // grids.SLOT_MS
    slot_base = memory.slot_baseline(accounts, begin, end)
    long = time_class >= grids.TODAY
    fraud_class = measured.fraud_class[rows].astype(np.int64)
    rank = memory.rank_of(accounts, merchant)
    is_hub, group = measured.is_hub[merchant], measured.group[merchant]
    new = np.where(is_hub, grids.HUB + group, grids.NEW_LOCAL)
    merchant_class = np.where(rank < 0, new, grids.rank_class_of(rank))
    either = is_hub & (rank >= 0)
    low = grids.RANK_EDGES[np.minimum(merchant_class, grids.RANK_CLASSES - 1)]
    high = grids.RANK_EDGES[np.minimum(merchant_class, grids.RANK_CLASSES - 1) + 1]
    width = np.maximum(np.minimum(high, memory.visited[accounts]) - low, 1)
    share = np.maximum(measured.hub_share[merchant], 1e-9)
    lessons.hub_edge[at] = np.where(either, -np.log(width) - np.log(share), 0)
    amount = np.searchsorted(world.ratio_edges, ratio, side="right") - 1
    amount = np.clip(amount, 0, len(world.ratio_edges) - 2)
    fraud = (fraud_class == ACCOUNT_FRAUD).astype(np.int64)
    may = measured.profiles[accounts, AT["defrauded"]] > 0.5
    columns = (
        time_class,
        np.where(long, slot, NO_TARGET),
        np.where(time_class == grids.TODAY, SAME_DAY, OTHER_DAY),
        grids.weekday_of(time_ms),
        np.where(may & (fraud_class != MERCHANT_FRAUD), fraud, NO_TARGET),
        merchant_class,
        fraud_class,
        amount,
        np.where(either, new, NO_TARGET),
        group,
        lessons.targets[at, AT_COLUMN["state"]],
        memory.fraud_state(accounts, time_ms),
        slot,
    )
    lessons.targets[at] = np.stack(columns, 1)
    lessons.slot_base[at] = slot_base
    lessons.fraud_base[at] = memory.fraud_baseline(accounts, time_ms)
    lessons.time_inputs[at] = memory.time_inputs(accounts, time_ms)
    lessons.merchant_base[at] = memory.merchant_baseline(accounts)
    return merchant_class, rank
