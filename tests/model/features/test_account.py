"""Features and inputs: independent of the cuts of a stream into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.features.account import (
    ACCOUNT_FEATURES,
    OUTLIER,
    WINDOW_DAYS,
    AccountHistory,
    Float32,
    Float64,
    Int64,
    observe,
    observe_log,
    rounds_of,
)
from model.features.amount_scale import AmountScale
from model.features.merchant import Labels, observe_merchant_log
from model.features.spec import (
    ACCOUNT_INPUTS,
    AMOUNT_FEATURES,
    FEATURES,
    INPUTS,
    RANGE_RANK,
    SIGNED,
    Encoder,
    FeatureSpec,
    FeatureSpecError,
    Field,
    Input,
    Role,
    Transform,
    field_column,
    ranges_of,
)
from model.training.inputs import fitted_spec
from model.units import DAY_MS

START_MS = 1_522_540_800_000  # 2018-04-01, a Sunday

SCALE = AmountScale(floor=2.0, usual=40.0)

Columns = tuple[Int64, Float64, Int64]


@st.composite
def logs(draw: st.DrawFn) -> Columns:
    """Draw up to 60 transactions of up to 5 accounts; event time mostly rises."""
    size = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    account = rng.integers(0, draw(st.integers(1, 5)), size)
    scale = 10.0 ** rng.integers(-2, 6, size).astype(np.float64)
    amount = np.round(rng.gamma(1, 60, size) * scale, 2)
    gaps = rng.integers(-DAY_MS, 5 * DAY_MS, size) * rng.integers(0, 2, size)
    return account, amount, np.maximum(START_MS + np.cumsum(gaps), 0)


def one(
    history: AccountHistory, amount: float, timestamp_ms: int
) -> tuple[dict[str, float], AccountHistory]:
    raw, after = observe(history, np.array([amount]), np.array([timestamp_ms]), SCALE)
    return dict(zip(ACCOUNT_FEATURES, raw[0].tolist(), strict=True)), after


def with_merchants(of_account: Float32) -> Float32:
    """Add the columns of merchants never seen: [n, A] -> [n, R]."""
    others = np.zeros((len(of_account), len(FEATURES) - len(ACCOUNT_FEATURES)), np.float32)
    return np.hstack((of_account, others))


def columns_of(history: AccountHistory) -> list[list[float]]:
    return [
        history.last_event_ms.tolist(),
        history.count.tolist(),
        history.decayed_count.tolist(),
        history.decayed_amount.tolist(),
        history.usual_amount.tolist(),
        history.usual_count.tolist(),
    ]


@given(logs(), st.integers(0, 60))
def test_features_do_not_change_when_later_transactions_are_removed(log: Columns, end: int) -> None:
    whole = observe_log(*log, SCALE)
    account, amount, timestamp_ms = log
    beginning = observe_log(account[:end], amount[:end], timestamp_ms[:end], SCALE)
    np.testing.assert_array_equal(whole[:end], beginning)


@given(logs(), st.lists(st.integers(0, 60), max_size=8))
def test_a_stream_cut_into_micro_batches_anywhere_gives_the_same_bits(
    log: Columns, cuts: list[int]
) -> None:
    account, amount, timestamp_ms = log
    histories = AccountHistory.empty(5)
    raw = np.empty((len(account), len(ACCOUNT_FEATURES)), np.float32)
    edges = sorted({0, len(account), *(c for c in cuts if c < len(account))})
    for begin, end in pairwise(edges):
        for rows in rounds_of(account[begin:end]):
            at = begin + rows
            accounts = account[at]
            raw[at], after = observe(histories.take(accounts), amount[at], timestamp_ms[at], SCALE)
            histories.put(accounts, after)
    np.testing.assert_array_equal(raw, observe_log(*log, SCALE))


@pytest.mark.parametrize("n", [2, 3, 7, 8, 15, 16, 17, 33, 100, 1000])
def test_a_rows_features_inputs_and_history_do_not_depend_on_its_neighbours(n: int) -> None:
    rng = np.random.default_rng(n)
    amount = np.round(rng.gamma(1, 60, n), 2)
    timestamp_ms = START_MS + rng.integers(0, 40 * DAY_MS, n)
    _, history = observe(AccountHistory.empty(n), amount, timestamp_ms, SCALE)
    history.count[::5] = 0
    later = timestamp_ms + rng.integers(-DAY_MS, 9 * DAY_MS, n)
    raw, after = observe(history, amount, later, SCALE)
    raw = with_merchants(raw)
    bounded = FeatureSpec(ACCOUNT_INPUTS, scale=SCALE, ranges=ranges_of(raw, FeatureSpec()))
    encoder = Encoder(bounded.fitted(raw))
    inputs = encoder.encode(raw)

    for row in range(n):
        only = slice(row, row + 1)
        raw_alone, after_alone = observe(history.take(only), amount[only], later[only], SCALE)
        raw_alone = with_merchants(raw_alone)
        np.testing.assert_array_equal(raw_alone[0], raw[row])
        np.testing.assert_array_equal(encoder.encode(raw_alone)[0], inputs[row])
        assert columns_of(after_alone) == columns_of(after.take(only))


@settings(max_examples=50)
@given(logs())
def test_features_are_what_their_names_say_by_a_slow_sum_over_the_history(log: Columns) -> None:
    raw = observe_log(*log, SCALE)
    seen: dict[int, list[Seen]] = {}
    for row, (account, amount, now_ms) in enumerate(zip(*(c.tolist() for c in log), strict=True)):
        before = seen.setdefault(account, [])
        last_ms = max([each.time_ms for each in before], default=now_ms)
        now_ms_or_last = max(now_ms, last_ms)
        expected = {
            "amount": amount,
            "seconds_since_last": (now_ms_or_last - last_ms) / 1000 if before else -1.0,
            "hour_of_day": now_ms / 3_600_000 % 24,
            "day_of_week": (now_ms // DAY_MS + 3) % 7,
            "transactions_seen": len(before) + 1,
        }
        for days in WINDOW_DAYS:
            weights = [math.exp((b.time_ms - now_ms_or_last) / (days * DAY_MS)) for b in before]
            expected[f"count_{days}d"] = sum(weights) + 1
            from_last = [math.exp((b.time_ms - last_ms) / (days * DAY_MS)) for b in before]
            amounts = [w * b.entered[days] for w, b in zip(from_last, before, strict=True)]
            mean = sum(amounts) / sum(from_last) if before else SCALE.usual
            expected[f"mean_amount_{days}d"] = mean
        usual = before[-1].usual if before else SCALE.usual
        expected["usual_amount"] = usual
        expected["amount_to_mean"] = amount / max(expected["mean_amount_30d"], SCALE.floor)
        expected["amount_to_usual"] = amount / max(usual, SCALE.floor)
        ratios = expected["amount_to_mean"], expected["amount_to_usual"]
        expected["amount_to_least"] = max(ratios)
        found_row = dict(zip(ACCOUNT_FEATURES, raw[row].tolist(), strict=True))
        for name, value in expected.items():
            assert found_row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        # A late transaction counts at the latest time seen.
        counted = before[-1].counted if before else 0
        before.append(Seen.of(now_ms_or_last, amount, counted, expected))


@dataclass(frozen=True)
class Seen:
    """A payment as it enters the means.

    It counts as at most 2.5 times the usual amount, or the mean of the last day. A payment under
    the floor counts as the mean, and the usual amount stays.
    """

    time_ms: int
    entered: dict[int, float]
    usual: float
    counted: int

    @classmethod
    def of(cls, time_ms: int, amount: float, counted: int, expected: dict[str, float]) -> Seen:
        means = {days: expected[f"mean_amount_{days}d"] for days in WINDOW_DAYS}
        usual = expected["usual_amount"]
        if np.float32(amount) < SCALE.floor:
            return cls(time_ms, means, usual, counted)
        cut = min(amount, max(2.5 * usual, means[1]))
        # The usual amount of all accounts counts as one payment before the first.
        counted = min(counted + 1, 100)
        after = usual + (cut - usual) / (counted + 1)
        return cls(time_ms, {1: amount, 7: cut, 30: cut}, after, counted)


def test_a_first_amount_of_a_cent_does_not_become_usual() -> None:
    history = AccountHistory.empty(1)
    for day in range(8):
        seen, history = one(history, 0.01 if day == 0 else 50.0, START_MS + day * DAY_MS)
        if day <= 1:
            assert seen["usual_amount"] == SCALE.usual
    # One payment of 40, the usual of all accounts, and six of 50; the cent does not count.
    assert seen["usual_amount"] == pytest.approx((40 + 6 * 50) / 7)


@given(
    st.floats(1.5, 6.0) | st.floats(25.0, 55.0),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(0, 20),
    st.integers(1, 5),
)
def test_card_checks_move_nothing_and_shrink_no_denominator(
    usual: float, check: float, payments: int, checks: int
) -> None:
    """This holds for any payments, for the first ones and later ones."""
    history = AccountHistory.empty(1)
    now_ms = START_MS
    for _ in range(payments):
        now_ms += DAY_MS // 3
        _, history = one(history, usual, now_ms)
    after = history
    for number in range(checks):
        _, after = one(after, check, now_ms + number * 60_000)
    large = now_ms + DAY_MS // 2

    without, _ = one(history, 500.0, large)
    seen, _ = one(after, 500.0, large)

    for name in (*AMOUNT_FEATURES, "usual_amount", "mean_amount_30d"):
        assert seen[name] == pytest.approx(without[name], rel=1e-5), name
    for name in ("mean_amount_1d", "mean_amount_7d"):
        assert seen[name] == pytest.approx(without[name], rel=1e-5), name
    for ratio in ("amount_to_usual", "amount_to_mean"):
        assert seen[ratio] <= 500.0 / SCALE.floor


@given(logs(), st.floats(0.0, 1e9))
def test_no_ratio_is_over_the_amount_in_units_of_the_floor(log: Columns, factor: float) -> None:
    account, amount, timestamp_ms = log
    raw = observe_log(account, np.minimum(amount * factor, 1e30), timestamp_ms, SCALE)
    most = raw[:, 0] / np.float32(SCALE.floor)
    for ratio in ("amount_to_usual", "amount_to_mean"):
        assert (raw[:, ACCOUNT_FEATURES.index(ratio)] <= most * (1 + 1e-6)).all()


@given(st.integers(0, 150), st.floats(3.0, 1000.0), st.floats(0.0, 1e30))
def test_one_odd_payment_moves_the_usual_amount_by_a_bounded_factor(
    payments: int, usual: float, odd: float
) -> None:
    """The n-th payment moves it up by at most 1.5 / (n + 1), and down by at most 1 / (n + 1).

    The account pays evenly before. After a hundred payments the bound no longer falls.
    """
    history = AccountHistory.empty(1)
    for number in range(payments):
        _, history = one(history, usual, START_MS + number * DAY_MS)
    before, after = one(history, odd, START_MS + payments * DAY_MS)
    next_one, _ = one(after, usual, START_MS + (payments + 1) * DAY_MS)

    moved = next_one["usual_amount"] / before["usual_amount"]
    share = 1 / (min(payments + 1, 100) + 1)
    # If payments differ much from the usual amount of all accounts, the mean of the last day is
    # over 2.5 times the usual amount. Then payments count in full.
    most = max(OUTLIER, before["mean_amount_1d"] / before["usual_amount"]) - 1
    assert 1 - share - 1e-5 <= moved <= 1 + most * share + 1e-5
    if payments >= 20:
        assert most == pytest.approx(1.5)
        assert moved <= 1 + 1.5 / 22 + 1e-5
    mean = before["mean_amount_30d"]
    furthest = max((1 + most) * before["usual_amount"], mean)
    if payments:
        assert next_one["mean_amount_30d"] <= (mean + (furthest - mean) / before["count_30d"]) * (
            1 + 1e-4
        )


def test_the_second_large_payment_counts_in_full() -> None:
    """The first payment of a new rent is an outlier, the second is not."""
    history = AccountHistory.empty(1)
    for number in range(30):
        _, history = one(history, 40.0, START_MS + number * DAY_MS)
    _, after = one(history, 4000.0, START_MS + 30 * DAY_MS)
    second, after = one(after, 4000.0, START_MS + 30 * DAY_MS + 3_600_000)
    third, _ = one(after, 4000.0, START_MS + 30 * DAY_MS + 7_200_000)

    # (100 - 40) / 32; then the mean of the last day: 40 with weight .582, 4000 with weight 1
    assert second["usual_amount"] == pytest.approx(40 + 60 / 32, rel=1e-4)
    mean = (40 * 0.58198 + 4000) / 1.58198
    assert third["usual_amount"] == pytest.approx(
        second["usual_amount"] + (mean - second["usual_amount"]) / 33, rel=1e-3
    )


def test_event_time_that_runs_backwards_counts_as_no_time_passed() -> None:
    _, history = one(AccountHistory.empty(1), 10.0, START_MS)
    late, history = one(history, 20.0, START_MS - 5 * DAY_MS)
    assert late["seconds_since_last"] == 0
    assert late["count_1d"] == 2
    assert history.last_event_ms.tolist() == [START_MS]


def test_an_accounts_first_transaction_differs_from_a_repetition_at_the_same_time() -> None:
    first, history = one(AccountHistory.empty(1), 25.0, START_MS)
    second, _ = one(history, 25.0, START_MS)
    assert (first["seconds_since_last"], second["seconds_since_last"]) == (-1, 0)
    assert (first["transactions_seen"], second["transactions_seen"]) == (1, 2)
    assert first["mean_amount_30d"] == first["usual_amount"] == SCALE.usual
    assert first["amount_to_mean"] == first["amount_to_usual"] == 25.0 / SCALE.usual
    # The mean is the first amount; the usual amount includes that of all accounts.
    assert (second["mean_amount_30d"], second["usual_amount"]) == (25.0, (40 + 25) / 2)
    assert (first["hour_of_day"], first["day_of_week"]) == (0, 6)


@pytest.mark.parametrize("amount", [0.0, 0.004, 1e12])
@pytest.mark.parametrize("gap_ms", [0, 1, 10_000 * DAY_MS])
def test_extreme_amounts_and_gaps_give_finite_features_and_inputs(
    amount: float, gap_ms: int
) -> None:
    history = AccountHistory.empty(1)
    for number in range(4):
        raw, history = observe(history, np.array([amount]), np.array([number * gap_ms]), SCALE)
        assert np.isfinite(raw).all()
        encoder = Encoder(FeatureSpec(ACCOUNT_INPUTS))
        assert np.isfinite(encoder.encode(with_merchants(raw))).all()
    raw, history = observe(history, np.array([1.0]), np.array([4 * gap_ms]), SCALE)
    assert np.isfinite(raw).all()


def test_a_count_stays_at_its_maximum_instead_of_overflowing() -> None:
    history = AccountHistory.empty(1)
    history.count[:] = 2**32 - 1
    seen, after = one(history, 1.0, START_MS)
    assert after.count.tolist() == [2**32 - 1]
    assert after.count.dtype == np.uint32
    assert seen["transactions_seen"] == 2**32


def test_observing_leaves_the_history_it_was_given_unchanged() -> None:
    _, history = one(AccountHistory.empty(1), 10.0, START_MS)
    before = columns_of(history)
    one(history, 99.0, START_MS + DAY_MS)
    assert columns_of(history) == before


def test_no_transactions_give_no_rows() -> None:
    nothing = np.array([], np.int64)
    assert observe_log(nothing, nothing.astype(float), nothing, SCALE).shape == (
        0,
        len(ACCOUNT_FEATURES),
    )


@given(st.lists(st.integers(-3, 3), max_size=40))
def test_rounds_hold_each_transaction_once_in_log_order_and_accounts_once_each(
    accounts: list[int],
) -> None:
    account = np.array(accounts, np.int64)
    rounds = rounds_of(account)
    rows = [int(r) for each in rounds for r in each]
    assert sorted(rows) == list(range(len(accounts)))
    for each in rounds:
        assert len(set(account[each].tolist())) == len(each)
    for a in set(accounts):
        in_rounds = [int(r) for each in rounds for r in each if account[r] == a]
        assert in_rounds == sorted(in_rounds)


def raw_sample(n: int = 500) -> Float32:
    rng = np.random.default_rng(3)
    timestamp_ms = START_MS + np.sort(rng.integers(0, 30 * DAY_MS, n))
    is_fraud = rng.random(n) < 0.2
    account, merchant = rng.integers(0, 20, n), rng.integers(0, 9, n)
    labels = Labels.delayed(is_fraud, timestamp_ms, DAY_MS)
    return np.hstack(
        (
            observe_log(account, rng.gamma(1, 60, n), timestamp_ms, SCALE),
            observe_merchant_log(merchant, timestamp_ms, labels, DAY_MS),
        )
    )


def test_fitted_inputs_have_mean_0_and_deviation_1_and_no_bound_but_their_range() -> None:
    raw = raw_sample()
    spec = FeatureSpec().fitted(raw)
    inputs = Encoder(spec).encode(raw)
    plain = [i for i, t in enumerate(spec.inputs) if t.transform in ("log1p", "linear")]
    np.testing.assert_allclose(inputs[:, plain].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(inputs[:, plain].std(axis=0), 1, atol=1e-3)
    raw[0, FEATURES.index("amount")] = 1e6
    assert Encoder(spec).encode(raw)[0].max() > 1000


def test_time_is_periodic_over_midnight_and_the_end_of_the_week() -> None:
    before, after = raw_sample(2)
    before[FEATURES.index("hour_of_day")] = 23.999
    after[FEATURES.index("hour_of_day")] = 0.001
    encoded = Encoder(FeatureSpec()).encode(np.stack((before, after)))
    hours = [i for i, t in enumerate(INPUTS) if t.feature == "hour_of_day"]
    np.testing.assert_allclose(encoded[0, hours], encoded[1, hours], atol=1e-3)


def test_steps_and_missing_values_become_zeros_and_ones() -> None:
    field = Field("age", "numeric")
    spec = FeatureSpec(
        (
            Input("amount", "step", threshold=220.0),
            Input("age", "linear", mean=30.0, deviation=10.0),
            Input("age", "is_missing"),
        ),
        fields=(field,),
    )
    raw = np.hstack((raw_sample(3), field_column(field)([40, None, 20])[:, None]))
    raw[:, 0] = [219.99, 220.0, 221.0]
    np.testing.assert_array_equal(
        Encoder(spec).encode(raw), [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, -1.0, 0.0]]
    )


def test_a_missing_value_is_left_out_of_mean_and_deviation() -> None:
    field = Field("age", "numeric")
    raw = np.hstack((raw_sample(4), field_column(field)([10, None, 30, None])[:, None]))
    (age,) = FeatureSpec((Input("age", "linear"),), fields=(field,)).fitted(raw).inputs
    assert (age.mean, age.deviation) == (20.0, 10.0)


def test_a_category_is_its_place_in_the_vocabulary_and_comes_last() -> None:
    field = Field("category", "categorical", ("food", "fuel"))
    spec = FeatureSpec((Input("amount", "linear"), Input("category", "category")), fields=(field,))
    column = field_column(field)(["fuel", "toys", None, "food"])[:, None]
    encoded = Encoder(spec).encode(np.hstack((raw_sample(4), column)))
    assert encoded[:, 1].tolist() == [2.0, 0.0, 0.0, 1.0]
    assert spec.embedded == (field,)
    assert field_column(Field("online", "categorical", ("true",)))([True, False]).tolist() == [1, 0]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_inputs_keep_the_order_of_the_specification(order: list[int]) -> None:
    two = (Input("hour_of_day", "sin", period=24.0), Input("amount", "linear"))
    shuffled = tuple([*two, Input("amount", "log1p"), two[0]][i] for i in (*order, 2, 3))
    raw = raw_sample(5)
    encoded = Encoder(FeatureSpec(shuffled)).encode(raw)
    one_by_one = [Encoder(FeatureSpec((i,))).encode(raw)[:, 0] for i in shuffled]
    np.testing.assert_array_equal(encoded, np.stack(one_by_one, axis=1))


def fitted(n: int = 3000, fields: tuple[Field, ...] = ()) -> tuple[FeatureSpec, Float32]:
    """Fit a specification with ranges and steps; return it with its raw features."""
    raw = raw_sample(n)
    for _ in fields:
        values = np.arange(n, dtype=np.float32) % 90
        raw = np.hstack((raw, np.where(values < 9, np.nan, values)[:, None].astype(np.float32)))
    is_fraud = raw[:, 0] > 150
    return fitted_spec(raw, is_fraud, fields, scale=SCALE), raw


BOUNDED = [name for name in FEATURES if name not in ("hour_of_day", "day_of_week")]


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e30), st.integers(0, 2999))
def test_no_input_is_extrapolated(beyond: float, row: int) -> None:
    """Outside a range every input equals its value at the range's end, and it is reported."""
    spec, raw = fitted_once()
    encoder = Encoder(spec)
    inside = np.clip(raw[row], *np.array(spec.ranges, np.float32).T)
    assert encoder.outside(inside[None]) is None
    for place, name in enumerate(spec.names):
        if name not in BOUNDED:
            continue
        low, high = (np.float32(end) for end in spec.ranges[place])
        for end, value in ((low, low - beyond * abs(low) - beyond), (high, high * (1 + beyond))):
            out, at_end = inside.copy(), inside.copy()
            out[place], at_end[place] = np.float32(value), end
            if out[place] == end:  # the same number in float32
                continue
            np.testing.assert_array_equal(
                encoder.encode(out[None]), encoder.encode(at_end[None]), err_msg=name
            )
            told = encoder.outside(out[None])
            assert told is not None
            assert np.flatnonzero(told[0]).tolist() == [place]
            assert encoder.outside(at_end[None]) is None


