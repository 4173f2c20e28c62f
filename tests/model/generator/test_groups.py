"""Where everybody pays everywhere, groups of merchants decide amounts, tastes and frauds."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.generator.fields import measure_fields
from model.generator.settings import GeneratorSettings
from model.generator.stream import HistoryStream, Wish, generated_dataset
from model.generator.train import train_generator
from model.generator.world import measure
from model.units import DAY_MS

ACCOUNTS, DAYS, PAYMENTS, BURSTS = 100, 80, 16_000, 70
PRICES = np.array([5.0, 20.0, 80.0, 320.0])
SHOPS = 10
"""Shops of a category."""
TASTE = 8.0
"""Concentration of the accounts' tastes: the smaller, the more they differ."""


@cache
def shops_of_everybody() -> Dataset:
    """Make payments at shops in four categories, each with a price; frauds come in runs."""
    rng = np.random.default_rng(0)
    account = rng.integers(0, ACCOUNTS, PAYMENTS)
    taste = rng.dirichlet(np.full(4, TASTE / 4), ACCOUNTS)
    category = (taste.cumsum(1)[account] < rng.random(PAYMENTS)[:, None]).sum(1).clip(max=3)
    time = rng.integers(0, DAYS * DAY_MS // 1000, PAYMENTS) * 1000
    burst = np.repeat(np.arange(BURSTS), 6)
    begin = rng.integers(0, (DAYS - 1) * DAY_MS // 1000, BURSTS)[burst] * 1000
    account = np.append(account, rng.integers(0, ACCOUNTS, BURSTS)[burst])
    category = np.append(category, np.full(len(burst), 3))
    time = np.append(time, begin + rng.integers(0, 7200, len(burst)) * 1000)
    fraud = np.arange(len(time)) >= PAYMENTS
    amount = PRICES[category] * np.exp(rng.normal(0, 0.2, len(time))) * np.where(fraud, 4, 1)
    shop = rng.choice(SHOPS, len(time), p=np.arange(1, SHOPS + 1) / 55)
    order = np.argsort(time, kind="stable")
    label = fraud[order].astype(np.int8)
    return Dataset(
        account=account[order].astype(np.int32),
        merchant=(category * SHOPS + shop)[order].astype(np.int32),
        amount=np.round(amount[order], 2),
        timestamp_ms=time[order].astype(np.int64),
        label=label,
        scenario=label.copy(),
        categorical={
            "category": category[order].astype(np.int32),
            "parity": (shop % 2)[order].astype(np.int32),
        },
        texts={"category": ["a", "b", "c", "d"], "parity": ["even", "odd"]},
    )


@cache
def generated() -> Dataset:
    """Train for some seconds on these payments, and generate as many accounts."""
    settings = GeneratorSettings(hidden_size=12, head_size=12, epochs=2)
    generator = train_generator(shops_of_everybody(), settings)
    return generated_dataset(HistoryStream(generator, Wish(ACCOUNTS, DAYS, seed=2)))


def test_the_field_that_says_most_about_amounts_makes_the_groups() -> None:
    found = measure_fields(shops_of_everybody())

    leading = [field.name for field in found.fields if field.groups]
    assert leading == ["category"]
    assert len(set(found.group[:SHOPS].tolist())) == 1
    assert len(set(found.group.tolist())) == 4


def test_shops_without_regulars_are_hubs_and_tastes_are_measured() -> None:
    log = shops_of_everybody()
    extra = measure_fields(log)
    measured = measure(log, 1, extra.group, extra.groups)

    assert measured.is_hub.mean() > 0.9
    assert TASTE / 2 < measured.world["group_concentration"] < TASTE * 2


def test_amounts_follow_the_group_of_the_merchant() -> None:
    real, made = shops_of_everybody(), generated()
    for category in range(4):
        ratio = _median(made, category) / _median(real, category)
        assert 0.6 < ratio < 1.6, (category, ratio)


def test_accounts_have_tastes_as_different_as_the_real_ones() -> None:
    real, made = _tastes(shops_of_everybody()), _tastes(generated())

    assert 0.6 < made.std(0).mean() / real.std(0).mean() < 1.6


def test_frauds_come_in_runs_as_often_as_the_real_ones() -> None:
    real, made = shops_of_everybody(), generated()

    assert 0.4 < made.is_fraud.mean() / real.is_fraud.mean() < 2.5
    assert 0.5 < _run(made) / _run(real) < 2
    assert (_categories(made)[made.is_fraud] == 3).mean() > 0.7


def _categories(log: Dataset) -> NDArray[np.int64]:
    """Return the categories, 0 to 3: the codes of a generated log have an order of their own."""
    place = np.array(["abcd".index(text) for text in log.texts["category"]])
    return np.asarray(place[log.categorical["category"]])


def _median(log: Dataset, category: int) -> float:
    rows = (_categories(log) == category) & ~log.is_fraud
    return float(np.median(log.amount[rows]))


def _tastes(log: Dataset) -> NDArray[np.float64]:
    """Return each account's shares of the categories."""
    legitimate = ~log.is_fraud
    cell = log.account[legitimate] * 4 + _categories(log)[legitimate]
    counts = np.bincount(cell, minlength=4 * ACCOUNTS).reshape(-1, 4)
    return np.asarray((counts / counts.sum(1, keepdims=True))[counts.sum(1) >= 50])


def _run(log: Dataset) -> float:
    """Return the mean length of the runs of frauds."""
    row = np.lexsort((log.timestamp_ms, log.account))
    fraud, account = log.is_fraud[row], log.account[row]
    begins = fraud.copy()
    begins[1:] &= ~fraud[:-1] | (np.diff(account) != 0)
    return float(fraud.sum() / begins.sum())
