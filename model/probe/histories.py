"""Histories for a probe: a catalogue, and accounts of a log.

Amounts of the catalogue are euros, scaled to the checkpoint's currency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.data.dataset import FRAUD, LEGITIMATE, Dataset
from model.features.account import Float32, Float64, Int64
from model.features.merchant import Labels, observe_merchant_log
from model.features.spec import FeatureSpec, field_column
from model.probe.scorer import USUAL_MERCHANT, ProbeScorer, ProbeStates
from model.simulator.handbook import Simulator
from model.units import DAY_MS, HOUR_MS, SECOND_MS

NOW_MS = 1_715_774_400_000
"""Time of the catalogue's next payments: Wednesday, 2024-05-15 12:00 UTC."""


LOG_ROWS_MAX = 2_000_000
"""Most transactions of a log that are used, the last ones."""

PAYMENTS_MAX = 2_000
"""Most payments of a history that are used, the last ones."""

LONGEST = 1_500
"""Payments of the oldest account of the catalogue."""

CARD_CHECKS = (0.0, 0.01, 1.0)
"""Amounts of card checks, by shops and by thieves."""

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class History:
    """History of an account: k payments.

    Attributes:
        name: name in tables.
        group: name of a group of similar histories.
        amount: [k] in the checkpoint's currency.
        timestamp_ms: [k] ascending.
        pause_ms: time from the last payment to the probed one.
        merchant: [k, M] raw features of the merchants. None: a usual merchant.
        fields: [k, F] raw columns of extra fields. None: they are missing.
        flagged: whether it has a known fraud.
    """

    name: str
    group: str
    amount: Float64
    timestamp_ms: Int64
    pause_ms: int
    merchant: Float32 | None = None
    fields: Float32 | None = None
    flagged: bool = False

    def __len__(self) -> int:
        return len(self.amount)

    @property
    def next_ms(self) -> int:
        """Time of the next payment, epoch milliseconds."""
        return NOW_MS if not len(self) else int(self.timestamp_ms[-1]) + self.pause_ms

    @property
    def spent_per_day(self) -> float:
        """Mean amount spent a day over the length of the history, at least a week."""
        if not len(self):
            return 0.0
        days = (self.next_ms - int(self.timestamp_ms[0])) / DAY_MS
        return float(self.amount.sum() / max(days, 7.0))


def paying(name: str, group: str, amounts: ArrayLike, every_ms: int, pause_ms: int) -> History:
    """Make a history of regular payments; the next one is at :data:`NOW_MS`."""
    amount: Float64 = np.asarray(amounts, np.float64)
    times = NOW_MS - pause_ms - every_ms * np.arange(len(amount) - 1, -1, -1, dtype=np.int64)
    return History(name, group, amount, times, pause_ms)


def catalogue(scale: float, longest: int = LONGEST) -> list[History]:
    """Return the histories with which every checkpoint is probed.

    Args:
        scale: factor of amounts in euros.
        longest: number of payments of the oldest account.
    """
    histories = [
        *_steady(),
        *_ranges(),
        *_card_checks(),
        *_few_small(),
        *_unusual(longest),
    ]
    return [
        History(h.name, h.group, h.amount * scale, h.timestamp_ms, h.pause_ms) for h in histories
    ]


def _steady() -> list[History]:
    return [
        paying(f"15 payments of {level}", "steady", [level] * 15, DAY_MS, DAY_MS)
        for level in (1, 5, 10, 20)
    ]


_LEVELS = {"25 to 55": (25.0, 55.0), "1.50 to 6.00": (1.5, 6.0), "8 to 16": (8.0, 16.0)}


def _drawn(name: str, count: int, seed: int) -> Float64:
    low, high = _LEVELS[name]
    return np.round(np.random.default_rng(seed).uniform(low, high, count), 2)


def _ranges() -> list[History]:
    return [
        paying(f"20 payments of {name}", f"pays {name}", _drawn(name, 20, 1), DAY_MS, DAY_MS)
        for name in _LEVELS
    ]


