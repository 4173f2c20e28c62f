"""The probe of behaviour: changes of the score when one value of a transaction changes.

Each sweep changes one value for a catalogue of histories. It is a violation if more money or more
known frauds at the merchant lower the score by more than rounding. Other sweeps are only shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.data.dataset import Dataset
from model.features.account import Float32, Float64, Int64
from model.probe.exposure import Exposure, ExposureSettings, measure_exposure
from model.probe.histories import (
    LONGEST,
    History,
    catalogue,
    found_histories,
    replay,
    simulated_log,
)
from model.probe.scorer import (
    LARGE_MERCHANT,
    SMALL_MERCHANT,
    UNKNOWN_MERCHANT,
    USUAL_MERCHANT,
    Frauds,
    Merchant,
    ProbeScorer,
    ProbeStates,
)
from model.units import DAY_MS, DAY_SECONDS, HOUR_MS, SECOND_MS

TOLERANCE_ABSOLUTE = 1e-4
TOLERANCE_RELATIVE = 1e-3
TOLERANCE_LEAST = 1e-6

TOLERANCE = (
    "a fall counts when it is over a thousandth of the score; at least 1e-6, at most 1e-4: "
    "float32 sums differ by less"
)

REQUIRED_FROM = 1.0
"""Multiple of the usual amount from which the score must not fall."""

AMOUNT_MAX = 100_000.0
"""Largest probed amount, euros."""

LARGE_AMOUNTS = (250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000)
"""Amounts of large payments, euros."""

LARGE_TIMES_USUAL = 10.0
"""Multiple of the usual amount above which a payment is large."""

FALLS_MAX = 2_000
"""Most falls in a result; all are counted."""

CURVES_OF = (
    "no payment yet",
    "15 payments of 1",
    "15 payments of 5",
    "15 payments of 20",
    "20 payments of 25 to 55",
    "0.01 first, pays 25 to 55, payment 4",
    "business card",
    "every 7 seconds",
    "silent for ten weeks",
    "old account",
)
"""Histories whose curves are in a result, for the plot."""

AMOUNT_SWEEP = "amount"
FRAUDS_SWEEP = "known frauds"

Show = Callable[[float, str], None]
Rows = NDArray[np.intp]


class Fall(msgspec.Struct, frozen=True):
    """A forbidden fall of the score: the largest of one curve.

    Attributes:
        history: name of the history.
        sweep: the value that changes.
        context: the values that stay.
        from_value, to_value: value before and after the fall.
        from_score, to_score: score before and after the fall.
        falls: number of falls in the curve.
    """

    history: str
    sweep: str
    context: str
    from_value: float
    to_value: float
    from_score: float
    to_score: float
    falls: int

    @property
    def size(self) -> float:
        """Size of the fall."""
        return self.from_score - self.to_score


class OutOfRange(msgspec.Struct, frozen=True):
    """A raw feature that leaves the checkpoint's range, so that its input is clipped.

    Attributes:
        sweep: the value that changes.
        first_value: smallest value at which the feature of a history is outside.
        histories: number of histories that leave the range.
    """

    sweep: str
    feature: str
    low: float
    high: float
    first_value: float
    histories: int


class LargeRow(msgspec.Struct, frozen=True):
    """Scores of large payments after one history.

    Attributes:
        score: score of each amount; None if it is no large payment for the account.
        under_smaller: whether the score is below review and below that of a smaller amount.
    """

    history: str
    group: str
    usual: float
    score: list[float | None]
    under_smaller: list[bool]


class LargePayments(msgspec.Struct, frozen=True):
    """Payments of over ten times the usual amount, by history.

    Attributes:
        amounts: amounts in the checkpoint's currency.
        tried: number of large payments.
        approved: those with a score below review.
        under_a_hundredth: approved ones with a score below .01.
        under_smaller: approved ones that score below a smaller amount; these are failures.
    """

    amounts: list[float]
    rows: list[LargeRow]
    tried: int
    approved: int
    under_a_hundredth: int
    under_smaller: int

    @property
    def caught(self) -> float:
        """Share of the large payments at or over review."""
        return 1.0 - self.approved / self.tried if self.tried else 1.0


class Curve(msgspec.Struct, frozen=True):
    """Scores of one history in one sweep, for the plot."""

    history: str
    sweep: str
    context: str
    values: list[float]
    scores: list[float]


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the probe of a checkpoint.

    Attributes:
        form: ``full`` or ``short``.
        scale: factor from euros to the checkpoint's currency.
        histories: number of probed histories.
        scores: number of scores in the sweeps.
        violations: number of curves with a forbidden fall.
        falls: the largest falls.
        states_ranges: whether the checkpoint states ranges of its inputs.
    """

    model: str
    form: str
    currency: str
    scale: float
    review: float
    histories: int
    scores: int
    violations: int
    falls: list[Fall]
    violations_by_sweep: dict[str, int]
    states_ranges: bool
    out_of_range: list[OutOfRange]
    large: LargePayments
    exposure: Exposure
    curves: list[Curve]
    tolerance: str = TOLERANCE
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the checkpoint breaks a rule."""
        return self.violations > 0 or self.large.under_smaller > 0

    def metrics(self) -> dict[str, float]:
        """Return the metrics for a checkpoint's header."""
        return {
            "probe_violations": float(self.violations),
            "probe_large_payments_caught": self.large.caught,
            "probe_large_payments_under_smaller": float(self.large.under_smaller),
            **self.exposure.metrics(),
        }

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text."""
        yield (
            f"probe ({self.form}): {self.violations:,} violations in {self.histories:,} histories"
            if self.violations
            else f"probe ({self.form}): no violation in {self.histories:,} histories"
        )
        for fall in self.falls[:3]:
            yield f"  {describe_fall(fall)}"
        large = self.large
        yield (
            f"  {large.approved:,} of {large.tried:,} large payments are approved, "
            f"{large.under_smaller:,} of them with a score under a smaller payment's"
        )
        for line in self.exposure.lines():
            yield f"  {line}"


def describe_fall(fall: Fall) -> str:
    """Describe a fall in one line.

    >>> describe_fall(Fall("15 x 5", "amount", "usual", 90.0, 500.0, 0.52, 0.0, 3))
    '15 x 5 (usual): from amount 90 to 500 the score falls from 0.52 to 0'
    """
    return (
        f"{fall.history} ({fall.context}): from {fall.sweep} {fall.from_value:,.6g} to "
        f"{fall.to_value:,.6g} the score falls from {fall.from_score:.4g} to {fall.to_score:.4g}"
    )


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe.

    Attributes:
        form: ``full`` or ``short``.
        amounts: number of amounts in a sweep.
        contexts: number of contexts of the amount sweep.
        fraud_cases: number of contexts of the sweep of known frauds.
        repeats: number of payments in the count sweep.
        found: most histories from the user's data.
        longest: number of payments of the oldest account.
        exposure: settings of the exposure.
        customers, days: size of the simulated log, without data of the user.
    """

    form: str = "full"
    amounts: int = 240
    contexts: int = 8
    fraud_cases: int = 1_000
    repeats: int = 200
    found: int = 100
    longest: int = LONGEST
    exposure: ExposureSettings = field(default_factory=ExposureSettings)
    customers: int = 2_000
    days: int = 50


