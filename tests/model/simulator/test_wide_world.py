"""The wide world: each kind of account and of fraud occurs, in its share and shape."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from model.simulator.accounts import HANDBOOK_KIND, HONEST_MAX
from model.simulator.handbook import DayOfTransactions, Simulator, SimulatorError
from model.simulator.thieves import AMOUNT_MAX, BURST_PAYMENTS, SILENT_DAYS
from model.simulator.world import (
    BURST,
    CARD_TEST,
    HANDBOOK,
    HUGE_PAYMENT,
    KINDS,
    LEGITIMATE,
    MERCHANT_IN_PART,
    NEW_ACCOUNT,
    OVER_220,
    SCENARIOS,
    SKIMMED_TERMINAL,
    SMALL_AMOUNTS,
    STOLEN_CARD,
    TAKEOVER,
    WIDE,
)
from model.training.train import TrainingSettings, simulate
from pipeline.cli.main import recur
from pipeline.demo.run import DemoOptions

CUSTOMERS, TERMINALS, DAYS = 3_000, 6_000, 150
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
HANDBOOK_DIGEST = "00d1da53068b3c9c806cb6d3ea4142574e85482d416ad895794fa823295d0ee6"
"""Of the Handbook's world, customers 200, terminals 500, seed 7, the first 30 days."""


@dataclass
class Stream:
    """Some days of the wide world, in order of account and then of time.

    Attributes:
        usual: [customers] EUR, each account's usual amount on the first day.
        kind: [customers] of accounts.
        number: [n] how many payments the account made before.
        pause_ms: [n] since the account's last payment; 0 for its first.
    """

    account: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    scenario: NDArray[np.int8]
    number: NDArray[np.int64]
    pause_ms: NDArray[np.int64]
    usual: NDArray[np.float64]
    kind: NDArray[np.int64]

    def of_kind(self, name: str) -> NDArray[np.bool_]:
        """[n] honest payments of such accounts."""
        number = [kind.name for kind in KINDS].index(name)
        honest: NDArray[np.bool_] = (self.kind[self.account] == number) & (self.scenario == 0)
        return honest


def joined(days: list[DayOfTransactions], column: str) -> NDArray[np.float64]:
    return np.concatenate([getattr(day, column) for day in days])


def first_days(days: int, customers: int, terminals: int, seed: int) -> list[DayOfTransactions]:
    simulator = Simulator(customers, terminals, seed=seed, world=WIDE)
    return list(islice(simulator.days(), days))


@pytest.fixture(scope="module")
def days() -> list[DayOfTransactions]:
    return first_days(DAYS, CUSTOMERS, TERMINALS, seed=3)


@pytest.fixture(scope="module")
def stream(days: list[DayOfTransactions]) -> Stream:
    account = joined(days, "account").astype(np.int64)
    order = np.argsort(account, kind="stable")
    account = account[order]
    time_ms = joined(days, "timestamp_ms").astype(np.int64)[order]
    begins = np.flatnonzero(np.diff(account, prepend=-1))
    sizes = np.diff(begins, append=len(account))
    pause_ms = np.diff(time_ms, prepend=0)
    pause_ms[begins] = 0
    accounts = Simulator(CUSTOMERS, TERMINALS, seed=3, world=WIDE).wide_world().accounts
    return Stream(
        account=account,
        time_ms=time_ms,
        merchant=joined(days, "merchant").astype(np.int64)[order],
        amount=joined(days, "amount")[order],
        scenario=joined(days, "scenario").astype(np.int8)[order],
        number=np.arange(len(account)) - np.repeat(begins, sizes),
        pause_ms=pause_ms,
        usual=accounts.usual,
        kind=accounts.kind,
    )


def test_the_handbooks_world_is_bit_for_bit_what_it_was() -> None:
    digest = hashlib.sha256()
    for day in islice(Simulator(customers=200, terminals=500, seed=7).days(), 30):
        for column in (f.name for f in fields(DayOfTransactions) if f.name != "day"):
            values = getattr(day, column)
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    assert digest.hexdigest() == HANDBOOK_DIGEST