def _card_checks() -> list[History]:
    """Return histories with a card check as the first payment or a later one."""
    found = []
    for name in _LEVELS:
        for check in CARD_CHECKS:
            for place in (2, 4, 8):
                amounts = np.concatenate(([check], _drawn(name, place - 2, place)))
                found.append(
                    paying(
                        f"{check:.2f} first, pays {name}, payment {place}",
                        f"check first, {name}",
                        amounts,
                        DAY_MS,
                        DAY_MS,
                    )
                )
            for place in (3, 8):
                amounts = np.concatenate((_drawn(name, place - 1, place), [check]))
                found.append(
                    paying(
                        f"pays {name}, {check:.2f} as payment {place}",
                        f"check later, {name}",
                        amounts,
                        DAY_MS,
                        HOUR_MS,
                    )
                )
    return found


def _few_small() -> list[History]:
    return [
        paying(f"{count} x {level:g}", f"1 to 20 small, {level:g}", [level] * count, DAY_MS, DAY_MS)
        for level in (1.0, 3.0, 6.0)
        for count in (1, 2, 3, 4, 5, 8, 12, 16, 20)
    ]


def _unusual(longest: int) -> list[History]:
    rng = np.random.default_rng(7)
    business = np.round(np.clip(rng.lognormal(np.log(8000), 0.8, 60), 500, 60_000), 2)
    coffee = np.where(rng.random(60) < 0.7, rng.uniform(2.5, 6, 60), rng.uniform(20, 90, 60))
    seconds = rng.uniform(1, 4, min(400, longest))
    old = np.round(np.clip(rng.normal(35, 15, longest), 1, None), 2)
    usual = np.round(rng.uniform(20, 60, 30), 2)
    year = np.round(rng.uniform(20, 60, 53), 2)
    return [
        History("no payment yet", "new account", np.zeros(0), np.zeros(0, np.int64), DAY_MS),
        paying("business card", "business card", business, DAY_MS // 2, DAY_MS // 2),
        paying("coffee and groceries", "mixed", np.round(coffee, 2), DAY_MS // 2, DAY_MS // 2),
        paying("every 7 seconds", "fast", np.round(seconds, 2), 7 * SECOND_MS, 7 * SECOND_MS),
        paying("silent for three weeks", "silent", usual, DAY_MS, 21 * DAY_MS),
        paying("silent for ten weeks", "silent", usual, DAY_MS, 70 * DAY_MS),
        paying("old account", "old", old, DAY_MS, DAY_MS),
        paying("a year, once a week", "old", year, 7 * DAY_MS, 7 * DAY_MS),
    ]


def replay(scorer: ProbeScorer, histories: Sequence[History]) -> tuple[ProbeStates, list[Float32]]:
    """Apply histories; return the states after them and the scores of their payments."""
    usual = scorer.merchants([USUAL_MERCHANT], NOW_MS)
    order = np.array(sorted(range(len(histories)), key=lambda i: -len(histories[i])), np.intp)
    lengths = np.array([len(histories[i]) for i in order], np.int64)
    longest = int(lengths.max(initial=0))
    amount = np.zeros((len(order), longest))
    times = np.zeros((len(order), longest), np.int64)
    merchant = np.empty((len(order), longest, usual.shape[1]), np.float32)
    merchant[:] = usual
    scores = np.zeros((len(order), longest), np.float32)
    states = scorer.empty(len(order))
    for i in range(len(order)):
        history = histories[order[i]]
        amount[i, : len(history)] = history.amount
        times[i, : len(history)] = history.timestamp_ms
        if history.merchant is not None:
            merchant[i, : len(history)] = history.merchant
    for step in range(longest):
        active = np.arange(int((lengths > step).sum()))
        taken = states.take(active)
        for position in active.tolist():
            fields = histories[order[position]].fields
            if fields is not None:
                taken.fields[position] = fields[step]
        scores[active, step], after = scorer.advance(
            taken, amount[active, step], times[active, step], merchant[active, step]
        )
        states.put(active, after)
    back = np.argsort(order)
    return states.take(back), [scores[i, : len(histories[order[i]])] for i in back]


def simulated_log(customers: int, days: int, scale: float, seed: int = 0) -> Dataset:
    """Simulate some days, with scaled amounts."""
    simulator = Simulator(customers, 2 * customers, "2024-01-01", seed)
    drawn = list(islice(simulator.days(), days))
    is_fraud = np.concatenate([d.is_fraud for d in drawn])
    return Dataset(
        account=np.concatenate([d.account for d in drawn]).astype(np.int32),
        merchant=np.concatenate([d.merchant for d in drawn]).astype(np.int32),
        amount=np.concatenate([d.amount for d in drawn]) * scale,
        timestamp_ms=np.concatenate([d.timestamp_ms for d in drawn]),
        label=np.where(is_fraud, FRAUD, LEGITIMATE).astype(np.int8),
        scenario=np.concatenate([d.scenario for d in drawn]),
    )


def found_histories(
    log: Dataset,
    spec: FeatureSpec,
    count: int,
    payments_min: int = 1,
    flagged: bool = True,
    seed: int = 0,
) -> list[History]:
    """Sample histories of all lengths and levels from the accounts of a log.

    Accounts are sorted by length and level, and picked at regular steps. Only the last
    :data:`LOG_ROWS_MAX` transactions of the log are used.

    Args:
        log: the transactions.
        spec: specification of the features.
        count: most histories.
        payments_min: fewest payments of an account.
        flagged: whether to include accounts with a known fraud.
        seed: decides the order of similar accounts.
    """
    first = max(0, len(log) - LOG_ROWS_MAX)
    rows = np.arange(first, len(log))
    account = np.asarray(log.account[first:]).astype(np.int64)
    amount = np.asarray(log.amount[first:])
    is_fraud = log.is_fraud[first:]
    codes, place, length = np.unique(account, return_inverse=True, return_counts=True)
    level = np.bincount(place, amount) / length
    fraudulent = np.bincount(place, is_fraud) > 0
    eligible = np.flatnonzero((length >= payments_min) & (flagged | ~fraudulent))
    chosen = _spread(length[eligible], level[eligible], count, seed)
    chosen = eligible[chosen]
    times = np.asarray(log.timestamp_ms[first:])
    labels = Labels.delayed(is_fraud, times, spec.label_delay_ms)
    merchant = observe_merchant_log(
        np.asarray(log.merchant[first:]).astype(np.int64), times, labels, spec.label_delay_ms
    )
    by_account = np.argsort(place, kind="stable")
    start = np.cumsum(length) - length
    histories = []
    for number in chosen:
        mine = by_account[start[number] : start[number] + length[number]][-PAYMENTS_MAX:]
        pauses = np.diff(times[mine])
        pause_ms = int(np.clip(np.median(pauses) if len(pauses) else DAY_MS, HOUR_MS, 7 * DAY_MS))
        histories.append(
            History(
                f"account {int(codes[number])} of the data ({len(mine):,} payments of about "
                f"{level[number]:,.2f})",
                "found",
                amount[mine],
                times[mine],
                pause_ms,
                merchant[mine],
                _fields(log, spec, rows[mine]),
                bool(fraudulent[number]),
            )
        )
    return histories


def _spread(length: Int64, level: Float64, count: int, seed: int) -> Rows:
    """Pick at most ``count`` of n accounts, spread over all lengths and levels."""
    n = len(length)
    if n <= count:
        return np.arange(n)
    # Strips of equal size by length; within each, even steps by level.
    strips = max(1, round(count**0.5))
    shuffled = np.random.default_rng(seed).permutation(n)
    by_length = shuffled[np.argsort(length[shuffled], kind="stable")]
    taken = []
    for number, strip in enumerate(np.array_split(by_length, strips)):
        wanted = count * (number + 1) // strips - count * number // strips
        by_level = strip[np.argsort(level[strip], kind="stable")]
        at = np.linspace(0, len(by_level) - 1, min(wanted, len(by_level))).round().astype(np.intp)
        taken.append(by_level[at])
    return np.sort(np.unique(np.concatenate(taken)))


def _fields(log: Dataset, spec: FeatureSpec, rows: Rows) -> Float32 | None:
    if not spec.fields:
        return None
    columns = []
    for field in spec.fields:
        values: Sequence[float | str | None]
        if field.kind == "numeric" and field.name in log.numeric:
            values = np.asarray(log.numeric[field.name])[rows].tolist()
        elif field.kind == "categorical" and field.name in log.categorical:
            texts = log.texts[field.name]
            codes = np.asarray(log.categorical[field.name])[rows].tolist()
            values = [texts[code] if code >= 0 else None for code in codes]
        else:
            values = [None] * len(rows)
        columns.append(field_column(field)(values))
    return np.stack(columns, 1)