FULL = ProbeSettings()
SHORT = ProbeSettings(
    form="short",
    amounts=72,
    contexts=4,
    fraud_cases=8,
    repeats=50,
    found=30,
    exposure=ExposureSettings.short(),
    customers=800,
    days=30,
)


def short_probe(checkpoint: Checkpoint) -> ProbeResult:
    """Run the short form of the probe, as after a training."""
    return probe(checkpoint, SHORT)


def probe(
    checkpoint: Checkpoint,
    settings: ProbeSettings = FULL,
    log: Dataset | None = None,
    show: Show = lambda done, note: None,
) -> ProbeResult:
    """Probe a checkpoint.

    Args:
        checkpoint: on the CPU.
        settings: the settings of the probe.
        log: transactions of the user. None: simulated ones.
        show: called with the share done and the current step.
    """
    scorer = ProbeScorer(checkpoint)
    with scorer.working():
        return _probe(scorer, settings, log, show)


def _probe(
    scorer: ProbeScorer, settings: ProbeSettings, log: Dataset | None, show: Show
) -> ProbeResult:
    began = time.monotonic()
    checkpoint = scorer.checkpoint
    show(0.0, "histories")
    histories = catalogue(scorer.scale, settings.longest)
    if log is not None:
        histories += found_histories(log, scorer.spec, settings.found)
    states, _ = replay(scorer, histories)
    show(0.05, "sweeps")
    sweeps = _Sweeps(scorer, histories, states, settings)
    found = _Findings(sweeps)
    for number, curves in enumerate(sweeps.all()):
        found.add(curves)
        show(0.05 + 0.3 * min(1.0, number / sweeps.expected), f"sweeps: {curves.sweep}")
    large = _large_payments(scorer, histories, states, checkpoint.header.thresholds.review)
    if log is None:
        show(0.35, "exposure: simulated accounts")
        log = simulated_log(settings.customers, settings.days, scorer.scale)
    exposure = measure_exposure(
        scorer,
        log,
        settings.exposure,
        monotone=not found.by_sweep.get(AMOUNT_SWEEP, 0),
        show=lambda done, note: show(0.35 + 0.65 * done, note),
    )
    show(1.0, "done")
    return ProbeResult(
        model=checkpoint.digest,
        form=settings.form,
        currency=checkpoint.header.currency,
        scale=scorer.scale,
        review=checkpoint.header.thresholds.review,
        histories=len(histories),
        scores=found.scores,
        violations=sum(found.by_sweep.values()),
        falls=sorted(found.falls, key=lambda f: -f.size)[:FALLS_MAX],
        violations_by_sweep=found.by_sweep,
        states_ranges=scorer.states_ranges,
        out_of_range=found.out_of_range(),
        large=large,
        exposure=exposure,
        curves=found.curves,
        seconds=round(time.monotonic() - began, 1),
    )