@cache
def fitted_once() -> tuple[FeatureSpec, Float32]:
    return fitted()


def test_a_missing_value_is_within_every_range_and_changes_an_input() -> None:
    spec, raw = fitted_once()
    row = np.median(raw, axis=0)
    signed = [spec.names.index(name) for name in SIGNED]
    row[signed] = -1.0
    encoder = Encoder(spec)
    assert encoder.outside(row[None]) is None
    zero = row.copy()
    zero[signed] = 0.0
    firsts = [i for i, each in enumerate(spec.inputs) if each.transform == "is_first"]
    assert firsts
    assert (encoder.encode(row[None])[0, firsts] == 1.0).all()
    assert (encoder.encode(zero[None])[0, firsts] == 0.0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_is_not_widened_by_a_few_odd_values(sign: int) -> None:
    """Fewer than twenty values of many transactions do not; one of 500 does."""
    raw = np.tile(raw_sample(500), (60, 1))  # 30,000
    place = FEATURES.index("merchant_count_7d")
    raw[:, place] = np.arange(30_000) % 1000
    ordinary = ranges_of(raw, FeatureSpec())
    odd = np.arange(RANGE_RANK) * 1500 + 700  # transactions of ordinary values
    raw[odd[1:], place] = sign * 1e9
    assert ranges_of(raw, FeatureSpec()) == ordinary
    raw[odd[0], place] = sign * 1e9
    assert ranges_of(raw, FeatureSpec())[place][sign > 0] == sign * 1e9
    assert ranges_of(raw[: odd[0] + 1], FeatureSpec())[place][sign > 0] == sign * 1e9


def test_a_missing_value_stays_missing_and_is_not_outside() -> None:
    spec, raw = fitted(fields=(Field("age", "numeric"),))
    assert spec.ranges[-1] == (9.0, 89.0)
    missing = raw[:1].copy()
    missing[0, -1] = np.nan
    encoder = Encoder(spec)
    encoded = dict(
        zip(
            [(i.feature, i.transform) for i in spec.inputs], encoder.encode(missing)[0], strict=True
        )
    )
    assert encoded["age", "is_missing"] == 1.0
    assert encoded["age", "linear"] == 0.0
    assert encoder.outside(missing) is None
    missing[0, -1] = 200.0
    assert Encoder(spec).outside(missing) is not None


@pytest.mark.parametrize("factor", [160.0, 16_000.0, 1e-4, 1e-8])
def test_the_unit_of_the_currency_does_not_matter(factor: float) -> None:
    """A log in JPY, IDR or a tiny unit gives the same fitted inputs."""
    rng = np.random.default_rng(5)
    n = 4000
    account = rng.integers(0, 60, n)
    amount = np.round(rng.gamma(2.0, rng.uniform(3, 40, 60)[account]), 2)
    amount[::50] = 0.01
    timestamp_ms = START_MS + np.sort(rng.integers(0, 60 * DAY_MS, n))
    is_fraud = amount > 120
    encoded = []
    for unit in (1.0, factor):
        scale = AmountScale.of(account, amount * unit)
        raw = with_merchants(observe_log(account, amount * unit, timestamp_ms, scale))
        spec = fitted_spec(raw, is_fraud, scale=scale)
        encoded.append(Encoder(spec).encode(raw))
        at = [(i.feature, i.transform, i.at_most) for i in spec.inputs]
        assert spec.scale.floor == pytest.approx(unit * floor_of(account, amount))
    assert any(transform == "step" and name == "amount" for name, transform, _ in at)
    for place, name in enumerate(at):
        np.testing.assert_allclose(
            encoded[1][:, place], encoded[0][:, place], atol=2e-4, err_msg=str(name)
        )


def floor_of(account: Int64, amount: Float64) -> float:
    """Return a fifth of the fifth percentile of the accounts' mean amounts."""
    means = sorted(float(amount[account == a].mean()) for a in set(account.tolist()))
    return 0.2 * float(np.percentile(means, 5))


def test_no_input_can_tell_amounts_that_are_divisible_by_5_cents() -> None:
    """Amounts of stolen cards in the Handbook's data are divisible by 5 cents.

    No input may rise and fall with the amount, so none can recognise them.
    """
    rng = np.random.default_rng(8)
    n = 20_000
    account = rng.integers(0, 200, n)
    is_fraud = rng.random(n) < 0.05
    amount = np.round(rng.gamma(2.0, 30.0, n), 2)
    amount = np.where(is_fraud, np.round(amount * 20) / 20, amount)
    raw = with_merchants(observe_log(account, amount, START_MS + np.arange(n) * 60_000, SCALE))
    spec = fitted_spec(raw, is_fraud, scale=SCALE)
    assert len({i.threshold for i in spec.inputs if i.feature == "amount"}) < 20

    cents = np.round(np.arange(1, 40_001) / 100, 2)
    _, history = one(AccountHistory.empty(1), 50.0, START_MS)
    many = history.take(np.zeros(len(cents), np.intp))
    raw, _ = observe(many, cents, np.full(len(cents), START_MS + DAY_MS), SCALE)
    moves = np.diff(raw, axis=0)
    assert {ACCOUNT_FEATURES[i] for i in np.flatnonzero(moves.any(axis=0))} == set(AMOUNT_FEATURES)
    inputs = Encoder(spec).encode(with_merchants(raw))
    rises = np.diff(inputs, axis=0)
    assert (rises >= 0).all()
    for place, i in enumerate(spec.inputs):
        if i.transform == "step":
            assert np.count_nonzero(rises[:, place]) <= 1, "one step up"
        elif i.feature in AMOUNT_FEATURES:  # no steeper than the transform's own slope
            moved = moves[:, ACCOUNT_FEATURES.index(i.feature)]
            slope = 1 / i.deviation / (i.unit if i.transform == "log1p" else 1.0)
            assert (rises[:, place] <= moved * slope * 1.01 + 1e-5).all()


@pytest.mark.parametrize(
    ("feature", "at_most", "role"),
    [
        ("amount", None, "amount"),
        ("amount_to_usual", None, "amount"),
        ("amount_to_least", 1.0, "own"),
        ("amount_to_least", None, "amount"),
        ("usual_amount", None, "own"),
        ("seconds_since_last", None, "own"),
        ("merchant_known_frauds", None, "frauds"),
        ("merchant_known_frauds", 1.0, "any_fraud"),
        ("merchant_streak_frauds", None, "frauds"),
        ("merchant_risk_1d", None, "frauds"),
        ("merchant_legitimate_days", None, "fraud_ages"),
        ("merchant_oldest_fraud_days", None, "fraud_ages"),
        ("merchant_count_7d", None, "merchant"),
        ("age", None, "own"),
    ],
)
@pytest.mark.parametrize("transform", ["log1p", "linear", "step"])
def test_the_role_of_an_input_follows_from_its_feature(
    feature: str, at_most: float | None, role: Role, transform: Transform
) -> None:
    assert Input(feature, transform, at_most=at_most).role == role


CATEGORY = Field("c", "categorical", ("food",))
FINITE = ((0.0, 1.0),) * len(FEATURES)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (FeatureSpec((Input("risk", "linear"),)), "'risk'"),
        (FeatureSpec((Input("amount", "linear", deviation=0.0),)), "deviation 0"),
        (FeatureSpec((Input("amount", "linear", mean=math.nan),)), "mean nan"),
        (FeatureSpec(()), "no inputs"),
        (FeatureSpec(label_delay_days=31), "label_delay_days is 31"),
        (FeatureSpec((Input("amount", "category"),)), "a category is embedded"),
        (FeatureSpec((Input("c", "category", mean=1.0),), fields=(CATEGORY,)), "not standardised"),
        (FeatureSpec((Input("c", "category", deviation=0.1),), fields=(CATEGORY,)), "a code"),
        (FeatureSpec(fields=(Field("amount", "numeric"),)), "same name"),
        (FeatureSpec(definition=99), "definition 99"),
        (FeatureSpec(ranges=FINITE[1:]), "ranges for"),
        (FeatureSpec(ranges=(*FINITE[1:], (0.0, math.inf))), "finite value"),
        (FeatureSpec(ranges=(*FINITE[1:], (math.nan, 1.0))), "finite value"),
        (FeatureSpec(ranges=(*FINITE[1:], (2.0, 1.0))), "in this order"),
        (FeatureSpec(scale=AmountScale(floor=0.0)), "floor 0"),
        (FeatureSpec(scale=AmountScale(usual=math.inf)), "usual inf"),
        (FeatureSpec(scale=AmountScale(usual=-1.0)), "usual -1"),
        (FeatureSpec((Input("amount", "log1p", unit=0.0),)), "unit 0"),
        (FeatureSpec((Input("amount", "log1p", at_most=math.nan),)), "at_most nan"),
        (FeatureSpec(window_days=(1, 2, 3)), r"\[1, 2, 3\] days"),
    ],
)
def test_an_unsupported_specification_is_rejected_with_its_reason(
    spec: FeatureSpec, names: str
) -> None:
    with pytest.raises(FeatureSpecError, match=names):
        Encoder(spec)


def test_a_specification_survives_json_without_a_change() -> None:
    spec, _ = fitted(fields=(Field("age", "numeric"),))
    assert len(spec.ranges) == len(spec.names)
    again = msgspec.json.decode(msgspec.json.encode(spec), type=FeatureSpec)
    assert again == spec
