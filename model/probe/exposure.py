"""The exposure: the most that a thief who knows the model can take without an alert.

The thief chooses the times, amounts and merchants. Bisection finds the largest amount with a score
below the threshold, for all accounts and plans in one batch. A plan consists of times and shares of
that largest amount. Smaller payments first can raise the usual amount without suspicion. All plans
are tried on some accounts, the best plans are varied, and the best of all are run on every account.
The result is a lower bound.

The owner makes no payments meanwhile, and the thief does not change a merchant's profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.features.account import Float64, Int64
from model.probe.histories import NOW_MS, History, found_histories, replay
from model.probe.scorer import (
    LARGE_MERCHANT,
    SMALL_MERCHANT,
    UNKNOWN_MERCHANT,
    ProbeScorer,
    ProbeStates,
    Rows,
)
from model.thresholds import Goal, OperatingPoints, ThresholdsError
from model.units import DAY_MS, HOUR_MS, MINUTE_MS

AMOUNT_LEAST = 0.01
AMOUNT_MOST = 100_000.0
"""Smallest and largest payment of the thief, euros. The largest is a bound."""

PAYMENTS_PER_DAY_MAX = 200
PAYMENTS_PER_WEEK_MAX = 200
"""Most payments of a thief. A plan whose last payment succeeds is at a bound."""

FALSE_POSITIVE_RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""False positive rates of the points of the curve."""

TARGET_RATE = 0.002
TARGET_TIMES_USUAL = 3.0
"""Target: at this false positive rate the medians stay below three times the usual spending."""

_MERCHANTS = (LARGE_MERCHANT, SMALL_MERCHANT, UNKNOWN_MERCHANT)
_BISECTIONS = 8
_SEARCH_EVERY = 3
"""Number of payments, less than an hour apart, between two searches for the largest amount."""
_SAME_RATE = 0.03
"""Relative difference below which two rates are the same point of the curve."""
_COARSE, _FINE = 8, 26

Show = Callable[[float, str], None]


class AccountLoss(msgspec.Struct, frozen=True):
    """Loss of accounts to the thief in a day or a week.

    Attributes:
        days: 1 or 7.
        median, p99: quantiles over accounts, in multiples of the usual spending in that time.
        median_amount, p99_amount: quantiles over accounts, in the currency.
        at_bound: share of accounts whose plan reached a bound, so that more may be possible.
        payments: median number of payments.
        plan: name of the best plan for most accounts.
    """

    days: int
    median: float
    p99: float
    median_amount: float
    p99_amount: float
    at_bound: float
    payments: float
    plan: str


class Point(msgspec.Struct, frozen=True):
    """Exposure at a threshold.

    Attributes:
        threshold: the threshold.
        false_positive_rate: its rate on the checkpoint's validation days.
        day, week: losses in a day and in a week.
    """

    threshold: float
    false_positive_rate: float
    day: AccountLoss
    week: AccountLoss


class Exposure(msgspec.Struct, frozen=True):
    """Exposure of a checkpoint.

    Attributes:
        accounts: number of attacked accounts.
        payments: number of legitimate payments of these accounts.
        flagged: share of these payments at or over the review threshold.
        spent_per_day: median of the usual spending a day.
        plans: number of plans tried.
        review: point at the review threshold.
        curve: points at other false positive rates.
        target: point at :data:`TARGET_RATE`; None if the rate is unknown.
    """

    accounts: int
    payments: int
    flagged: float
    spent_per_day: float
    plans: int
    review: Point | None
    curve: list[Point]
    target: Point | None

    @property
    def target_met(self) -> bool | None:
        """Whether the medians of day and week meet the target; None if unknown."""
        if self.target is None:
            return None
        return max(self.target.day.median, self.target.week.median) <= TARGET_TIMES_USUAL

    def metrics(self) -> dict[str, float]:
        """Return the metrics for a checkpoint's header."""
        if self.review is None:
            return {}
        return {
            f"probe_exposure_{name}_{measure}": getattr(taken, measure)
            for name, taken in (("day", self.review.day), ("week", self.review.week))
            for measure in ("median", "p99")
        }

    def lines(self) -> Iterator[str]:
        """Yield the exposure at the review threshold as lines of text."""
        if self.review is None:
            yield "exposure: not measured, for no account has enough payments"
            return
        for name, taken in (("a day", self.review.day), ("a week", self.review.week)):
            bound = f", at least: {taken.at_bound:.0%} at a bound" if taken.at_bound else ""
            yield (
                f"exposure in {name}: {taken.median:,.3g} times the usual spending in the median, "
                f"{taken.p99:,.3g} in the 99th percentile{bound}"
            )
        if self.target_met is not None:
            assert self.target is not None
            yield (
                f"aim of {TARGET_TIMES_USUAL:g} times at {TARGET_RATE:.1%} false positives: "
                f"{'met' if self.target_met else 'not met'}, "
                f"{max(self.target.day.median, self.target.week.median):,.3g} times"
            )


