"""Labelled data set unlike the simulator's: fraud in bursts, and extra fields.

    python -m benchmarks.bursts FOLDER            # writes transactions.parquet and mapping.toml
    recur train model.safetensors --data FOLDER/transactions.parquet --columns FOLDER/mapping.toml

It has 1.7 million transactions of two years, by 1,000 accounts at 700 merchants in 14 categories,
with positions and ages. Half a per cent is fraud, in bursts of a day or two on one account. Frauds
come mostly at night, in some categories more often, with typical amounts of fraud.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

# name, share of legitimate payments, median and log-deviation of legitimate amounts,
# share of frauds, mean and deviation of fraudulent amounts
CATEGORIES = (
    ("gas_transport", 0.13, 62, 0.25, 0.08, 12, 4),
    ("grocery_pos", 0.12, 105, 0.45, 0.22, 310, 25),
    ("home", 0.10, 45, 0.8, 0.03, 255, 25),
    ("shopping_pos", 0.09, 30, 1.4, 0.11, 860, 90),
    ("kids_pets", 0.09, 45, 0.8, 0.03, 20, 5),
    ("shopping_net", 0.07, 25, 1.5, 0.22, 1000, 100),
    ("entertainment", 0.07, 45, 0.9, 0.03, 500, 60),
    ("food_dining", 0.07, 40, 0.8, 0.02, 120, 10),
    ("personal_care", 0.07, 35, 0.8, 0.03, 26, 6),
    ("health_fitness", 0.06, 42, 0.8, 0.02, 20, 4),
    ("misc_pos", 0.06, 22, 1.2, 0.03, 220, 40),
    ("misc_net", 0.05, 30, 1.3, 0.12, 800, 70),
    ("grocery_net", 0.03, 48, 0.4, 0.02, 12, 3),
    ("travel", 0.03, 10, 1.6, 0.02, 9, 2),
)
ACCOUNTS = 1000
MERCHANTS = 700
TRANSACTIONS = 1_700_000
DAYS = 730
BURSTS = 950
START = np.datetime64("2019-01-01T00:00:00", "s")
NIGHT_SHARE_OF_FRAUD = 0.85

MAPPING = """[columns]
transaction_id = "trans_num"
account_id = "cc_num"
merchant_id = "merchant"
amount = "amt"
timestamp = "trans_date_trans_time"
category = "category"
label = "is_fraud"

[constants]
currency = "USD"

