"""Protocols: the rows that train a network and the rows that test it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from model.data.dataset import Dataset
from model.evaluation.protocol import (
    Fold,
    ProtocolError,
    day_of,
    days_of,
    handbook_folds,
    iso_date,
    split_fold,
)
from model.units import DAY_MS

FIRST = day_of("2018-04-01")


def a_log(days: int = 183, fraud_every: int = 5, fraud_days: int = 1000) -> Dataset:
    """Make a log of one transaction a day at noon, each of another account."""
    n = np.arange(days)
    return Dataset(
        account=n.astype(np.int32),
        merchant=np.zeros(days, np.int32),
        amount=np.ones(days),
        timestamp_ms=(FIRST + n) * DAY_MS + DAY_MS // 2,
        label=((n % fraud_every == 0) & (n < fraud_days)).astype(np.int8),
        scenario=np.zeros(days, np.int8),
    )


def test_the_default_split_of_the_handbooks_days_is_the_stated_one() -> None:
    fold = split_fold(a_log())
    assert fold.describe() == "trained to 2018-06-30, tested 2018-07-08 to 2018-09-30"
    log = a_log()
    day = days_of(log)
    warm = day_of("2018-04-08")  # 91 days train: a thirteenth warms up, a thirteenth validates
    assert day[fold.learned_rows(log)].tolist() == list(range(warm, fold.train_until - 7))
    assert day[fold.validated_rows(log)].tolist() == [fold.train_until - n for n in range(7, 0, -1)]
    assert day[fold.trained_rows(log)].tolist() == list(range(warm, fold.train_until))
    assert len(fold.tested_rows(log)) == 85
    assert fold.end_row(log) == len(log)


def test_a_transaction_without_a_label_is_neither_learned_from_nor_measured() -> None:
    log = a_log()
    fold = split_fold(log)
    unknown = dataclasses.replace(log, label=np.where(np.arange(len(log)) % 3, log.label, -1))
    for rows in (fold.trained_rows, fold.learned_rows, fold.validated_rows, fold.tested_rows):
        assert (rows(unknown) % 3 > 0).all()
        assert len(rows(unknown)) < len(rows(log))


def test_the_handbooks_folds_step_back_by_weeks_and_learn_from_all_days_before() -> None:
    folds = handbook_folds(a_log())
    assert [f.describe() for f in folds] == [
        "trained to 2018-07-31, tested 2018-08-08 to 2018-08-14",
        "trained to 2018-08-07, tested 2018-08-15 to 2018-08-21",
        "trained to 2018-08-14, tested 2018-08-22 to 2018-08-28",
        "trained to 2018-08-21, tested 2018-08-29 to 2018-09-04",
    ]
    assert {f.log_from for f in folds} == {FIRST}
    assert iso_date(folds[-1].known_from or 0) == "2018-08-15"


def test_a_card_leaves_the_test_when_its_fraud_is_known_and_not_before() -> None:
    """Training is on days 10 to 16 and the test on days 24 to 30; labels take 7 days."""
    transactions = [
        # day, account, fraud
        (9, 1, True),  # before the training week: not known
        (10, 2, True),  # in it: known from the first test day on
        (16, 3, True),  # its last day: known on day 24
        (17, 4, True),  # in the delay: known on day 25
        (20, 5, True),  # known on day 28
        (20, 5, True),
        (25, 6, True),  # in the test: would be known on day 33
        *((day, account, False) for day in range(24, 31) for account in range(1, 8)),
    ]
    transactions.sort(key=lambda t: t[0])
    day, account, fraud = (np.array(column) for column in zip(*transactions, strict=True))
    log = Dataset(
        account=account.astype(np.int32),
        merchant=np.zeros(len(day), np.int32),
        amount=np.ones(len(day)),
        timestamp_ms=day * DAY_MS,
        label=fraud.astype(np.int8),
        scenario=np.zeros(len(day), np.int8),
    )
    fold = Fold("by hand", 0, train_until=17, test_from=24, test_until=31, known_from=10)
    rows = fold.tested_rows(log)
    days_left = {
        int(card): np.unique(day[rows][account[rows] == card]).tolist() for card in range(1, 8)
    }
    whole = list(range(24, 31))
    assert days_left == {
        1: whole,
        2: [],
        3: [],
        4: [24],
        5: [24, 25, 26, 27],
        6: whole,
        7: whole,
    }


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        ({"train_until": "2018-07-02", "test_from": "2018-07-04"}, "test from 2018-07-09 or later"),
        ({"train_until": "2019-07-01"}, "the log has the days 2018-04-01 to 2018-09-30"),
        ({"test_until": "2018-10-02"}, "choose other dates"),
        ({"train_until": "30.6.2018"}, "is no date such as"),
    ],
)
def test_impossible_dates_are_rejected_with_advice(dates: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        split_fold(a_log(), **dates)


def test_a_period_of_one_class_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"0 of the \d+ transactions of the test are fraud"):
        split_fold(a_log(fraud_days=90), train_until="2018-07-01")


def test_a_log_without_the_handbooks_days_is_refused() -> None:
    with pytest.raises(ProtocolError, match="choose other dates"):
        handbook_folds(a_log(days=60))
