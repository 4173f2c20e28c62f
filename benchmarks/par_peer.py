r"""Histories by DeepEcho's PAR, as a peer of `recur evaluate-generator`.

In an environment of its own:

    python -m venv par && par/bin/pip install '.[evaluate]' deepecho==0.8.1
    par/bin/python -m benchmarks.par_peer transactions.parquet handbook FOLDER
    recur evaluate-generator FOLDER/real.parquet --columns FOLDER/real.parquet.mapping.toml \
        --peer FOLDER/peer.parquet

PAR is slow, so it learns the first payments of some accounts, and `real.parquet` has as many
payments of every account. Its accounts are among those that train the generator, with the same
seed. PAR knows no merchants: it learns whether a payment is at a merchant seen before. Which one is
drawn here, new ones by the data's popularity; both favour it.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.generator.train import accounts_of
from model.torch_threads import one_thread
from model.units import DAY_MS, HOUR_MS
from pipeline.files.column_mapping import load_mapping
from pipeline.files.generated import MAPPING_SUFFIX
from pipeline.files.training_data import FileData

MODULE = "deepecho.models.par"
LEAST_HOURS = 1 / 60
GAP_MOST_HOURS = 24.0 * 60
KINDS = ["continuous", "continuous", "categorical", "categorical"]
"""Kinds of a step's numbers: logarithm of the gap, amount, whether the merchant was seen, fraud."""

MAPPING = """[columns]
transaction_id = "transaction_id"
account_id = "account_id"
merchant_id = "merchant_id"
amount = "amount"
timestamp = "timestamp"
currency = "currency"
label = "label"
"""


def first_payments(log: Dataset, steps: int) -> Dataset:
    """Return the first payments of every account, without extra fields."""
    row = np.lexsort((log.timestamp_ms, log.account))
    length = np.bincount(log.account)
    place = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    rows = np.sort(row[place < steps])
    names = ("account", "merchant", "amount", "timestamp_ms", "label", "scenario")
    columns: dict[str, Any] = {name: np.asarray(getattr(log, name)[rows]) for name in names}
    return dataclasses.replace(log, **columns, numeric={}, categorical={}, texts={})


def sequences(log: Dataset, start_ms: int) -> list[dict[str, Any]]:
    """Return each account's steps as PAR takes them; the context is its mean amount and rate."""
    days = (int(log.timestamp_ms[-1]) - start_ms) / DAY_MS
    found = []
    for account in np.unique(log.account):
        rows = np.flatnonzero(log.account == account)
        gap = np.diff(log.timestamp_ms[rows], prepend=start_ms) / HOUR_MS
        merchants = log.merchant[rows]
        seen = np.ones(len(rows), np.int64)
        seen[np.unique(merchants, return_index=True)[1]] = 0
        steps = [np.log(gap + LEAST_HOURS), log.amount[rows], seen, log.is_fraud[rows].astype(int)]
        context = [float(np.log(log.amount[rows].mean() + 0.01)), float(np.log(len(rows) / days))]
        found.append({"context": context, "data": [step.tolist() for step in steps]})
    return found


def dataset_of(samples: list[list[list[Any]]], real: Dataset, start_ms: int, seed: int) -> Dataset:
    """Return PAR's samples as a data set, with merchants drawn for them."""
    rng = np.random.default_rng(seed)
    parts: list[NDArray[np.float64]] = []
    for account, (gap, amount, seen, fraud) in enumerate(samples):
        hours = np.exp(np.array(gap, float)) - LEAST_HOURS
        hours = np.clip(np.nan_to_num(hours, posinf=GAP_MOST_HOURS), 0, GAP_MOST_HOURS)
        visited: list[int] = []
        for again in seen:
            place = rng.integers(len(visited)) if again and visited else None
            drawn = real.merchant[rng.integers(len(real))] if place is None else visited[place]
            visited.append(int(drawn))
        parts.append(
            np.stack(
                (
                    np.full(len(gap), account),
                    np.array(visited),
                    np.round(np.maximum(np.array(amount, float), 0), 2),
                    start_ms + np.cumsum(hours * HOUR_MS).astype(np.int64),
                    np.array([float(f or 0) for f in fraud]),
                ),
                1,
            )
        )
    table = np.concatenate(parts)
    table = table[np.argsort(table[:, 3], kind="stable")]
    label = table[:, 4].astype(np.int8)
    return Dataset(
        account=table[:, 0].astype(np.int32),
        merchant=np.unique(table[:, 1], return_inverse=True)[1].astype(np.int32),
        amount=table[:, 2],
        timestamp_ms=table[:, 3].astype(np.int64),
        label=label,
        scenario=label,
        currency=real.currency,
    )


def write(log: Dataset, path: Path) -> None:
    """Write a data set in the form of `recur generate`, with its mapping beside."""
    table = pa.table(
        {
            "transaction_id": [f"T{number:010d}" for number in range(len(log))],
            "account_id": [f"A{code:08d}" for code in log.account.tolist()],
            "merchant_id": [f"M{code:08d}" for code in log.merchant.tolist()],
            "amount": log.amount,
            "currency": [log.currency] * len(log),
            "timestamp": pa.array(log.timestamp_ms).cast(pa.timestamp("ms", "UTC")),
            "label": log.is_fraud.astype(np.int8),
        }
    )
    pq.write_table(table, path, compression="zstd")
    path.with_name(path.name + MAPPING_SUFFIX).write_text(MAPPING, encoding="utf-8")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("columns")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--accounts", default=300, show_default=True, help="accounts that PAR learns")
@click.option("--steps", default=64, show_default=True, help="first payments of each")
@click.option("--epochs", default=20, show_default=True)
@click.option("--seconds", default=180.0, show_default=True, help="longest time of sampling")
@click.option("--seed", default=1, show_default=True, help="as of `recur evaluate-generator`")
def main(
    file: Path,
    columns: str,
    folder: Path,
    accounts: int,
    steps: int,
    epochs: int,
    seconds: float,
    seed: int,
) -> None:
    """Fit PAR and write its histories beside the real ones that it is compared with."""
    try:
        par = importlib.import_module(MODULE)
    except ImportError as error:
        raise SystemExit(
            f"{error}: install deepecho, see the head of {Path(__file__).name}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        log = FileData(file, load_mapping(columns)).write(Path(work) / "data", lambda *_: None)
        real = first_payments(log, steps)
    write(real, folder / "real.parquet")
    start_ms = int(real.timestamp_ms[0]) // DAY_MS * DAY_MS
    chosen = np.random.default_rng(seed).permutation(np.unique(real.account))[:accounts]
    known = sequences(accounts_of(real, chosen), start_ms)
    count = sum(len(sequence["data"][0]) for sequence in known)
    model = par.PARModel(epochs=epochs, sample_size=1, cuda=False, verbose=False)
    with one_thread():
        began = time.monotonic()
        model.fit_sequences(known, KINDS[:2], KINDS)
        print(f"fitted {count:,} payments in {time.monotonic() - began:.0f} s")
        began, samples = time.monotonic(), []
        for sequence in known:
            if time.monotonic() - began > seconds:
                break
            length = len(sequence["data"][0])
            samples.append(model.sample_sequence(sequence["context"], sequence_length=length))
    made = dataset_of(samples, real, start_ms, seed)
    rate = len(made) / (time.monotonic() - began)
    write(made, folder / "peer.parquet")
    print(
        f"{folder}: {len(made):,} payments of {len(samples)} accounts by PAR, {rate:.0f}/s,"
        f" {made.is_fraud.mean():.2%} of them fraud"
    )


if __name__ == "__main__":
    main()
