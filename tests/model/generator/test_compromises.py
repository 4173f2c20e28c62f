"""Frauds are told apart by whose they are: a compromised merchant's, or a thief's on an account."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import FRAUD, Dataset
from model.generator.world import ACCOUNT_FRAUD, MERCHANT_FRAUD, measure
from model.units import DAY_MS, HOUR_MS

ACCOUNTS, DAYS = 60, 120
MERCHANTS_EACH = 4


def _log(fraud: NDArray[np.bool_], account: NDArray[np.int64], day: NDArray[np.int64]) -> Dataset:
    """Make accounts that pay daily, in turn at four merchants where no other account pays."""
    rng = np.random.default_rng(0)
    merchant = account * MERCHANTS_EACH + day % MERCHANTS_EACH
    time = day * DAY_MS + rng.integers(8, 20, len(day)) * HOUR_MS
    order = np.argsort(time, kind="stable")
    label = (fraud * FRAUD).astype(np.int8)[order]
    return Dataset(
        account=account[order].astype(np.int32),
        merchant=merchant[order].astype(np.int32),
        amount=rng.uniform(1, 9, len(order)).round(2),
        timestamp_ms=time[order],
        label=label,
        scenario=label,
    )


def _days() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    account = np.repeat(np.arange(ACCOUNTS), DAYS)
    day = np.tile(np.arange(DAYS), ACCOUNTS)
    begin = np.random.default_rng(1).integers(20, 80, ACCOUNTS)[account]
    return account, day, (day >= begin) & (day < begin + 20)


def test_a_merchants_frauds_are_found_if_only_one_account_pays_there() -> None:
    account, day, within = _days()
    log = _log(within & (day % MERCHANTS_EACH == 1), account, day)
    measured = measure(log, 1)

    assert log.is_fraud.sum() == 5 * ACCOUNTS
    assert set(measured.fraud_class[log.is_fraud].tolist()) == {MERCHANT_FRAUD}
    assert measured.world["compromises"] > 0


def test_a_thief_on_an_account_pays_at_several_merchants() -> None:
    account, day, within = _days()
    log = _log(within & (day % 3 == 1), account, day)
    measured = measure(log, 1)

    assert set(measured.fraud_class[log.is_fraud].tolist()) == {ACCOUNT_FRAUD}
    assert measured.world["compromises"] == 0