[fields]
numeric = ["lat", "long", "merch_lat", "merch_long", "distance", "city_pop", "age"]
categorical = ["job"]
"""

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Habits:
    """How n accounts pay when no thief does.

    Attributes:
        preference: [n, 14] share of each category of :data:`CATEGORIES`.
        rate: [n] payments, in any unit.
        spending: [n] factor of all amounts.
    """

    preference: Float64
    rate: Float64
    spending: Float64

    @classmethod
    def drawn(cls, rng: np.random.Generator, accounts: int) -> Habits:
        """Draw the habits of accounts; :func:`transactions` begins with this draw."""
        shares = np.array([c[1] for c in CATEGORIES])
        return cls(
            preference=rng.dirichlet(shares / shares.sum() * 30, accounts),
            rate=rng.gamma(2.0, 1.0, accounts) + 0.15,
            spending=rng.lognormal(0, 0.25, accounts),
        )


def transactions(
    accounts: int = ACCOUNTS,
    count: int = TRANSACTIONS,
    days: int = DAYS,
    bursts: int = BURSTS,
    seed: int = 0,
) -> pa.Table:
    """Make the data set, in order of time."""
    rng = np.random.default_rng(seed)
    habits = Habits.drawn(rng, accounts)

    account = rng.choice(accounts, count, p=habits.rate / habits.rate.sum())
    chance = rng.random(count)
    category = (habits.preference.cumsum(axis=1)[account] < chance[:, None]).sum(axis=1)
    category = np.minimum(category, len(CATEGORIES) - 1)
    median, spread = (np.array([c[i] for c in CATEGORIES], np.float64) for i in (2, 3))
    amount = np.exp(rng.normal(0, 1, count) * spread[category]) * median[category]
    amount *= habits.spending[account]
    second = rng.integers(0, days, count) * 86_400 + _seconds_of_day(rng, count)

    fraud_account, fraud_second, fraud_category, fraud_amount = _bursts(rng, accounts, days, bursts)
    account = np.append(account, fraud_account)
    second = np.append(second, fraud_second)
    category = np.append(category, fraud_category)
    amount = np.append(amount, fraud_amount)
    is_fraud = np.arange(len(account)) >= count
    order = np.argsort(second, kind="stable")
    account, second, category = account[order], second[order], category[order]
    merchant = _merchants(rng, category)
    place = rng.uniform((30, -120), (48, -75), (accounts, 2))[account]
    merchant_place = place + rng.uniform(-1, 1, place.shape)
    return pa.table(
        {
            "trans_num": np.arange(len(account)),
            "trans_date_trans_time": START + second.astype("timedelta64[s]"),
            "cc_num": account + 4_000_000_000_000_000,
            "merchant": pa.array([f"merchant {m}" for m in range(MERCHANTS)]).take(
                pa.array(merchant)
            ),
            "category": pa.array([c[0] for c in CATEGORIES]).take(pa.array(category)),
            "amt": np.round(np.maximum(amount[order], 1.0), 2),
            "lat": place[:, 0],
            "long": place[:, 1],
            "merch_lat": merchant_place[:, 0],
            "merch_long": merchant_place[:, 1],
            "distance": np.hypot(*(merchant_place - place).T),
            "city_pop": np.round(rng.lognormal(8, 2, accounts))[account],
            "age": rng.integers(18, 90, accounts)[account],
            "job": pa.array([f"job {j}" for j in range(400)]).take(
                pa.array(rng.integers(0, 400, accounts)[account])
            ),
            "is_fraud": is_fraud[order].astype(np.int8),
        }
    )


def _seconds_of_day(rng: np.random.Generator, count: int) -> Int64:
    """Draw times of day for legitimate payments: by day and evening, some at any hour."""
    at = rng.normal(15.5, 4.0, count) * 3600
    any_hour = rng.random(count) < 0.25
    at[any_hour] = rng.uniform(0, 86_400, int(any_hour.sum()))
    return (at % 86_400).astype(np.int64)


def _bursts(
    rng: np.random.Generator, accounts: int, days: int, bursts: int
) -> tuple[Int64, Int64, Int64, Float64]:
    """Draw account, second, category and amount of the frauds."""
    size = rng.integers(6, 14, bursts)
    burst = np.repeat(np.arange(bursts), size)
    account = rng.integers(0, accounts, bursts)[burst]
    day = rng.integers(0, days - 3, bursts)[burst] + rng.integers(0, 2, len(burst))
    night = rng.random(len(burst)) < NIGHT_SHARE_OF_FRAUD
    hour = np.where(night, rng.uniform(22, 28, len(burst)), rng.uniform(10, 22, len(burst)))
    share, mean, deviation = (np.array([c[i] for c in CATEGORIES], np.float64) for i in (4, 5, 6))
    category = rng.choice(len(CATEGORIES), len(burst), p=share / share.sum())
    amount = rng.normal(mean[category], deviation[category])
    return account, (day * 86_400 + hour * 3600).astype(np.int64), category, amount


def _merchants(rng: np.random.Generator, category: Int64) -> Int64:
    """Draw merchants: fifty for each category, some more popular than others."""
    each = MERCHANTS // len(CATEGORIES)
    popularity = rng.dirichlet(np.full(each, 3.0))
    return category * each + rng.choice(each, len(category), p=popularity)


def main(folder: Path) -> None:
    """Write the data set and its column mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    table = transactions()
    pq.write_table(table, folder / "transactions.parquet")
    (folder / "mapping.toml").write_text(MAPPING)
    print(
        f"{folder}: {table.num_rows:,} transactions, {sum(table['is_fraud'].to_pylist()):,} frauds"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
