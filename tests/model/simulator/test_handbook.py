"""The simulator against the published rules and figures of the Fraud Detection Handbook."""

from __future__ import annotations

import tracemalloc
from dataclasses import fields
from itertools import islice

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from model.simulator.handbook import (
    DayOfTransactions,
    Simulator,
    SimulatorError,
    account_id,
    merchant_id,
    transaction_id,
)
from model.simulator.world import CUSTOMER_FRAUD_FACTOR
from model.transaction import Transaction

PUBLISHED_TRANSACTIONS_PER_DAY = 1_754_155 / 183
PUBLISHED_FRAUDS_BY_SCENARIO = {1: 973, 2: 9077, 3: 4631}
PUBLISHED_AMOUNT_MEAN, PUBLISHED_AMOUNT_DEVIATION = 53.63, 42.33


def first_days(days: int, **settings: int) -> list[DayOfTransactions]:
    return list(islice(Simulator(**settings).days(), days))  # type: ignore[arg-type]


def joined(days: list[DayOfTransactions], column: str) -> NDArray[np.float64]:
    return np.concatenate([getattr(day, column) for day in days])


@pytest.fixture(scope="module")
def half_a_year() -> list[DayOfTransactions]:
    return first_days(183, seed=3)


@pytest.mark.slow
def test_volume_fraud_and_amounts_are_the_published_ones(
    half_a_year: list[DayOfTransactions],
) -> None:
    scenario = joined(half_a_year, "scenario").astype(int)
    amount = joined(half_a_year, "amount")
    # Rates, means and draws differ by seed: sums over 5,000 customers by about 1 %.
    assert len(scenario) / 183 == pytest.approx(PUBLISHED_TRANSACTIONS_PER_DAY, rel=0.04)
    assert amount.mean() == pytest.approx(PUBLISHED_AMOUNT_MEAN, rel=0.04)
    assert amount.std() == pytest.approx(PUBLISHED_AMOUNT_DEVIATION, rel=0.05)
    for number, published in PUBLISHED_FRAUDS_BY_SCENARIO.items():
        assert (scenario == number).sum() == pytest.approx(published, rel=0.15)
    assert (scenario > 0).mean() == pytest.approx(14_681 / 1_754_155, rel=0.08)
    assert len(np.unique(joined(half_a_year, "account"))) >= 4950
    assert len(np.unique(joined(half_a_year, "merchant"))) >= 9990


def test_times_are_normal_around_noon_and_within_the_day(
    half_a_year: list[DayOfTransactions],
) -> None:
    for day in half_a_year[:3]:
        assert (np.diff(day.timestamp_ms) >= 0).all()
    since_start = joined(half_a_year, "timestamp_ms") - 1_522_540_800_000
    assert (
        since_start // 86_400_000 == np.repeat(np.arange(183), [len(day) for day in half_a_year])
    ).all()
    seconds = since_start % 86_400_000 / 1000
    assert seconds.mean() == pytest.approx(43_200, abs=100)
    assert seconds.std() == pytest.approx(18_188, rel=0.01)  # of the Handbook's published data


def test_each_scenario_follows_its_rule(half_a_year: list[DayOfTransactions]) -> None:
    scenario, amount = joined(half_a_year, "scenario"), joined(half_a_year, "amount")
    account, merchant = joined(half_a_year, "account"), joined(half_a_year, "merchant")
    day = np.repeat(np.arange(183), [len(d) for d in half_a_year])
    # 1: over 220, and nothing legitimate is.
    assert amount[scenario == 1].min() > 220
    assert amount[scenario == 0].max() <= 220
    assert (joined(half_a_year, "is_fraud") == (scenario > 0)).all()
    # 2: a terminal hit on a day is all fraud that day (2, or 3 where both meet), 28 days long.
    for d in (40, 150):
        hit = np.unique(merchant[(day == d) & (scenario == 2)])
        assert len(hit) == pytest.approx(56 * 0.62, abs=15)  # drawn 2 x 28; some had no payment
        assert (scenario[(day == d) & np.isin(merchant, hit)] >= 2).all()
    some = merchant[(scenario == 2) & (day == 90)][0]
    frauds_of_it = day[(merchant == some) & (scenario == 2)]
    assert frauds_of_it.max() - frauds_of_it.min() < 28 * 2
    # 3: a third of a compromised customer's transactions are larger by the factor.
    compromised = {
        (int(a), int(d)) for a, d in zip(account[scenario == 3], day[scenario == 3], strict=True)
    }
    assert len({a for a, _ in compromised}) < 3 * 183
    assert amount[scenario == 3].mean() == pytest.approx(
        CUSTOMER_FRAUD_FACTOR * amount[scenario == 2].mean(), rel=0.15
    )


