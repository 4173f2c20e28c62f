"""Faults of account states: each changes the scores as its name says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from model.architecture import Architecture
from model.checkpoint import Checkpoint, Header
from model.data.dataset import Dataset
from model.evaluation.protocol import Fold
from model.evaluation.robustness import (
    FAULTS,
    NO_FAULTS,
    Faults,
    measure_robustness,
    score_with_faults,
)
from model.features.account import Float32, observe_log
from model.features.spec import FEATURES, Encoder, FeatureSpec
from model.network import Network
from model.training.sequences import score_unrolled
from model.units import DAY_MS
from tests.fakes.datasets import rows_of

ACCOUNTS, STEPS = 12, 50


@pytest.fixture(scope="module")
def log() -> Dataset:
    """Make a log of twelve accounts that pay daily; account 0 is silent from day 15 to 49."""
    rng = np.random.default_rng(3)
    day = np.repeat(np.arange(STEPS), ACCOUNTS)
    account = np.tile(np.arange(ACCOUNTS), STEPS)
    kept = (account > 0) | (day < 15) | (day >= 49)
    day, account = day[kept], account[kept]
    return Dataset(
        account=account.astype(np.int32),
        merchant=rng.integers(0, 5, len(day)).astype(np.int32),
        amount=rng.uniform(1, 300, len(day)),
        timestamp_ms=(day + 100) * DAY_MS + account * 1000,
        label=(rng.random(len(day)) < 0.3).astype(np.int8),
        scenario=np.zeros(len(day), np.int8),
    )


@pytest.fixture(scope="module")
def raw(log: Dataset) -> Float32:
    of_account = observe_log(
        log.account.astype(np.int64), log.amount, log.timestamp_ms, FeatureSpec().scale
    )
    others = np.zeros((len(log), len(FEATURES) - of_account.shape[1]), np.float32)
    return np.hstack((of_account, others))


@pytest.fixture(scope="module")
def checkpoint(raw: Float32) -> Checkpoint:
    """Make an untrained checkpoint whose hidden state affects the score."""
    torch.manual_seed(0)
    spec = FeatureSpec().fitted(raw)
    network = Network(Architecture(len(spec.inputs), hidden_size=8, layers=2, roles=spec.roles))
    return Checkpoint.of(network, Header(architecture=network.architecture, features=spec))


def score(
    checkpoint: Checkpoint, log: Dataset, raw: Float32, faults: Faults = NO_FAULTS
) -> Float32:
    return score_with_faults(checkpoint, log, lambda rows: raw[rows], faults)


def changed(a: Float32, b: Float32) -> set[int]:
    """Return the rows whose scores differ."""
    return set(np.flatnonzero(np.abs(a - b) > 1e-6).tolist())


def test_without_faults_a_log_is_scored_as_unrolled(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    inputs = torch.from_numpy(Encoder(checkpoint.header.features).encode(raw))
    unrolled = score_unrolled(checkpoint.network, inputs, log.account.astype(np.int64))
    assert np.abs(score(checkpoint, log, raw) - unrolled).max() < 1e-5


def test_float16_changes_scores_a_little(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    exact = score(checkpoint, log, raw)
    rounded = score(checkpoint, log, raw, FAULTS[0])
    assert 0 < np.abs(rounded - exact).max() < 1e-3


def test_a_state_expires_only_after_silence(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    exact = score(checkpoint, log, raw)
    expired = score(checkpoint, log, raw, FAULTS[1])
    after_silence = np.flatnonzero((log.account == 0) & (log.day >= 49))
    assert changed(exact, expired) == set(after_silence.tolist())
    never = score(checkpoint, log, raw, Faults("later", expire_days=40.0))
    assert not changed(exact, never)


@pytest.mark.parametrize("share", ["twice_share", "lost_share"])
def test_a_fault_changes_only_the_scores_after_its_transaction(
    checkpoint: Checkpoint, log: Dataset, raw: Float32, share: str
) -> None:
    """Only later transactions of the account have another state."""
    exact = score(checkpoint, log, raw)
    some = dataclasses.replace(NO_FAULTS, **{share: 0.02})  # type: ignore[arg-type]
    hit = score(checkpoint, log, raw, some)
    first = {int(a): int(np.flatnonzero(log.account == a)[0]) for a in range(ACCOUNTS)}
    assert changed(exact, hit)
    assert not changed(exact, hit) & set(first.values())
    all_of_them = dataclasses.replace(NO_FAULTS, **{share: 1.0})  # type: ignore[arg-type]
    every = score(checkpoint, log, raw, all_of_them)
    assert not changed(exact, every) & set(first.values())


def test_a_lost_write_leaves_the_state_before_it(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    """If all writes are lost, every transaction is the first of its account."""
    lost = score(checkpoint, log, raw, Faults("all", lost_share=1.0))
    alone = dataclasses.replace(log, account=np.arange(len(log), dtype=np.int32))
    assert not changed(lost, score(checkpoint, alone, raw))


def test_a_transaction_applied_twice_is_as_if_it_had_come_twice(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    twice = score(checkpoint, log, raw, Faults("all", twice_share=1.0))
    repeated = rows_of(log, np.repeat(np.arange(len(log)), 2))
    whole = score(checkpoint, repeated, np.repeat(raw, 2, axis=0))
    assert not changed(twice, whole[::2])


def test_lost_states_are_gone_once_and_from_then_on(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    wiped_ms = 125 * DAY_MS
    exact = score(checkpoint, log, raw)
    wiped = score(checkpoint, log, raw, Faults("wipe", wiped_ms=wiped_ms))
    before = log.timestamp_ms < wiped_ms
    assert not changed(exact, wiped) & set(np.flatnonzero(before).tolist())
    # The scores equal those of a log that begins then.
    later = rows_of(log, ~before)
    anew = score(checkpoint, later, raw[~before])
    assert np.abs(wiped[~before] - anew).max() < 1e-6


def test_costs_are_measured_for_each_fault_and_week(
    checkpoint: Checkpoint, log: Dataset, raw: Float32
) -> None:
    fold = Fold("split", 100, train_until=125, test_from=126, test_until=145)
    told: list[str] = []
    found = measure_robustness(
        checkpoint, log, lambda rows: raw[rows], fold, lambda _, what: told.append(what)
    )
    assert [cost.title for cost in found.faults] == [faults.title for faults in FAULTS]
    for cost in found.faults:
        assert cost.lost == pytest.approx(found.average_precision - cost.average_precision)
    assert [week.first_day for week in found.weeks] == ["1970-05-07", "1970-05-14", "1970-05-21"]
    assert len(told) == len(FAULTS) + 2
