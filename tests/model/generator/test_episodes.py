"""Episodes of fraud are found, their sizes are drawn, and generated episodes have them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from model.data.dataset import FRAUD, Dataset
from model.generator.episodes import EPISODE_QUANTILES, draw_size, find_episodes
from model.generator.generator import FORMAT_WITHOUT_EPISODES, Generator
from model.generator.grids import SLOTS
from model.generator.memory import SINCE_STATES, Memory, since_state_of
from model.generator.stream import HistoryStream, Wish, generated_dataset
from model.generator.unroller import GeneratedTransactions
from model.generator.world import ACCOUNT_FRAUD, measure
from model.units import DAY_MS, HOUR_MS
from tests.model.generator.small_generator import log_with_fields, small_generator

ACCOUNTS, DAYS, RATE = 40, 120, 1.0
BURST = 8
EVEN_WEEK = np.linspace(0, 7, 7 * SLOTS + 1)


def _log(in_bursts: bool) -> Dataset:
    """Make accounts with one payment a day at noon, and 8 frauds between one and half past three.

    Without bursts, the frauds are eight of the payments at noon.
    """
    day = np.tile(np.arange(DAYS), ACCOUNTS)
    account = np.repeat(np.arange(ACCOUNTS), DAYS)
    time = day * DAY_MS + 12 * HOUR_MS
    fraud = (day >= 50) & (day < 50 + BURST)
    if in_bursts:
        night = np.arange(BURST) * 20 * 60_000 + 50 * DAY_MS + HOUR_MS
        time = np.append(time, np.tile(night, ACCOUNTS))
        account = np.append(account, np.repeat(np.arange(ACCOUNTS), BURST))
        fraud = np.append(np.zeros(len(day), bool), np.ones(ACCOUNTS * BURST, bool))
    order = np.argsort(time, kind="stable")
    label = (fraud * FRAUD).astype(np.int8)[order]
    return Dataset(
        account=account[order].astype(np.int32),
        merchant=np.zeros(len(order), np.int32),
        amount=np.ones(len(order)),
        timestamp_ms=time[order],
        label=label,
        scenario=label,
    )


def test_the_frauds_that_are_left_count_down_in_each_episode() -> None:
    log = _log(in_bursts=True)
    fraud = log.label == FRAUD
    found = find_episodes(log, fraud, np.zeros(ACCOUNTS), EVEN_WEEK, np.random.default_rng(0))

    for account in range(ACCOUNTS):
        rows = fraud & (log.account == account)
        assert found.left[rows].tolist() == list(range(BURST - 1, -1, -1))
    assert not found.left[~fraud].any()
    share = np.linspace(0, 0.999, 500)
    sizes = draw_size(found.slope, found.sizes, np.zeros(500), share)
    assert set(sizes.tolist()) == {BURST}


def test_only_frauds_beside_the_owners_payments_have_a_rhythm() -> None:
    rng = np.random.default_rng(0)
    rate = np.full(ACCOUNTS, np.log(RATE))
    beside, among = (
        find_episodes(log, log.label == FRAUD, rate, EVEN_WEEK, rng).rhythm
        for log in (_log(in_bursts=True), _log(in_bursts=False))
    )

    assert 2 <= beside.argmax() < 9
    assert beside.max() > 10 * np.median(beside)
    assert not among.any()


def test_the_state_is_calm_after_an_episodes_last_fraud() -> None:
    log = log_with_fields()
    measured = measure(log, 1)
    memory = Memory(measured.world, measured.profiles, measured.start_ms, 0)
    rows = np.arange(3)
    memory._frauds[rows], memory._fraud_ms[rows] = 2, DAY_MS
    memory._left[rows] = [0, 1, 40]
    soon, late = (memory.fraud_state(rows, np.full(3, at)) for at in (DAY_MS + 1, 40 * DAY_MS))

    assert (since_state_of(soon) == SINCE_STATES - 1).tolist() == [True, False, False]
    assert len(set(soon.tolist())) == 3
    assert set(late.tolist()) == {int(soon[0])}  # given up


def test_generated_episodes_have_the_sizes_that_were_planned() -> None:
    generator = small_generator()
    planned = dataclasses.replace(
        generator.world,
        episode_slope=np.zeros(1),
        episode_sizes=np.full(EPISODE_QUANTILES, np.log(6.0)),
    )
    weights = dict(generator.weights)
    weights["fraud_state"] = np.where(
        since_state_of(np.arange(len(weights["fraud_state"]))) < SINCE_STATES - 1, 6.0, -9.0
    ).astype(np.float32)
    weights["fraud_state"][0] = -3.0
    weights |= {name: np.zeros_like(weights[name]) for name in ("fraud.weight", "fraud_slot")}
    made = Generator(generator.header, weights, planned, generator.density)
    stream = HistoryStream(made, Wish(200, 60, seed=3, given={"defrauded": 1.0}), 1)
    log = GeneratedTransactions.joined(list(stream.parts()))
    count = np.bincount(log.account[log.fraud == ACCOUNT_FRAUD], minlength=200)

    begun = count[count > 0]
    assert len(begun) > 50
    assert np.mean(begun % 6 == 0) > 0.8  # the others go on when the histories end


def test_a_file_of_the_older_format_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    generator = small_generator()
    world = dataclasses.replace(
        generator.world,
        **{f"episode_{name}": np.zeros(0) for name in ("slope", "sizes", "rhythm")},
    )
    header = type(generator.header)(
        **{
            name: getattr(generator.header, name)
            for name in generator.header.__struct_fields__
            if name != "format_version"
        },
        format_version=FORMAT_WITHOUT_EPISODES,
    )
    old = Generator(header, generator.weights, world, generator.density)
    path = tmp_path / "old.safetensors"
    old.save(path)
    loaded = Generator.load(path)

    assert loaded.digest == old.digest
    assert b"episode" not in path.read_bytes()
    assert len(generated_dataset(HistoryStream(loaded, Wish(20, 30, seed=1), 1))) > 0
