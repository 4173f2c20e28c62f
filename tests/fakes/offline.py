"""Comparison of the running system with offline computing, on a log with late labels.

Transactions and the labels that arrive in the same three hours are sent through Kafka, and the
next bucket follows once the workers have applied all of it, as it does where three hours are three
hours. What comes out must be what :func:`model.training.sequences.score_stepwise` computes of the
log.

    python -m tests.fakes.offline FILE --columns handbook --every 10
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from model.architecture import Architecture
from model.checkpoint import Checkpoint, Header
from model.features.account import observe_log
from model.features.amount_scale import AmountScale
from model.features.merchant import (
    MERCHANT_FEATURES,
    Labels,
    bucket_of,
    observe_merchant_log,
)
from model.features.spec import Encoder, FeatureSpec, payment_columns, ranges_of
from model.network import Network
from model.training import merchant_weight_fit
from model.training.sequences import score_stepwise
from pipeline.files.column_mapping import load_mapping
from pipeline.files.reader import TransactionFile
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.replay.labels import encode_labels
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, encode_block
from pipeline.replay.simulated import CURRENCY, SimulatedStream
from tests.fakes.running_pipeline import PipelineUnderTest, until

DAY_MS = 86_400_000
OWN_UPDATES = 400
"""Training steps of the merchant weights: a tenth of a real training."""

TOLERANCE = 2e-3
"""Scores that differ by at most this count as equal.

Hidden states are float16, and the last bits of a matrix product depend on its size."""


@dataclass
class Log:
    """Transactions in order of time; ids are a letter and a number."""

    transaction: list[str]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    timestamp_ms: NDArray[np.int64]
    is_fraud: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.account)

    @classmethod
    def simulated(cls, transactions: int, customers: int, terminals: int, seed: int) -> Log:
        """Make a log with the project's simulator."""
        stream = SimulatedStream(customers, terminals, "2021-03-01", seed)
        columns = stream.take(transactions).columns
        return cls(
            [f"t{i}" for i in range(transactions)],
            columns.account,
            columns.merchant,
            columns.amount,
            columns.timestamp_ms,
            columns.scenario > 0,
        )

    @classmethod
    def of_file(cls, path: Path, columns: str, every: int, limit: int) -> Log:
        """Make a log from a file with labels, with a sample of its accounts."""
        parts = list(TransactionFile(path, load_mapping(columns)).parts())
        names = [name for part in parts for name in part.account_ids]
        account = np.unique(names, return_inverse=True)[1]
        merchant = np.unique(
            [name for part in parts for name in part.merchant_ids], return_inverse=True
        )[1]
        kept = np.flatnonzero(account % every == 0)[:limit]
        labels = np.concatenate([part.labels for part in parts if part.labels is not None])
        ids = [name for part in parts for name in part.transaction_ids]
        return cls(
            [ids[i] for i in kept.tolist()],
            account[kept],
            merchant[kept],
            np.concatenate([part.amounts for part in parts])[kept],
            np.concatenate([part.timestamps_ms for part in parts])[kept],
            labels[kept] == 1,
        )

    def transactions(self, rows: NDArray[np.intp]) -> Block:
        """Return the transactions to send."""
        return encode_block(
            [self.transaction[i] for i in rows.tolist()],
            [f"C{account}" for account in self.account[rows].tolist()],
            [f"T{merchant}" for merchant in self.merchant[rows].tolist()],
            self.amount[rows].tolist(),
            [CURRENCY] * len(rows),
            self.timestamp_ms[rows].tolist(),
        )

    def labels(self, rows: NDArray[np.intp], delay_ms: int) -> Block:
        """Return the labels of transactions to send."""
        return encode_labels(
            [self.transaction[i] for i in rows.tolist()],
            [f"C{account}" for account in self.account[rows].tolist()],
            [f"T{merchant}" for merchant in self.merchant[rows].tolist()],
            self.is_fraud[rows],
            self.timestamp_ms[rows],
            self.timestamp_ms[rows] + delay_ms,
            "parity",
        )