def test_a_seed_gives_one_stream_whose_beginning_does_not_depend_on_its_end() -> None:
    few, many, other = (
        first_days(n, customers=300, terminals=500, seed=seed)
        for n, seed in ((3, 7), (30, 7), (3, 8))
    )
    for column in ("transaction_id", "timestamp_ms", "account", "merchant", "amount", "scenario"):
        np.testing.assert_array_equal(joined(few, column), joined(many[:3], column))
    ids = joined(many, "transaction_id")
    np.testing.assert_array_equal(ids, np.arange(len(ids)))
    assert not np.array_equal(joined(few, "amount"), joined(other, "amount"))


def test_days_are_in_order_of_time_and_amounts_are_whole_cents(
    days: list[DayOfTransactions],
) -> None:
    start = int(days[0].timestamp_ms[0]) // DAY_MS
    for number, day in enumerate(days):
        assert (np.diff(day.timestamp_ms) >= 0).all()
        assert (day.timestamp_ms // DAY_MS == start + number).all()
        assert (day.is_fraud == (day.scenario > 0)).all()
    amount = joined(days, "amount")
    assert amount.min() == 0.0
    assert not np.signbit(amount).any()
    np.testing.assert_array_equal(amount, np.round(amount, 2))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_days() -> None:
    days = Simulator(customers=600, terminals=1000, world=WIDE).days()
    tracemalloc.start()
    try:
        for _ in range(30):
            next(days)
        early, _ = tracemalloc.get_traced_memory()
        for _ in range(150):
            next(days)
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert late - early < 200_000  # bytes; 150 days' transactions would be 8 MB


def test_all_kinds_of_fraud_occur_and_fraud_is_about_one_per_cent(stream: Stream) -> None:
    share = np.bincount(stream.scenario, minlength=len(SCENARIOS)) / len(stream.scenario)
    assert 0.005 < 1 - share[LEGITIMATE] < 0.018
    assert (share[1:] > 5e-5).all(), dict(zip(SCENARIOS, share, strict=True))
    handbooks = share[[OVER_220, SKIMMED_TERMINAL, STOLEN_CARD]].sum()
    assert 0.3 < handbooks / (1 - share[LEGITIMATE]) < 0.8
    follows = stream.kind == HANDBOOK_KIND
    assert follows.mean() == pytest.approx(WIDE.handbook_accounts, abs=0.001)
    assert 0.35 < follows[stream.account].mean() < 0.65


def test_each_kind_of_account_has_its_share_and_its_amounts(stream: Stream) -> None:
    for number, kind in enumerate(KINDS):
        accounts = stream.kind == number
        share = kind.share * (1 - WIDE.handbook_accounts)
        assert accounts.mean() == pytest.approx(share, abs=1 / CUSTOMERS)
        amount = stream.amount[stream.of_kind(kind.name)]
        if kind.bounds is not None:
            low, high = kind.bounds
            inside = (amount >= low - 0.005) & (amount <= high + 0.005)
            assert inside.mean() > 0.95  # the others are card checks and rare large purchases
            assert low <= np.median(amount) <= high
    business = stream.amount[stream.of_kind("business")]
    assert np.quantile(business, 0.1) > 50
    assert np.quantile(business, 0.95) > 5_000
    several = stream.usual[stream.kind == [k.name for k in KINDS].index("any")]
    assert several.min() < 3
    assert several.max() > 5_000
    transit = stream.of_kind("transit")
    a_day = np.bincount(stream.account[transit], minlength=CUSTOMERS) / DAYS
    assert np.quantile(a_day[a_day > 0], 0.9) > 4
    rare = np.bincount(stream.account[stream.of_kind("rare")], minlength=CUSTOMERS)
    assert 1 <= np.median(rare[rare > 0]) <= 10  # in five months


def test_a_fleet_pays_every_few_seconds_at_times(stream: Stream) -> None:
    fleet = stream.of_kind("fleet")
    assert len(np.unique(stream.account[fleet])) >= 1
    assert fleet.sum() > 500
    pause = stream.pause_ms[fleet]
    assert 2_000 < np.median(pause) < 20_000
    assert np.quantile(pause, 0.999) > HOUR_MS


def test_accounts_begin_fall_silent_and_come_back_during_the_log(stream: Stream) -> None:
    first = stream.number == 0
    begin_day = (stream.time_ms[first] - stream.time_ms.min()) // DAY_MS
    frequent = np.bincount(stream.account, minlength=CUSTOMERS)[stream.account[first]] > 40
    assert 0.05 < (begin_day[frequent] > 20).mean() < 0.3
    # An account that usually pays daily, after three weeks or more without a payment:
    daily = np.bincount(stream.account, minlength=CUSTOMERS)[stream.account] > DAYS
    back = daily & (stream.pause_ms > SILENT_DAYS * DAY_MS)
    assert back.sum() > 50
    assert (stream.scenario[back] == LEGITIMATE).mean() > 0.8


def test_card_checks_are_mostly_honest_and_often_an_accounts_first_payment(
    stream: Stream,
) -> None:
    check = np.isin(stream.amount, (0.0, 0.01, 1.0))
    for amount in (0.0, 0.01, 1.0):
        assert (stream.amount == amount).sum() > 100
    assert 0.005 < (stream.scenario[check] > 0).mean() < 0.15
    first = stream.number == 0
    assert check[first].mean() == pytest.approx(WIDE.first_checks, abs=0.05)
    thiefs = check & np.isin(stream.scenario, (CARD_TEST, NEW_ACCOUNT))
    assert thiefs.sum() > 50


def test_honest_purchases_far_over_the_usual_are_rare(stream: Stream) -> None:
    bounded = np.isin(stream.kind[stream.account], [i for i, k in enumerate(KINDS) if k.bounds])
    honest = bounded & (stream.scenario == LEGITIMATE)
    ratio = stream.amount[honest] / stream.usual[stream.account[honest]]
    assert 1e-4 < (ratio > 6).mean() < 3e-3
    assert ratio.max() < 21
    assert stream.amount[stream.scenario == LEGITIMATE].max() < HONEST_MAX * 1.01


def test_a_card_is_tested_and_then_drained_within_the_day(stream: Stream) -> None:
    fraud = np.flatnonzero(stream.scenario == CARD_TEST)
    theft = stream.account[fraud] * 1_000 + stream.time_ms[fraud] // DAY_MS % 1_000
    tested, drained = 0, []
    for place in np.split(fraud, np.flatnonzero(np.diff(theft)) + 1):
        first, last = stream.amount[place[0]], stream.amount[place[-1]]
        assert 2 <= len(place) <= 13
        assert first <= 5.0
        tested += first in (0.0, 0.01, 1.0)
        drained.append(last / stream.usual[stream.account[place[0]]])
    assert len(drained) > 50
    assert 0.45 < tested / len(drained) < 0.75
    assert np.median(drained) > 10
    assert np.max(drained) > 100


def test_takeovers_come_after_a_silence_of_weeks(stream: Stream) -> None:
    fraud = np.flatnonzero(stream.scenario == TAKEOVER)
    before = (stream.pause_ms[fraud] > (SILENT_DAYS - 1) * DAY_MS).sum()
    incidents = len(np.unique(stream.account[fraud] * 1_000 + stream.time_ms[fraud] // DAY_MS))
    assert incidents > 20
    assert before > 0.8 * incidents  # now and then an honest payment comes first that day


def test_bursts_are_of_many_usual_payments_within_an_hour(stream: Stream) -> None:
    fraud = np.flatnonzero(stream.scenario == BURST)
    theft = stream.account[fraud] * 100_000 + stream.time_ms[fraud] // DAY_MS
    parts = np.split(fraud, np.flatnonzero(np.diff(theft)) + 1)
    assert len(parts) > 8
    for place in parts:
        assert BURST_PAYMENTS[0] <= len(place) <= BURST_PAYMENTS[1]
        assert stream.time_ms[place[-1]] - stream.time_ms[place[0]] < HOUR_MS
    ratio = stream.amount[fraud] / stream.usual[stream.account[fraud]]
    assert 0.5 < np.median(ratio) < 2


def test_small_frauds_are_under_the_usual_amount(stream: Stream) -> None:
    fraud = stream.scenario == SMALL_AMOUNTS
    assert fraud.sum() > 50
    ratio = stream.amount[fraud] / stream.usual[stream.account[fraud]]
    assert np.quantile(ratio, 0.9) < 1
    assert stream.amount[fraud].min() > 0


def test_huge_payments_are_evenly_ten_to_thousands_times_the_usual(stream: Stream) -> None:
    fraud = stream.scenario == HUGE_PAYMENT
    ratio = stream.amount[fraud] / stream.usual[stream.account[fraud]]
    assert fraud.sum() > 100
    # An account's level moves by a factor of 3 at the most.
    assert ratio.min() > 10 * 0.19
    assert np.quantile(ratio, 0.9) > 500
    assert stream.amount[fraud].max() > 50_000
    assert stream.amount[fraud].max() <= AMOUNT_MAX
    assert (stream.number[fraud] <= 20).mean() > 0.3
    assert (stream.number[fraud] > 100).sum() > 20
    assert (stream.number[fraud] == 1).any()


def test_accounts_that_a_thief_opened_have_no_honest_payment(stream: Stream) -> None:
    opened = np.unique(stream.account[stream.scenario == NEW_ACCOUNT])
    assert len(opened) > 10
    theirs = np.isin(stream.account, opened)
    assert set(stream.scenario[theirs].tolist()) == {NEW_ACCOUNT}
    begin = stream.amount[theirs & (stream.number == 0)]
    assert np.isin(begin, (0.0, 0.01, 1.0)).any()
    assert begin.max() > 50


def test_shops_are_of_all_sizes_and_some_are_compromised_in_part(stream: Stream) -> None:
    payments = np.bincount(stream.merchant, minlength=TERMINALS)
    shops = payments[round(TERMINALS * WIDE.map_terminals) :]
    assert 0.04 < shops.max() / payments.sum() < 0.2
    assert (shops < DAYS / 30).any()
    in_part = stream.scenario == MERCHANT_IN_PART
    hit = np.unique(stream.merchant[in_part])
    assert hit.min() >= round(TERMINALS * WIDE.map_terminals)
    share = np.bincount(stream.merchant[in_part], minlength=TERMINALS)[hit] / payments[hit]
    large = payments[hit] > 20 * DAYS
    assert large.any()
    assert share[large].max() < 0.15
    # A small one takes all: from its first fraud to the last nothing there is legitimate.
    small = hit[payments[hit] < DAYS]
    assert len(small) > 3
    for shop in small:
        times = stream.time_ms[(stream.merchant == shop) & in_part]
        within = (stream.merchant == shop) & (stream.time_ms >= times.min())
        assert (stream.scenario[within & (stream.time_ms <= times.max())] > 0).all()
    assert len(np.unique(stream.merchant[stream.scenario == SKIMMED_TERMINAL])) > 50


def test_some_shops_open_during_the_log(days: list[DayOfTransactions]) -> None:
    merchant = joined(days, "merchant").astype(np.int64)
    _, first = np.unique(merchant, return_index=True)
    payments = np.bincount(merchant)
    is_shop = merchant[first] >= round(TERMINALS * WIDE.map_terminals)
    busy = is_shop & (payments[merchant[first]] > DAYS / 2)
    opened = first[busy] / len(merchant)
    assert 0.05 < (opened > 0.2).mean() < 0.3


def test_an_amount_carries_no_trace_of_the_thief(stream: Stream) -> None:
    cents = np.round(stream.amount * 100).astype(np.int64)
    no_check = ~np.isin(stream.amount, (0.0, 0.01, 1.0))
    for scenario in range(1, len(SCENARIOS)):
        theirs = cents[(stream.scenario == scenario) & no_check]
        for divisor in (5, 10, 100):
            expected = len(theirs) / divisor
            assert abs((theirs % divisor == 0).sum() - expected) < 4.5 * np.sqrt(expected) + 5


def test_training_and_demo_simulate_the_wide_world_and_evaluation_the_handbooks() -> None:
    defaults = {
        name: option.default
        for name in ("train", "demo", "evaluate")
        for option in recur.commands[name].params
        if option.name == "world"
    }
    assert defaults == {
        "train": TrainingSettings().world,
        "demo": DemoOptions().world,
        "evaluate": "handbook",
    }
    assert TrainingSettings().world == DemoOptions().world == "wide"
    small = {"customers": 50, "terminals": 60, "days": 14}
    for world, first_day in (("handbook", HANDBOOK), ("wide", WIDE)):
        log = simulate(TrainingSettings(**small, world=world))  # type: ignore[arg-type]
        expected = next(Simulator(50, 60, seed=1, world=first_day).days())
        np.testing.assert_array_equal(log.amount[: len(expected)], expected.amount)


def test_the_wide_world_needs_a_shop_beside_a_terminal() -> None:
    with pytest.raises(SimulatorError, match="terminals is 1; the wide world needs 2 or more"):
        Simulator(terminals=1, world=WIDE)
    assert len(next(Simulator(customers=200, terminals=2, world=WIDE).days())) > 0
