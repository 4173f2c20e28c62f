"""The memory of a history besides the hidden state: times, recent merchants, frauds, counts.

Training replays real histories through the same memory, so the network meets the same inputs in
training and in unrolling by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.generator import grids
from model.generator.episodes import EPISODE_DAYS
from model.generator.profiles import AT, PROFILE
from model.generator.world import ACCOUNT_FRAUD, MERCHANT_FRAUD, SharedWorld
from model.units import DAY_MS, HOUR_MS

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.intp]

FIELD_BINS = 33
"""Most classes of an extra field; the last one is every other value."""

HUB_SHARE_MAX = 0.9999
"""Largest share of payments at hubs that the choice at random takes an account to have."""

_LEFT_NONE = -1
_OWN_INPUTS = 12 + 4 + grids.HUB + 4 + 4
TIME_INPUTS = 12 + 1 + 4 + 1

SINCE_EDGES_MS = np.array([1, 4, 12, 30, 72, 336], np.int64) * HOUR_MS
"""Edges of the time since the last fraud, by which the states of fraud are divided."""
FRAUDS_EDGES = np.array([2, 3, 5, 8, 11, 16], np.int64)
"""Edges of the number of frauds in the present episode, for generators without planned episodes."""
LEFT_EDGES = np.array([1, 2, 3, 5, 8, 12], np.int64)
"""Edges of the number of frauds that are left in the present episode."""
SINCE_STATES = len(SINCE_EDGES_MS) + 1
FRAUD_STATES = 1 + SINCE_STATES * (len(FRAUDS_EDGES) + 1)
"""States of fraud of an account; 0 is that there was none."""


def input_size(fields: int, groups: int) -> int:
    """Return the number of inputs of a step.

    Args:
        fields: number of fields that steps carry.
        groups: number of groups of merchants.
    """
    return len(PROFILE) + _OWN_INPUTS + 2 * groups + fields


def since_state_of(state: Int64) -> Int64:
    """Return which time since the last fraud states have; the largest if there was none."""
    return np.where(state > 0, (state - 1) % SINCE_STATES, SINCE_STATES - 1)


@dataclass(frozen=True)
class Step:
    """One transaction of each of n accounts.

    Attributes:
        time_ms: [n].
        merchant: [n] code.
        merchant_class: [n] see :mod:`model.generator.grids`.
        group: [n] group of the merchant.
        is_hub: [n] whether the merchant is a hub.
        rank: [n] place in the list of recent merchants; -1 if it is new.
        fraud_class: [n].
        ratio: [n] amount relative to the account's level.
        fields: [n, F] classes of the extra fields, each scaled to 0 to 1.
        left: [n] frauds that follow in the episode; of a fraud on the account only.
    """

    time_ms: Int64
    merchant: NDArray[np.int32]
    merchant_class: Int64
    group: Int64
    is_hub: Bools
    rank: Int64
    fraud_class: Int64
    ratio: Floats
    fields: Float32 | Floats
    left: Int64


class Memory:
    """The memory of n accounts.

    Args:
        world: the shared facts.
        profiles: [n, P].
        start_ms: [n] when each history begins.
        fields: number of extra fields of a step.
    """

    def __init__(self, world: SharedWorld, profiles: Floats, start_ms: Int64, fields: int) -> None:
        n = len(profiles)
        self.world = world
        self.profile = world.network_profile(profiles)
        beside = world.episode_rhythm
        pace = float(beside.mean()) if len(beside) else 0.0
        week = np.tile(beside / max(pace, 1e-9) / grids.SLOTS, 7)
        self._thief_pace = pace  # payments a day
        self._thief_rhythm = np.concatenate(([0.0], np.cumsum(week)))  # integral, as the world's
        self.level = np.exp(profiles[:, AT["level"]])
        self.rate = np.exp(profiles[:, AT["rate"]])
        self.reach = np.maximum(np.round(np.exp(profiles[:, AT["reach"]])), 1)
        self.defrauded = profiles[:, AT["defrauded"]] > 0.5
        self.last_ms = start_ms.astype(np.int64)
        self.count = np.zeros(n, np.int64)
        self.visited = np.zeros(n, np.int64)
        self.opened = np.zeros(n, np.int64)
        hubs = np.clip(profiles[:, AT["hubs"]], 0, HUB_SHARE_MAX) if world.hubs else np.zeros(n)
        self._hub_weight = hubs / (1 - hubs) * self.reach
        self._hubs_opened = np.zeros(n, np.int64)
        self._group = np.zeros(n, np.int64)
        self._group_counts = np.zeros((n, world.groups), np.float32)
        self.recent = np.full((n, grids.RANKS), _LEFT_NONE, np.int32)
        self._today = np.zeros(n, np.int64)
        self._gap_ms = np.zeros(n, np.int64)
        self._class = np.zeros(n, np.int64)
        self._fraud = np.zeros(n, np.int64)
        self._ratio = np.ones(n)
        self._fields = np.zeros((n, fields), np.float32)
        self._frauds = np.zeros(n, np.int64)  # of the present episode
        self._left = np.zeros(n, np.int64)  # of its frauds
        self._episode_ms = np.zeros(n, np.int64)
        self._fraud_ms = np.zeros(n, np.int64)

    def inputs(self, rows: Rows) -> Float32:
        """Return the inputs [m, I] of the recurrent layer: the last transaction and the profile."""
        last, count = self.last_ms[rows], self.count[rows]
        begun = (count > 0).astype(np.float32)
        m = len(rows)
        out = np.zeros((m, input_size(self._fields.shape[1], self.world.groups)), np.float32)
        at = len(PROFILE)
        out[:, :at] = self.profile[rows]
        _write_time(out[:, at : at + 12], last, self._gap_ms[rows], begun)
        at += 12
        ratio = self._ratio[rows]
        out[:, at] = np.clip(ratio - 1, -1, 8) * begun
        out[:, at + 1] = np.clip(np.log(ratio + 0.01), -5, 5) * begun
        out[:, at + 2] = (self._fraud[rows] == ACCOUNT_FRAUD) * 1.0
        out[:, at + 3] = (self._fraud[rows] == MERCHANT_FRAUD) * 1.0
        at += 4
        groups = self.world.groups
        out[np.arange(m), at + self._class[rows]] = begun
        at += grids.HUB + groups
        out[np.arange(m), at + self._group[rows]] = begun
        at += groups
        out[:, at] = np.log1p(count) / 5
        out[:, at + 1] = np.log1p(self.visited[rows]) / 5
        out[:, at + 2] = np.minimum(self.opened[rows] / self.reach[rows], 2)
        out[:, at + 3] = np.log1p(self._today[rows])
        at += 4
        self._write_frauds(out[:, at : at + 4], rows, last)
        out[:, at + 4 :] = self._fields[rows]
        return out

    def time_inputs(self, rows: Rows, time_ms: Int64) -> Float32:
        """Return the inputs [m, TIME_INPUTS] of the heads that know the next time [m]."""
        out = np.zeros((len(rows), TIME_INPUTS), np.float32)
        gap_ms = time_ms - self.last_ms[rows]
        _write_time(out[:, :12], time_ms, gap_ms, np.ones(len(rows), np.float32))
        today = time_ms // DAY_MS == self.last_ms[rows] // DAY_MS
        out[:, 12] = today
        self._write_frauds(out[:, 13:17], rows, time_ms)
        calm = since_state_of(self.fraud_state(rows, time_ms)) == SINCE_STATES - 1
        out[:, 17] = self.profile[rows, AT["rate"]] * calm
        return out

    def fraud_state(self, rows: Rows, now_ms: Int64) -> Int64:
        """Return the states of fraud [m] at times [m]: since when, and how many are left.

        After an episode's last fraud an account is as calm as long after it.
        """
        frauds = self._frauds[rows]
        since = np.searchsorted(SINCE_EDGES_MS, now_ms - self._fraud_ms[rows], side="right")
        if self.world.plans_episodes:
            left = self.frauds_left(rows, now_ms)
            since = np.where(left > 0, since, SINCE_STATES - 1)
            count = np.searchsorted(LEFT_EDGES, left, side="right")
        else:
            count = np.searchsorted(FRAUDS_EDGES, frauds, side="right")
        return np.where(frauds > 0, 1 + count * SINCE_STATES + since, 0)

    def frauds_left(self, rows: Rows, now_ms: Int64) -> Int64:
        """Return the frauds [m] that are left in the accounts' episodes at times [m]."""
        goes_on = now_ms - self._fraud_ms[rows] < EPISODE_DAYS * DAY_MS
        return np.where(goes_on, self._left[rows], 0)

    def _write_frauds(self, out: Float32, rows: Rows, now_ms: Int64) -> None:
        frauds = self._frauds[rows]
        had = frauds > 0
        out[:, 0] = had
        out[:, 1] = np.log1p(np.maximum(now_ms - self._fraud_ms[rows], 0) / DAY_MS) * had / 2
        days = np.maximum(now_ms - self._episode_ms[rows], 0) / DAY_MS
        out[:, 2] = np.minimum(days, 40) / 10 * had
        if self.world.plans_episodes:
            out[:, 3] = np.log1p(self.frauds_left(rows, now_ms))
        else:
            out[:, 3] = np.log1p(frauds)

    def time_baseline(self, rows: Rows) -> tuple[Int64, Float32]:
        """Return edges [m, T + 1] and logits [m, T] of the classes of the next time."""
        last_ms = self.last_ms[rows]
        edges = grids.time_edges(last_ms)
        beside: Floats | float = 0.0
        thief = self._thief_at_work(rows)
        if thief.any():
            beside = np.zeros(edges.shape)
            passed = grids.expected_visits(self._thief_rhythm, edges[thief])
            beside[thief] = self._thief_pace * (passed - passed[:, :1])
        return edges, grids.time_baseline(self.world.rhythm, self.rate[rows], edges, beside)

    def slot_baseline(self, rows: Rows, begin_ms: Int64, end_ms: Int64) -> Float32:
        """Return the logits [m, SLOTS] of the half hours with begin and end [m, SLOTS]."""
        beside: Floats | float = 0.0
        thief = self._thief_at_work(rows)
        if thief.any():
            beside = thief[:, None] * self.world.episode_rhythm / grids.SLOTS
        return grids.slot_baseline(self.world.rhythm, self.rate[rows], begin_ms, end_ms, beside)

    def fraud_baseline(self, rows: Rows, time_ms: Int64) -> Floats:
        """Return the log odds [m] of a fraud at times [m], by the rhythms of thief and owner.

        In calm, only how they differ by the half hour counts.
        """
        pace = self._thief_pace
        if not pace:
            return np.zeros(len(rows))
        slot = time_ms // grids.SLOT_MS % grids.SLOTS
        at = grids.weekday_of(time_ms) * grids.SLOTS + slot
        own = np.diff(self.world.rhythm)[at] * grids.SLOTS
        thief = self.world.episode_rhythm[slot]
        works = self._thief_at_work(rows)
        return np.asarray(np.log(thief / own) - np.log(np.where(works, self.rate[rows], pace)))

    def _thief_at_work(self, rows: Rows) -> Bools:
        """Return in which accounts [m] a thief pays beside the owner."""
        if not self._thief_pace:
            return np.zeros(len(rows), np.bool_)
        return np.asarray(self.frauds_left(rows, self.last_ms[rows]) > 0)

    def merchant_baseline(self, rows: Rows) -> Float32:
        """Return the logits [m, M] of the merchant's class.

        An account's groups are a Pólya urn: what it chose before becomes more likely. So accounts
        come to differ as much as the urn's concentration says.
        """
        opened = self.opened[rows]
        world, counts = self.world, self._group_counts[rows]
        local = opened / np.maximum(opened + self._hubs_opened[rows], 1)
        left = np.asarray(self.reach[rows] - self.visited[rows] * local, np.float64)
        urn = counts + world["group_concentration"] * world.group_shares
        urn *= (self._hub_weight[rows] / urn.sum(1))[:, None]
        return grids.merchant_baseline(self.visited[rows], local, left, urn)

    def rank_of(self, rows: Rows, merchant: NDArray[np.int32]) -> Int64:
        """Return the places [m] of merchants [m] in the lists of recent ones; -1 if new."""
        width = int(self.visited[rows].max(initial=0))
        if not width:
            return np.full(len(rows), -1, np.int64)
        same = self.recent[rows, :width] == merchant[:, None]
        place = same.argmax(1)
        return np.where(same[np.arange(len(rows)), place], place, -1)

    def observe(self, rows: Rows, step: Step) -> None:
        """Remember the next transaction of some accounts."""
        last = self.last_ms[rows]
        same_day = step.time_ms // DAY_MS == last // DAY_MS
        self._today[rows] = np.where(same_day, self._today[rows], 0) + 1
        self._gap_ms[rows] = step.time_ms - last
        self.last_ms[rows] = step.time_ms
        self.count[rows] += 1
        self._class[rows] = step.merchant_class
        self._fraud[rows] = step.fraud_class
        self._ratio[rows] = step.ratio
        self._fields[rows] = step.fields
        self._group[rows] = step.group
        self.opened[rows] += step.merchant_class == grids.NEW_LOCAL
        self._hubs_opened[rows] += step.merchant_class >= grids.HUB
        own = np.flatnonzero(step.is_hub & (step.fraud_class != ACCOUNT_FRAUD))
        self._group_counts[rows[own], step.group[own]] += 1
        self._move_to_front(rows, step.rank, step.merchant)
        hit = np.flatnonzero(step.fraud_class == ACCOUNT_FRAUD)
        if len(hit):
            self._remember_fraud(rows[hit], step.time_ms[hit])
            self._left[rows[hit]] = step.left[hit]

    def _move_to_front(self, rows: Rows, rank: Int64, merchant: NDArray[np.int32]) -> None:
        visited = self.visited[rows]
        new = rank < 0
        stop = np.where(new, np.minimum(visited, grids.RANKS - 1), rank)
        self.visited[rows] = np.minimum(visited + new, grids.RANKS)
        width = int(stop.max(initial=0)) + 1
        lists = self.recent[rows, :width]
        moved = np.empty_like(lists)
        moved[:, 0] = merchant
        moved[:, 1:] = np.where(np.arange(1, width) <= stop[:, None], lists[:, :-1], lists[:, 1:])
        self.recent[rows, :width] = moved

    def _remember_fraud(self, rows: Rows, time_ms: Int64) -> None:
        again = (self._frauds[rows] > 0) & (time_ms - self._fraud_ms[rows] < EPISODE_DAYS * DAY_MS)
        self._episode_ms[rows] = np.where(again, self._episode_ms[rows], time_ms)
        self._frauds[rows] = np.where(again, self._frauds[rows], 0) + 1
        self._fraud_ms[rows] = time_ms


def _write_time(out: Float32, time_ms: Int64, gap_ms: Int64, there: Float32) -> None:
    angle = (time_ms % DAY_MS) * (2 * np.pi / DAY_MS)
    out[:, 0] = np.log1p(np.maximum(gap_ms, 0) / 60_000) / 5 * there
    out[:, 1], out[:, 2] = np.cos(angle), np.sin(angle)
    out[:, 3], out[:, 4] = np.cos(2 * angle), np.sin(2 * angle)
    out[np.arange(len(out)), 5 + grids.weekday_of(time_ms)] = 1