def random_checkpoint(log: Log, merchant_raw: NDArray[np.float32], seed: int = 1) -> Checkpoint:
    """Make a small untrained network that uses accounts and merchants; inputs are standardised.

    Its merchant weights are fitted, so that they differ between frauds.
    """
    scale = AmountScale.of(log.account, log.amount)
    raw = np.hstack((observe_log(log.account, log.amount, log.timestamp_ms, scale), merchant_raw))
    features = FeatureSpec(scale=scale)
    features = msgspec.structs.replace(features, ranges=ranges_of(raw, features)).fitted(raw)
    architecture = Architecture(
        inputs=len(features.inputs),
        input_size=32,
        hidden_size=32,
        layers=1,
        head_size=32,
        dropout=0.0,
        roles=features.roles,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(architecture)
    with torch.no_grad():
        network.logit.weight *= 4
    own = torch.from_numpy(Encoder(features).encode(raw)[:, payment_columns(features.roles)])
    with mock.patch.object(merchant_weight_fit, "UPDATES", OWN_UPDATES):
        network.own = merchant_weight_fit.fit_merchant_weight(
            lambda rows: own[torch.from_numpy(rows)], log.is_fraud, own.shape[1], seed
        )
    return Checkpoint.of(network, Header(architecture=architecture, features=features))


@dataclass
class Parity:
    """Differences between the running system's scores and those computed offline.

    Attributes:
        scores, offline: float32[N].
        merchant_raw, offline_merchant_raw: float32[N, M].
        seconds: time of the workers.
        weights: number of distinct merchant weights of the log's frauds.
    """

    scores: NDArray[np.float32]
    offline: NDArray[np.float32]
    merchant_raw: NDArray[np.float32]
    offline_merchant_raw: NDArray[np.float32]
    seconds: float
    buckets: int
    labels: int
    weights: int

    @property
    def largest_difference(self) -> float:
        """Largest difference of a score."""
        return float(np.abs(self.scores - self.offline).max())

    @property
    def features_that_differ(self) -> int:
        """Number of merchants' features that differ."""
        return int((self.merchant_raw != self.offline_merchant_raw).sum())

    def __str__(self) -> str:
        return (
            f"{len(self.scores):,} transactions, {self.labels:,} labels, {self.buckets:,} buckets"
            f" in {self.seconds:.1f} s: scores {self.offline.min():.3f} to"
            f" {self.offline.max():.3f}, largest difference {self.largest_difference:.2e};"
            f" {self.features_that_differ:,} merchant features differ"
        )


@dataclass
class _Sent:
    transactions: int = 0
    labels: int = 0


async def compare(
    system: PipelineUnderTest,
    log: Log,
    checkpoint: Checkpoint,
    merchant_raw: NDArray[np.float32],
    progress: Callable[[str], None] = lambda text: None,
) -> Parity:
    """Send the log through the system with this checkpoint, and compare."""
    delay_ms = checkpoint.header.features.label_delay_ms
    started = time.monotonic()
    async with system.running(workers=1):
        buckets, labels = await _send(system, log, delay_ms, progress)
        seconds = time.monotonic() - started
        found = {score.transaction_id: score for score in await system.scores()}
    offline, _, _ = score_stepwise(
        checkpoint, log.account, log.amount, log.timestamp_ms, merchant_raw
    )
    scores = [found[name] for name in log.transaction]
    return Parity(
        np.array([score.score for score in scores], np.float32),
        offline,
        np.array([score.raw(MERCHANT_FEATURES) for score in scores], np.float32),
        merchant_raw,
        seconds,
        buckets,
        labels,
        len(np.unique(merchant_weights(log, checkpoint)[log.is_fraud])),
    )


async def _send(
    system: PipelineUnderTest, log: Log, delay_ms: int, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Send the log bucket by bucket; return the numbers of buckets and labels."""
    in_bucket = bucket_of(log.timestamp_ms)
    frauds = np.flatnonzero(log.is_fraud)
    known_in = bucket_of(log.timestamp_ms[frauds] + delay_ms)
    sent = _Sent()

    async def applied() -> bool:
        for worker in system.workers:
            await worker.refresh()
        return _total(system, "recur_transactions_total") == sent.transactions and (
            _total(system, "recur_labels_total") == sent.labels
        )

    async with (
        Feed(system.settings) as transactions,
        Feed(system.settings, "labels") as labels,
    ):
        first, last = int(in_bucket[0]), int(in_bucket[-1])
        for bucket in range(first, last + 1):
            start, stop = np.searchsorted(in_bucket, (bucket, bucket + 1)).tolist()
            arrived = frauds[known_in == bucket]
            if len(arrived):
                block = log.labels(arrived, delay_ms)
                await labels.send(block.keys, block.values)
                sent.labels += len(arrived)
            for at in range(start, stop, BLOCK_TRANSACTIONS):
                block = log.transactions(np.arange(at, min(stop, at + BLOCK_TRANSACTIONS)))
                await transactions.send(block.keys, block.values)
                sent.transactions += len(block.keys)
            await until(applied, f"bucket {bucket - first} to be applied", pause_seconds=0.01)
            progress(f"{bucket - first + 1:,} of {last - first + 1:,} buckets")
    return last - first + 1, sent.labels


def _total(system: PipelineUnderTest, name: str) -> float:
    return sum(
        value
        for worker in system.workers
        for sample, value in worker.samples.items()
        if sample == name or sample.startswith(name + "{")
    )


def offline_merchant_raw(
    log: Log, delay_ms: int, weight: NDArray[np.uint8] | None = None
) -> NDArray[np.float32]:
    """Compute merchants' features of the log, float32[N, M].

    Args:
        weight: uint8[N], merchant weights; None: the full weight.
    """
    labels = Labels.delayed(log.is_fraud, log.timestamp_ms, delay_ms, weight)
    return observe_merchant_log(log.merchant, log.timestamp_ms, labels, delay_ms)


def merchant_weights(log: Log, checkpoint: Checkpoint) -> NDArray[np.uint8]:
    """Compute merchant weights of the log's transactions, uint8[N]."""
    scale = checkpoint.header.features.scale
    raw = observe_log(log.account, log.amount, log.timestamp_ms, scale)
    raw = np.hstack((raw, np.zeros((len(log), len(MERCHANT_FEATURES)), np.float32)))
    return checkpoint.stepper.merchant_weight(checkpoint.encode(raw))


def run(
    bootstrap: str,
    redis_url: str,
    directory: Path,
    log: Log,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Parity:
    """Compare on these services, with a random checkpoint if none is given."""
    if checkpoint is None:
        unweighed = offline_merchant_raw(log, FeatureSpec().label_delay_ms)
        checkpoint = random_checkpoint(log, unweighed)
    weight = merchant_weights(log, checkpoint)
    merchant_raw = offline_merchant_raw(log, checkpoint.header.features.label_delay_ms, weight)
    path = directory / "checkpoint.safetensors"
    checkpoint.save(path)
    system = PipelineUnderTest(bootstrap, redis_url, directory, checkpoint=path, **settings)
    return asyncio.run(compare(system, log, checkpoint, merchant_raw, progress))


def main() -> int:
    """Run the command line; return 0 if scores and features are equal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", type=Path, help="transactions with their truth (parquet or CSV)")
    parser.add_argument("--columns", required=True, help="column mapping: a file or `handbook`")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth account")
    parser.add_argument("--limit", type=int, default=100_000, help="transactions")
    parser.add_argument("--checkpoint", type=Path, help="default: an untrained network")
    options = parser.parse_args()
    log = Log.of_file(options.file, options.columns, options.every, options.limit)
    checkpoint = Checkpoint.load(options.checkpoint) if options.checkpoint else None
    with ExitStack() as stack:
        kafka, redis = stack.enter_context(Kafka()), stack.enter_context(Redis())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def show(text: str) -> None:
            sys.stderr.write(f"\r{text}   ")

        parity = run(kafka.bootstrap, redis.url, directory, log, checkpoint, show)
    sys.stderr.write("\n")
    print(parity)
    return int(parity.largest_difference > TOLERANCE or parity.features_that_differ > 0)


if __name__ == "__main__":
    sys.exit(main())