@dataclass(frozen=True)
class ExposureSettings:
    """Settings of the search for the exposure.

    Attributes:
        accounts: number of attacked accounts.
        tried: number of accounts on which every plan is tried.
        random_plans: number of random plans, besides the given ones.
        varied: number of variants of each of the best plans.
        kept: number of plans that are run on every account.
        kept_curve: number of plans at the other thresholds of the curve.
        rates: false positive rates of the curve.
        payments_max: most payments of a plan.
    """

    accounts: int = 200
    tried: int = 12
    random_plans: int = 12
    varied: int = 3
    kept: int = 4
    kept_curve: int = 2
    rates: tuple[float, ...] = FALSE_POSITIVE_RATES
    payments_max: int = PAYMENTS_PER_WEEK_MAX

    @classmethod
    def short(cls) -> ExposureSettings:
        """Return settings that take some seconds."""
        return cls(
            accounts=60,
            tried=6,
            random_plans=4,
            varied=1,
            kept=2,
            kept_curve=2,
            rates=(TARGET_RATE,),
            payments_max=40,
        )


PAYMENTS_MIN = 5
"""Fewest payments of an account with a usual spending."""


@dataclass(frozen=True)
class Plan:
    """Plan of a thief: times, and shares of the largest amount below the threshold.

    Attributes:
        name: name in tables.
        at_ms: [k] time after the start of the attack, ascending.
        share: [k] over 0, at most 1.
        limited: whether only the bound of payments ends the plan.
    """

    name: str
    at_ms: Int64
    share: Float64
    limited: bool = False

    def __len__(self) -> int:
        return len(self.at_ms)


@dataclass(frozen=True)
class Attack:
    """Result of p plans on n accounts.

    Attributes:
        amount: [n, p] amount taken.
        payments: [n, p] number of payments.
        at_bound: [n, p] whether a bound was reached, so that more may be possible.
    """

    amount: Float64
    payments: Int64
    at_bound: NDArray[np.bool_]


def measure_exposure(
    scorer: ProbeScorer,
    log: Dataset,
    settings: ExposureSettings,
    monotone: bool = True,
    show: Show = lambda done, note: None,
) -> Exposure:
    """Measure the exposure of a checkpoint on a sample of a log's accounts.

    Args:
        scorer: scorer of the checkpoint.
        log: the transactions; accounts with a known fraud are left out.
        settings: the settings of the search.
        monotone: whether the score never falls with the amount; otherwise a finer grid is used.
        show: called with the share done and the current step.
    """
    accounts = found_histories(
        log, scorer.spec, settings.accounts, payments_min=PAYMENTS_MIN, flagged=False
    )
    header = scorer.checkpoint.header
    if not accounts:
        return Exposure(0, 0, 0.0, 0.0, 0, None, [], None)
    states, scores = replay(scorer, accounts)
    legitimate = np.concatenate(scores)
    thief = Thief(scorer, states, accounts, monotone)
    review = header.thresholds.review
    points, now_rate = _thresholds(scorer, settings, legitimate)
    search = _Search(thief, settings)
    total = 1 + len(points)

    def part(number: int) -> Show:
        return lambda done, note: show((number + done) / total, note)

    at_review = search.whole(review, now_rate, part(0))
    curve = [
        msgspec.structs.replace(at_review, false_positive_rate=rate)
        if abs(now_rate - rate) <= _SAME_RATE * rate
        else search.point(threshold, rate, part(1 + number))
        for number, (threshold, rate) in enumerate(points)
    ]
    target = next((p for (_, r), p in zip(points, curve, strict=True) if r == TARGET_RATE), None)
    return Exposure(
        accounts=len(accounts),
        payments=len(legitimate),
        flagged=float((legitimate >= review).mean()),
        spent_per_day=float(np.median(thief.spent_per_day)),
        plans=search.tried,
        review=at_review,
        curve=curve,
        target=target,
    )