@dataclass(frozen=True)
class Curves:
    """Scores of h histories for v values of one sweep.

    Attributes:
        sweep: the value that changes.
        context: the values that stay.
        values: [v], or [h, v] if they differ by history.
        scores: [h, v].
        outside: [h, v, R] raw features out of the checkpoint's ranges. None: it has none.
        required: [h, v] where the score must not fall. None: it may fall everywhere.
    """

    sweep: str
    context: str
    values: Float64
    scores: Float32
    outside: NDArray[np.bool_] | None = None
    required: NDArray[np.bool_] | None = None


def allowed_fall(score: Float64) -> Float64:
    """Return the fall of a score that rounding may cause; see :data:`TOLERANCE`."""
    return np.clip(score * TOLERANCE_RELATIVE, TOLERANCE_LEAST, TOLERANCE_ABSOLUTE)


def falls_of(curves: Curves, names: Sequence[str]) -> list[Fall]:
    """Return the largest forbidden fall of each history.

    A score is compared with the highest one of all smaller values.
    """
    if curves.required is None:
        return []
    scores = np.where(curves.required, curves.scores, -np.inf).astype(np.float64)  # [h, v]
    highest = np.maximum.accumulate(scores, axis=1)
    highest = np.where(curves.required, highest, 0.0)
    fall = highest - np.where(curves.required, scores, 0.0)
    counts = fall > allowed_fall(highest)
    found = []
    for h in np.flatnonzero(counts.any(axis=1)).tolist():
        to = int(np.argmax(np.where(counts[h], fall[h], 0.0)))
        begin = int(np.argmax(scores[h, : to + 1]))
        found.append(
            Fall(
                names[h],
                curves.sweep,
                curves.context,
                float(curves.values[begin]),
                float(curves.values[to]),
                float(scores[h, begin]),
                float(scores[h, to]),
                int(counts[h].sum()),
            )
        )
    return found


class _Findings:
    """Results of the sweeps so far."""

    def __init__(self, sweeps: _Sweeps) -> None:
        self._names = [h.name for h in sweeps.histories]
        self._scorer = sweeps.scorer
        self._left: dict[tuple[str, str], tuple[float, set[int]]] = {}
        self.falls: list[Fall] = []
        self.by_sweep: dict[str, int] = {}
        self.curves: list[Curve] = []
        self.scores = 0
        self._kept: set[str] = set()

    def add(self, curves: Curves) -> None:
        self.scores += curves.scores.size
        falls = falls_of(curves, self._names)
        if curves.required is not None:
            self.by_sweep[curves.sweep] = self.by_sweep.get(curves.sweep, 0) + len(falls)
        self.falls = sorted([*self.falls, *falls], key=lambda f: -f.size)[:FALLS_MAX]
        self._add_outside(curves)
        if curves.sweep not in self._kept:  # the first context of each sweep
            self._kept.add(curves.sweep)
            self.curves += [
                Curve(
                    name,
                    curves.sweep,
                    curves.context,
                    curves.values.tolist(),
                    [float(f"{score:.6g}") for score in curves.scores[h]],
                )
                for h, name in enumerate(self._names)
                if name in CURVES_OF
            ]

    def _add_outside(self, curves: Curves) -> None:
        if curves.outside is None:
            return
        for r in np.flatnonzero(curves.outside.any(axis=(0, 1))):
            outside = curves.outside[:, :, r]
            value = float(curves.values[outside.any(axis=0).argmax()])
            key = curves.sweep, self._scorer.names[r]
            before, histories = self._left.get(key, (np.inf, set()))
            histories |= set(np.flatnonzero(outside.any(axis=1)).tolist())
            self._left[key] = min(before, value), histories

    def out_of_range(self) -> list[OutOfRange]:
        return [
            OutOfRange(sweep, feature, *self._scorer.range_of(feature), value, len(histories))
            for (sweep, feature), (value, histories) in self._left.items()
        ]