def test_a_compromised_customer_has_a_third_of_its_transactions_changed() -> None:
    days = first_days(100, customers=3, terminals=1000, seed=5)  # all three, every day
    assert (joined(days, "scenario") == 3).mean() == pytest.approx(1 / 3, abs=0.06)


def test_a_customer_pays_only_within_its_reach_and_everywhere_in_it_alike() -> None:
    simulator = Simulator(customers=40, terminals=4000, seed=2)
    days = list(islice(simulator.days(), 1500))
    account, merchant = joined(days, "account").astype(int), joined(days, "merchant").astype(int)
    busiest = int(np.bincount(account).argmax())
    visits = np.bincount(merchant[account == busiest], minlength=4000)
    reached = visits[visits > 0]
    # About pi * 5**2 / 100**2 of 4000 on an open map; each with the same expectation.
    assert 5 < len(reached) < 50
    chi_square = ((reached - reached.mean()) ** 2 / reached.mean()).sum()
    assert chi_square < len(reached) + 4 * np.sqrt(2 * len(reached))


def test_the_same_seed_gives_the_same_stream_and_another_seed_another() -> None:
    first, second, other = (
        first_days(5, customers=200, terminals=500, seed=seed) for seed in (7, 7, 8)
    )
    for column in (f.name for f in fields(DayOfTransactions) if f.name != "day"):
        np.testing.assert_array_equal(joined(first, column), joined(second, column))
    assert not np.array_equal(joined(first, "timestamp_ms"), joined(other, "timestamp_ms"))


def test_the_beginning_does_not_depend_on_how_many_days_are_taken() -> None:
    simulator = Simulator(customers=200, terminals=500, seed=7)
    few, many = list(islice(simulator.days(), 3)), list(islice(simulator.days(), 40))
    for column in ("transaction_id", "timestamp_ms", "account", "merchant", "amount", "scenario"):
        np.testing.assert_array_equal(joined(few, column), joined(many[:3], column))
    ids = joined(many, "transaction_id")
    np.testing.assert_array_equal(ids, np.arange(len(ids)))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_days() -> None:
    days = Simulator(customers=1000, terminals=2000).days()
    tracemalloc.start()
    try:
        for _ in range(30):
            next(days)
        early, _ = tracemalloc.get_traced_memory()
        for _ in range(300):
            next(days)
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert late - early < 100_000  # bytes; 300 days' transactions would be 25 MB


def test_customers_out_of_every_terminals_reach_make_no_transactions() -> None:
    days = first_days(20, customers=300, terminals=2, seed=1)
    customers = np.unique(joined(days, "account"))
    assert 0 < len(customers) < 30  # two terminals reach about 1.6 % of the map


def test_ids_are_valid_in_a_transaction() -> None:
    payment = msgspec.convert(
        {
            "transaction_id": transaction_id(0),
            "account_id": account_id(4999),
            "merchant_id": merchant_id(9999),
            "amount": 0.0,
            "currency": "EUR",
            "timestamp": 1_522_540_800_000,
        },
        Transaction,
    )
    assert (payment.account_id, payment.merchant_id) == ("A0004999", "M0009999")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"customers": 0}, "customers is 0"),
        ({"terminals": 0}, "terminals is 0"),
        ({"customers": 10**9}, "customers is 1000000000"),
        ({"seed": -1}, "seed is -1"),
        ({"start_date": "1.4.2018"}, r"start_date is '1\.4\.2018'"),
        ({"start_date": "1969-12-31"}, "start_date is 1969-12-31"),
    ],
)
def test_wrong_values_are_refused_by_name(settings: dict[str, int], named: str) -> None:
    with pytest.raises(SimulatorError, match=named):
        Simulator(**settings)  # type: ignore[arg-type]