def _thresholds(
    scorer: ProbeScorer, settings: ExposureSettings, legitimate: NDArray[np.float32]
) -> tuple[list[tuple[float, float]], float]:
    """Return thresholds with their false positive rates, and the rate of the review threshold.

    They come from the operating points of the header. Without these they come from the payments.
    """
    header = scorer.checkpoint.header
    review = header.thresholds.review
    try:
        points = OperatingPoints(header)
    except ThresholdsError:
        found = [(float(np.quantile(legitimate, 1 - rate)), rate) for rate in settings.rates]
        return found, float((legitimate >= review).mean())
    found = []
    for rate in settings.rates:
        try:
            threshold = points.lowest(Goal("false-positive-rate", rate)).threshold
        except ThresholdsError:  # no threshold has so low a rate
            continue
        found.append((threshold, rate))
    return found, points.at(review).false_positive_rate


class Thief:
    """Thief who attacks accounts by plans.

    Args:
        scorer: scorer of the checkpoint that the thief knows.
        states: states of n accounts.
        accounts: [n] their histories.
        monotone: see :func:`measure_exposure`.
    """

    def __init__(
        self,
        scorer: ProbeScorer,
        states: ProbeStates,
        accounts: Sequence[History],
        monotone: bool = True,
    ) -> None:
        self.scorer = scorer
        self.states = states
        self.spent_per_day = np.array([a.spent_per_day for a in accounts])
        # The attack begins at the first midnight after the account's last payment.
        last = np.array([a.timestamp_ms[-1] if len(a) else NOW_MS for a in accounts], np.int64)
        self._start_ms = -(-last // DAY_MS) * DAY_MS
        self._merchants = scorer.merchants(_MERCHANTS, NOW_MS)
        self._least = AMOUNT_LEAST * scorer.scale
        self._most = AMOUNT_MOST * scorer.scale
        self._grid = np.geomspace(self._least, self._most, _COARSE if monotone else _FINE)

    def attack(
        self,
        accounts: Rows,
        plans: Sequence[Plan],
        threshold: float,
        show: Callable[[float], None] = lambda done: None,
    ) -> Attack:
        """Run each plan on each of these accounts, with scores below the threshold."""
        n, p = len(accounts), len(plans)
        states = self.states.take(np.tile(accounts, p))  # row = plan * n + account
        start = np.tile(self._start_ms[accounts], p)
        merchant = np.zeros(n * p, np.intp)
        taken, payments = np.zeros(n * p), np.zeros(n * p, np.int64)
        at_bound, done = np.zeros(n * p, np.bool_), np.zeros(n * p, np.bool_)
        lengths = np.repeat([len(plan) for plan in plans], n)
        at_ms = np.zeros((p, int(lengths.max(initial=0))), np.int64)
        shares = np.zeros(at_ms.shape)
        for i, plan in enumerate(plans):
            at_ms[i, : len(plan)], shares[i, : len(plan)] = plan.at_ms, plan.share
        limited = np.array([plan.limited for plan in plans])
        last_ms, searched = np.zeros(n * p, np.int64), np.full(n * p, -_SEARCH_EVERY)
        largest = np.zeros(n * p)
        for step in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero((lengths > step) & ~done)
            if not len(rows):
                break
            show(float(np.minimum(lengths, step).sum() / lengths.sum()))
            which = rows // n
            now = start[rows] + at_ms[which, step]
            if step == 0:
                merchant[rows] = self._best_merchant(states, rows, now, threshold)
            of_merchant = self._merchants[merchant[rows]]
            before = states.take(rows)

            def search(
                due: Rows,
                step: int = step,
                rows: Rows = rows,
                now: Int64 = now,
                before: ProbeStates = before,
                of_merchant: NDArray[np.float32] = of_merchant,
            ) -> None:
                largest[rows[due]] = self.largest_under(
                    before.take(due), now[due], of_merchant[due], threshold
                )
                searched[rows[due]] = step

            # The largest amount changes little within minutes, so the last one often passes again.
            is_due = (step - searched[rows] >= _SEARCH_EVERY) | (now - last_ms[rows] >= HOUR_MS)
            search(np.flatnonzero(is_due))
            share = shares[which, step]
            amount = self._whole(largest[rows] * share)
            score, after = self.scorer.advance(before, amount, now, of_merchant)
            again = np.flatnonzero(~is_due & (score >= threshold))
            if len(again):
                search(again)
                amount[again] = self._whole(largest[rows[again]] * share[again])
                score[again], corrected = self.scorer.advance(
                    before.take(again), amount[again], now[again], of_merchant[again]
                )
                after.put(again, corrected)
            paid = (score < threshold) & (amount > 0)
            states.put(rows[paid], after.take(np.flatnonzero(paid)))
            last_ms[rows] = now
            taken[rows[paid]] += amount[paid]
            payments[rows[paid]] += 1
            unbounded = paid & (largest[rows] >= self._most * 0.99)
            at_bound[rows[unbounded]] = True
            done[rows[unbounded & (share >= 1.0)]] = True
            at_bound[rows[paid & limited[which] & (lengths[rows] == step + 1)]] = True
        return Attack(taken.reshape(p, n).T, payments.reshape(p, n).T, at_bound.reshape(p, n).T)

    def _whole(self, amount: Float64) -> Float64:
        """Round amounts down to whole cents, or the like in the currency."""
        return np.asarray(np.floor(amount / self._least) * self._least)

    def largest_under(
        self, states: ProbeStates, now_ms: Int64, merchant: NDArray[np.float32], threshold: float
    ) -> Float64:
        """Find the largest amount [n] of a next payment with a score below the threshold.

        A grid is searched first, then bisection between its largest passing amount and the next
        one. The result passes and is within two per cent of the largest. It is 0 if no amount of
        the grid passes.
        """
        n = len(states)
        usual = self.scorer.usual(states)
        near = np.clip(usual[:, None] * [0.5, 1.0, 2.0], self._least, self._most)
        grid = np.sort(np.hstack((np.tile(self._grid, (n, 1)), near)), axis=1)  # [n, g]
        g = grid.shape[1]
        rows = np.repeat(np.arange(n), g)
        scores = self.scorer.scores(
            states, rows, grid.ravel(), now_ms[rows], merchant[rows]
        ).reshape(n, g)
        passes = scores < threshold
        some = passes.any(axis=1)
        last = np.where(some, g - 1 - passes[:, ::-1].argmax(axis=1), 0)
        every = np.arange(n)
        low = np.where(some, grid[every, last], 0.0)
        high = grid[every, np.minimum(last + 1, g - 1)]
        open_rows = np.flatnonzero(some & (last < g - 1))
        for _ in range(_BISECTIONS):
            middle = np.sqrt(low[open_rows] * high[open_rows])
            score = self.scorer.scores(
                states, open_rows, middle, now_ms[open_rows], merchant[open_rows]
            )
            passed = score < threshold
            low[open_rows[passed]] = middle[passed]
            high[open_rows[~passed]] = middle[~passed]
        return low

    def _best_merchant(
        self, states: ProbeStates, rows: Rows, now_ms: Int64, threshold: float
    ) -> Rows:
        """Return for each row the merchant that allows the largest first payment."""
        taken = states.take(rows)
        largest = [
            self.largest_under(taken, now_ms, np.tile(raw, (len(rows), 1)), threshold)
            for raw in self._merchants
        ]
        return np.asarray(np.argmax(np.stack(largest), axis=0))


class _Search:
    """Search for the best plans for a day and for a week."""

    def __init__(self, thief: Thief, settings: ExposureSettings) -> None:
        self._thief = thief
        self._settings = settings
        self._accounts = np.arange(len(thief.states))
        step = max(1, len(self._accounts) // settings.tried)
        self._some = self._accounts[::step][: settings.tried]
        self._best: dict[int, list[Plan]] = {}
        self.tried = 0

    def whole(self, threshold: float, rate: float, show: Show) -> Point:
        """Try all plans, vary the best ones, and run the best of all on every account."""
        taken = {}
        for number, days in enumerate((1, 7)):
            name = "a day" if days == 1 else "a week"
            begin = number / 2

            def part(after: float, share: float, note: str) -> Callable[[float], None]:
                return lambda done: show(begin + after + share * done, note)  # noqa: B023

            rng = np.random.default_rng(days)
            most = self._settings.payments_max
            plans = [*self._best.get(1, []), *given_plans(days, most)]
            plans += random_plans(days, self._settings.random_plans, rng, most)
            self.tried += len(plans)
            tried = part(0.0, 0.2, f"exposure: {len(plans)} plans of {name}")
            attack = self._thief.attack(self._some, plans, threshold, tried)
            best = _covering(attack, plans, self._settings.kept)
            varied = [v for plan in best for v in variants(plan, self._settings.varied, rng)]
            self.tried += len(varied)
            plans = [*best, *varied]
            tried = part(0.2, 0.1, f"exposure: {len(varied)} variants for {name}")
            attack = self._thief.attack(self._some, plans, threshold, tried)
            self._best[days] = _covering(attack, plans, self._settings.kept)
            tried = part(0.3, 0.2, f"exposure: {name}, every account")
            taken[days] = self._taken(days, self._best[days], threshold, tried)
        return Point(threshold, rate, taken[1], taken[7])

    def point(self, threshold: float, rate: float, show: Show) -> Point:
        """Run the best plans of the review threshold on every account."""
        taken = {}
        for number, days in enumerate((1, 7)):

            def part(done: float) -> None:
                note = f"exposure at {rate:.2%} false positives, {days} d"  # noqa: B023
                show((number + done) / 2, note)  # noqa: B023

            plans = self._best[days][: self._settings.kept_curve]
            taken[days] = self._taken(days, plans, threshold, part)
        return Point(threshold, rate, taken[1], taken[7])

    def _taken(
        self, days: int, plans: Sequence[Plan], threshold: float, show: Callable[[float], None]
    ) -> AccountLoss:
        attack = self._thief.attack(self._accounts, plans, threshold, show)
        every = np.arange(len(self._accounts))
        best = attack.amount.argmax(axis=1)
        amount = attack.amount[every, best]
        usual = np.maximum(self._thief.spent_per_day * days, self._thief.scorer.scale * 0.01)
        times = amount / usual
        most = int(np.bincount(best, minlength=len(plans)).argmax())
        return AccountLoss(
            days=days,
            median=_rounded(np.median(times)),
            p99=_rounded(np.quantile(times, 0.99)),
            median_amount=_rounded(np.median(amount)),
            p99_amount=_rounded(np.quantile(amount, 0.99)),
            at_bound=float(attack.at_bound[every, best].mean()),
            payments=float(np.median(attack.payments[every, best])),
            plan=plans[most].name,
        )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _covering(attack: Attack, plans: Sequence[Plan], count: int) -> list[Plan]:
    """Choose the plans that together take the most, one after the other."""
    # Relative to the best plan; otherwise accounts with high spending would decide alone.
    worth = attack.amount / np.maximum(attack.amount.max(axis=1, keepdims=True), 1e-9)
    covered = np.zeros(len(worth))
    chosen: list[int] = []
    for _ in range(min(count, len(plans))):
        gain = np.maximum(worth - covered[:, None], 0.0).sum(axis=0)
        gain[chosen] = -1.0
        gain -= 1e-6 * np.array([len(plan) for plan in plans])  # of equal plans the shorter one
        chosen.append(int(gain.argmax()))
        covered = np.maximum(covered, worth[:, chosen[-1]])
    return [plans[i] for i in chosen]


_RAMPS = (1.0, 0.6, 0.2)
"""Shares of the largest amount in a plan before its last tenth."""

_STARTS = {
    "by day": 10 * HOUR_MS,
    "at night": 2 * HOUR_MS,
    "by day after three weeks": 21 * DAY_MS + 10 * HOUR_MS,
}

_DAY_SPACINGS = {
    "one payment": DAY_MS,
    "every 12 h": 12 * HOUR_MS,
    "every 3 h": 3 * HOUR_MS,
    "every hour": HOUR_MS,
    "every 10 min": 10 * MINUTE_MS,
    "every minute": MINUTE_MS,
}
_WEEK_SPACINGS = {
    "once a day": (DAY_MS, 1),
    "twice a day": (12 * HOUR_MS, 2),
    "every 3 h": (3 * HOUR_MS, 8),
    "every hour": (HOUR_MS, 24),
    "20 a day, every 10 min": (10 * MINUTE_MS, 20),
    "20 a day, every minute": (MINUTE_MS, 20),
}


def given_plans(days: int, payments_max: int = PAYMENTS_PER_WEEK_MAX) -> list[Plan]:
    """Return plans of even spacing, by day, at night or after a silence.

    >>> [len(plan) for plan in given_plans(1) if "by day, 60 %" in plan.name]
    [2, 8, 24, 144, 200]
    """
    plans = []
    for start, begin_ms in _STARTS.items():
        if days == 1:
            spaced = {
                name: np.arange(0, DAY_MS, every, dtype=np.int64)
                for name, every in _DAY_SPACINGS.items()
            }
        else:
            spaced = {
                name: (
                    np.arange(days, dtype=np.int64)[:, None] * DAY_MS
                    + np.arange(count, dtype=np.int64) * every
                ).ravel()
                for name, (every, count) in _WEEK_SPACINGS.items()
            }
        for name, times in spaced.items():
            bound = min(payments_max, PAYMENTS_PER_DAY_MAX if days == 1 else PAYMENTS_PER_WEEK_MAX)
            limited = len(times) > bound or "every minute" in name
            kept = times[:bound]
            for ramp in _RAMPS[: 1 if len(kept) == 1 or "after" in start else None]:
                share = np.full(len(kept), ramp)
                share[-max(1, len(kept) // 10) :] = 1.0
                title = "" if ramp == 1.0 else f", {ramp:.0%}".replace("%", " %") + " at first"
                plans.append(Plan(f"{name}, {start}{title}", begin_ms + kept, share, limited))
    return plans


def random_plans(
    days: int, count: int, rng: np.random.Generator, payments_max: int = PAYMENTS_PER_WEEK_MAX
) -> list[Plan]:
    """Draw plans with random pauses and shares."""
    plans = []
    for number in range(count):
        typical = np.exp(rng.uniform(np.log(2 * MINUTE_MS), np.log(days * 6 * HOUR_MS)))
        pauses = rng.exponential(typical, min(payments_max, PAYMENTS_PER_DAY_MAX))
        times = np.cumsum(pauses).astype(np.int64) + int(rng.uniform(0, 24)) * HOUR_MS
        times = times[times - times[0] < days * DAY_MS]
        share = rng.choice([0.3, 0.6, 0.8, 1.0], len(times))
        share[-1] = 1.0
        plans.append(Plan(f"random {number + 1}", times, share))
    return plans


def variants(plan: Plan, count: int, rng: np.random.Generator) -> list[Plan]:
    """Draw variants of a plan with fewer payments and other shares."""
    found = []
    for number in range(count):
        kept = np.flatnonzero(rng.random(len(plan)) < rng.choice([0.5, 0.8, 1.0]))
        if not len(kept):
            kept = np.array([len(plan) - 1])
        share = np.clip(plan.share[kept] * rng.choice([0.5, 0.8, 1.0, 1.3], len(kept)), 0.05, 1.0)
        share[-1] = 1.0
        found.append(
            Plan(f"{plan.name}, variant {number + 1}", plan.at_ms[kept], share, plan.limited)
        )
    return found