@dataclass(frozen=True)
class _Context:
    """Values that stay while the amount changes: merchant, pause and hour."""

    name: str
    merchant: Merchant = USUAL_MERCHANT
    pause_ms: int | None = None
    """Time since the last payment. None: as usual for the history."""
    hour: float | None = None
    """Hour of the payment. None: given by the pause."""


_KNOWN = (Frauds(8, 1, 3, 4),)

AMOUNT_CONTEXTS = (
    _Context("as usual"),
    _Context("a minute later", pause_ms=60 * SECOND_MS),
    _Context("merchant never seen", UNKNOWN_MERCHANT),
    _Context("merchant with 3 known frauds", Merchant(20.0, frauds=_KNOWN)),
    _Context("merchant of 500,000 payments a day", LARGE_MERCHANT),
    _Context("merchant of 1 payment a day", SMALL_MERCHANT),
    _Context("at 03:00", hour=3.0),
    _Context("after 60 days", pause_ms=60 * DAY_MS),
)

FRAUD_COUNTS = (0, 1, 2, 3, 4, 5, 7, 10, 15, 25, 50, 100)

FRAUD_DAYS: dict[str, tuple[tuple[float, float], ...]] = {
    "of 8 days ago, known for a day": ((8.0, 1.0),),
    "of 2 days ago, known for a day": ((2.0, 1.0),),
    "of 30 days ago, known for 20": ((30.0, 20.0),),
    "of three days, 8 to 10 days ago": ((8.0, 1.0), (9.0, 1.0), (10.0, 1.0)),
}
"""Age of the frauds and days since their labels arrived, by context."""

FRAUD_SIZES = (1.0, 50.0, 10_000.0)
FRAUD_TIMES_USUAL = (1.0, 5.0, 50.0)


class _Sweeps:
    """All sweeps of a probe."""

    def __init__(
        self,
        scorer: ProbeScorer,
        histories: Sequence[History],
        states: ProbeStates,
        settings: ProbeSettings,
    ) -> None:
        self.scorer = scorer
        self.histories = histories
        self._states = states
        self._settings = settings
        self._next_ms = np.array([h.next_ms for h in histories], np.int64)
        self._usual = scorer.usual(states)
        self._merchant = self._raw(USUAL_MERCHANT)
        cases = len(FRAUD_SIZES) * len(FRAUD_DAYS) * len(FRAUD_TIMES_USUAL)
        self.expected = (
            min(settings.contexts, len(AMOUNT_CONTEXTS)) + min(settings.fraud_cases, cases) + 14
        )

    def all(self) -> Iterator[Curves]:
        """Run each sweep in each of its contexts."""
        yield from self.amount()
        yield from self.known_frauds()
        for times, context in ((1.0, "the usual amount"), (10.0, "ten times the usual amount")):
            amount = self._usual * times
            yield self.pause(amount, context)
            yield self.hour(amount, context)
            yield self.weekday(amount, context)
            yield self.merchant_age(amount, context)
            yield self.merchant_size(amount, context)
            yield self.year_without_label(amount, context)
        yield from self.count()

    def amount(self) -> Iterator[Curves]:
        """Raise the amount from nothing to the largest."""
        scale = self.scorer.scale
        values = np.concatenate(([0.0], np.geomspace(0.01, AMOUNT_MAX, self._settings.amounts - 1)))
        values = np.round(values * scale, 10)
        required = values[None, :] >= REQUIRED_FROM * self._usual[:, None]
        for context in AMOUNT_CONTEXTS[: self._settings.contexts]:
            times = self._times(context)
            yield self._curves(
                AMOUNT_SWEEP,
                context.name,
                values,
                np.tile(values, (len(self.histories), 1)),
                np.repeat(times[:, None], len(values), 1),
                self._raw(context.merchant),
                required,
            )

    def known_frauds(self) -> Iterator[Curves]:
        """Raise the number of known frauds in the same buckets of a merchant."""
        values = np.array(FRAUD_COUNTS, np.float64)
        cases = [
            (size, days, times)
            for times in FRAUD_TIMES_USUAL
            for days in FRAUD_DAYS
            for size in FRAUD_SIZES
        ]
        if len(cases) > self._settings.fraud_cases:
            step = len(cases) / self._settings.fraud_cases
            cases = [cases[int(i * step)] for i in range(self._settings.fraud_cases)]
        most = max(FRAUD_COUNTS)
        for size, days, times in cases:
            merchants = [
                Merchant(
                    size,
                    frauds=tuple(Frauds(ago, known, n, most) for ago, known in FRAUD_DAYS[days]),
                )
                for n in FRAUD_COUNTS
            ]
            yield self._by_merchant(
                FRAUDS_SWEEP,
                f"{days}, merchant of {size:,.0f} a day, {times:g} times the usual amount",
                values,
                merchants,
                self._usual * times,
                required=True,
            )

    def pause(self, amount: Float64, context: str) -> Curves:
        """Change the seconds since the last payment."""
        seconds = np.round(np.geomspace(1.0, 400.0 * DAY_SECONDS, 60))
        last = np.array(
            [h.timestamp_ms[-1] if len(h) else h.next_ms - DAY_MS for h in self.histories]
        )
        times = last[:, None] + (seconds * SECOND_MS).astype(np.int64)
        return self._over_times("pause, seconds", context, seconds, times, amount)

    def hour(self, amount: Float64, context: str) -> Curves:
        """Change the hour of the day."""
        hours = np.arange(0, 24, 0.5)
        midnight = -(-self._next_ms // DAY_MS) * DAY_MS
        times = midnight[:, None] + (hours * HOUR_MS).astype(np.int64)
        return self._over_times("hour of the day", context, hours, times, amount)

    def weekday(self, amount: Float64, context: str) -> Curves:
        """Change the weekday, from Monday."""
        days = np.arange(7)
        of_week = (self._next_ms // DAY_MS + 3) % 7
        times = self._next_ms[:, None] + (days + (7 - of_week[:, None])) * DAY_MS
        return self._over_times("weekday", context, days.astype(np.float64), times, amount)

    def merchant_age(self, amount: Float64, context: str) -> Curves:
        """Change the days since the merchant's first payment."""
        ages = np.array([0, 0.125, 0.25, 0.5, 1, 2, 3, 5, 7, 8, 9, 10, 14, 21, 28, 35, 38, 40])
        merchants = [Merchant(USUAL_MERCHANT.per_day, float(age)) for age in ages]
        return self._by_merchant("merchant's age, days", context, ages, merchants, amount)

    def merchant_size(self, amount: Float64, context: str) -> Curves:
        """Change the merchant's payments a day."""
        sizes = np.round(np.geomspace(1, 500_000, 40))
        merchants = [Merchant(float(size)) for size in sizes]
        return self._by_merchant("merchant's payments a day", context, sizes, merchants, amount)

    def year_without_label(self, amount: Float64, context: str) -> Curves:
        """Change the days since the merchant's last label, which marked five frauds."""
        days = np.array([1, 2, 3, 5, 7, 10, 14, 21, 28, 35, 37, 38, 39, 45, 60, 90, 180, 365.0])
        merchants = [
            Merchant(USUAL_MERCHANT.per_day, frauds=(Frauds(float(d) + 7, float(d), 5, 10),))
            for d in days
        ]
        return self._by_merchant("days since the last label", context, days, merchants, amount)

    def count(self) -> Iterator[Curves]:
        """Repeat the usual payment; score it and one of ten times the amount."""
        repeats = self._settings.repeats
        values = np.arange(1.0, repeats + 1)
        for pause_ms, context in ((HOUR_MS, "every hour"), (60 * SECOND_MS, "every minute")):
            states = self._states
            times = self._next_ms.copy()
            same = np.empty((len(self.histories), repeats), np.float32)
            more = np.empty_like(same)
            for step in range(repeats):
                more[:, step] = self.scorer.scores(
                    states, np.arange(len(states)), 10 * self._usual, times, self._merchant
                )
                same[:, step], states = self.scorer.advance(
                    states, self._usual, times, self._merchant
                )
                times = times + pause_ms
            yield Curves("count", f"{context}, the usual amount", values, same)
            yield Curves("count, then ten times as much", context, values, more)

    def _times(self, context: _Context) -> Int64:
        times = self._next_ms
        if context.pause_ms is not None:
            times = np.array(
                [
                    h.timestamp_ms[-1] + context.pause_ms if len(h) else h.next_ms
                    for h in self.histories
                ],
                np.int64,
            )
        if context.hour is not None:
            times = -(-times // DAY_MS) * DAY_MS + int(context.hour * HOUR_MS)
        return times

    def _raw(self, merchant: Merchant) -> Float32:
        """Return the merchant's raw features [1, M], which are the same at every time."""
        return self.scorer.merchants([merchant], self.histories[0].next_ms)

    def _over_times(
        self, sweep: str, context: str, values: Float64, times: Int64, amount: Float64
    ) -> Curves:
        amounts = np.repeat(amount[:, None], len(values), 1)
        return self._curves(sweep, context, values, amounts, times, self._merchant)

    def _by_merchant(
        self,
        sweep: str,
        context: str,
        values: Float64,
        merchants: Sequence[Merchant],
        amount: Float64,
        required: bool = False,
    ) -> Curves:
        h, v = len(self.histories), len(values)
        raw = self.scorer.merchants(merchants, self.histories[0].next_ms)  # [v, M]
        return self._curves(
            sweep,
            context,
            values,
            np.repeat(amount[:, None], v, 1),
            np.repeat(self._next_ms[:, None], v, 1),
            np.tile(raw, (h, 1)),
            np.ones((h, v), np.bool_) if required else None,
        )

    def _curves(
        self,
        sweep: str,
        context: str,
        values: Float64,
        amount: Float64,
        times: Int64,
        merchant: Float32,
        required: NDArray[np.bool_] | None = None,
    ) -> Curves:
        """Score amounts and times [h, v] at merchants [h * v, M] or [1, M]."""
        h, v = amount.shape
        rows = np.repeat(np.arange(h), v)
        flat_amount, flat_times = amount.ravel(), times.ravel()
        scores = self.scorer.scores(self._states, rows, flat_amount, flat_times, merchant)
        outside = None
        if self.scorer.states_ranges:
            raw = self.scorer.raw(self._states.take(rows), flat_amount, flat_times, merchant)
            outside = self.scorer.outside(raw).reshape(h, v, -1)
        return Curves(sweep, context, values, scores.reshape(h, v), outside, required)


def _large_payments(
    scorer: ProbeScorer, histories: Sequence[History], states: ProbeStates, review: float
) -> LargePayments:
    """Score large payments after each history, at its usual pace and a usual merchant."""
    amounts = np.array(LARGE_AMOUNTS, np.float64) * scorer.scale
    usual = scorer.usual(states)
    smaller = np.geomspace(1.0, 2.0, 2)  # the usual amount, and twice that
    grid = np.hstack((usual[:, None] * smaller, np.tile(amounts, (len(histories), 1))))
    times = np.array([h.next_ms for h in histories], np.int64)
    merchant = scorer.merchants([USUAL_MERCHANT], histories[0].next_ms)
    h, v = grid.shape
    scores = scorer.scores(
        states, np.repeat(np.arange(h), v), grid.ravel(), np.repeat(times, v), merchant
    ).reshape(h, v)
    # Amounts below usual may have any score.
    counted = np.where(grid >= REQUIRED_FROM * usual[:, None], scores, -np.inf)
    order = np.argsort(grid, axis=1, kind="stable")
    ordered = np.take_along_axis(counted, order, 1).astype(np.float64)
    highest = np.take_along_axis(
        np.maximum.accumulate(ordered, axis=1), np.argsort(order, axis=1), 1
    )
    is_large = grid > LARGE_TIMES_USUAL * usual[:, None]
    is_large[:, : len(smaller)] = False
    approved = is_large & (scores < review)
    fall = highest - scores
    under = approved & (fall > allowed_fall(np.where(np.isfinite(highest), highest, 0.0)))
    skip = len(smaller)
    rows = [
        LargeRow(
            history.name,
            history.group,
            float(usual[i]),
            [
                float(f"{scores[i, j]:.6g}") if is_large[i, j] else None
                for j in range(skip, grid.shape[1])
            ],
            under[i, skip:].tolist(),
        )
        for i, history in enumerate(histories)
    ]
    return LargePayments(
        amounts.tolist(),
        rows,
        int(is_large.sum()),
        int(approved.sum()),
        int((approved & (scores < 0.01)).sum()),
        int(under.sum()),
    )
