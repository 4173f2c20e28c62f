"""The parts of the benchmark that decide what its figures mean."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.alert_share import REVIEW_SHARE, chosen_thresholds
from benchmarks.bench import PEERS, Point, Steady, accounts_only, make_topics, steady
from benchmarks.latency import PollCosts
from benchmarks.peers.batch_scorer import BatchScorer, PeerSettings, Score
from benchmarks.results import Rounds
from benchmarks.score_times import ScoreTimes, read_score_times
from benchmarks.tail import BrokerPause, Pause, broker_pauses, pauses
from benchmarks.traffic import blocks, first
from model.features.account import ACCOUNT_FEATURES, rounds_of
from pipeline.checkpoint import load_checkpoint
from pipeline.kafka.topics import TopicRole
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.replay.producer import Block, Feed, ahead
from pipeline.settings import Settings, load_settings


def test_the_network_of_accounts_alone_sees_no_merchant() -> None:
    shipped = load_checkpoint(load_settings())

    alone = accounts_only(shipped)

    features = alone.header.features
    assert {item.feature for item in features.inputs} <= set(ACCOUNT_FEATURES)
    assert alone.network.architecture.inputs == len(features.inputs)
    assert alone.network.architecture.hidden_size == shipped.network.architecture.hidden_size


def test_a_round_of_a_peer_holds_an_account_once_and_in_log_order() -> None:
    found = [part.tolist() for part in rounds_of(np.array([0, 1, 0, 2, 0]))]

    assert found == [[0, 1, 3], [2], [4]]


def test_the_size_of_a_peers_batch_leaves_no_trace(redis_server: Redis, tmp_path: Path) -> None:
    checkpoint = tmp_path / "accounts.safetensors"
    accounts_only(load_checkpoint(load_settings())).save(checkpoint)
    block = next(first(blocks(), 300))
    values = [value.replace(key, key[-1:]) for key, value in zip(*block[:2], strict=True)]

    def scores(batch: int) -> list[float]:
        group = f"peer-{uuid.uuid4().hex}"
        scorer = BatchScorer(PeerSettings("", redis_server.url, group, "", "", str(checkpoint)))
        found = [
            scored
            for at in range(0, len(values), batch)
            for part in [values[at : at + batch]]
            for scored in scorer.score(part, ["source"] * len(part))
        ]
        return [msgspec.json.decode(value, type=Score).score for _, value in found]

    assert scores(100) == pytest.approx(scores(7), abs=1e-3)


def test_a_score_is_as_old_as_its_payment_when_the_broker_appends_it(kafka: Kafka) -> None:
    settings = load_settings(
        kafka_bootstrap_servers=kafka.bootstrap, topic_prefix=f"{uuid.uuid4().hex[:8]}-"
    )
    delay_seconds = 0.3

    async def measure() -> ScoreTimes:
        await make_topics(settings)
        payments = await publish(settings, "transactions", [b"{}", b"{}"])
        await asyncio.sleep(delay_seconds)
        source = f"{settings.topic('transactions')}:{payments}:1"
        score = msgspec.json.encode({"source": source, "score": 0.25})
        await publish(settings, "scores", [score])
        begin = dict.fromkeys(range(settings.topic_partitions), 0)
        return await read_score_times(settings, begin, begin)

    times = asyncio.run(measure())

    assert times.scores.tolist() == [0.25]
    assert times.latency_ms[0] >= delay_seconds * 1000 - 1


async def publish(settings: Settings, role: TopicRole, values: list[bytes]) -> int:
    """Publish values with one key; return their partition."""
    async with Feed(settings, role) as feed:
        await feed.run(ahead([Block([b"key"] * len(values), values)]))
    return next(iter(feed.count.first_offsets))


def test_a_rate_leaves_out_the_start() -> None:
    points = [Point(5, 0.0, 9.0), Point(20, 2.0, 9.5), Point(100, 10.0, 9.9)]

    assert steady(points, 100) == pytest.approx(Steady(rate=10.0, cpu_us=5_000.0))


def test_a_ratio_is_one_of_the_same_round() -> None:
    found = Rounds()
    for recur, peer in ((10, 5), (40, 10), (9, 3)):
        found.add("Recur", recur)
        found.add("peer", peer)

    assert found.ratio("Recur", "peer") == 3.0


def test_the_cost_of_a_poll_is_a_line() -> None:
    fixed_ms, each_us = PollCosts([1.0, 5.0, 11.0], [2.1, 2.5, 3.1]).line()

    assert fixed_ms == pytest.approx(2.0)
    assert each_us == pytest.approx(100.0)


def test_the_thresholds_alert_on_the_wanted_share() -> None:
    scores = np.random.default_rng(0).random(100_000)

    chosen = chosen_thresholds("a test", scores)

    assert (scores >= chosen["review_threshold"]).mean() == pytest.approx(REVIEW_SHARE)
    assert chosen["decline_threshold"] >= chosen["review_threshold"]


def test_slow_payments_that_follow_each_other_are_one_pause() -> None:
    created = np.array([0, 10, 20, 30, 500])
    scored = np.array([5, 90, 95, 35, 600])

    found = list(pauses(ScoreTimes(created, scored, np.zeros(5))))

    assert found == [Pause(10, 95, 2, 80), Pause(500, 600, 1, 100)]


def test_the_brokers_pauses_are_read_from_its_collectors_log(tmp_path: Path) -> None:
    log = tmp_path / "collector.log"
    log.write_text(
        "[1700000000000ms] Using Serial\n"
        "[1700000001234ms] GC(0) Pause Young (Allocation Failure) 4M->1M(15M) 4.821ms\n"
        "[1700000009000ms] GC(1) Pause Full (Metadata GC Threshold) 9M->2M(15M) 61.500ms\n"
    )

    assert broker_pauses(log) == [
        BrokerPause(1_700_000_001_234, 4.821),
        BrokerPause(1_700_000_009_000, 61.5),
    ]
    assert broker_pauses(tmp_path / "none") == []


def test_every_peers_job_is_there() -> None:
    folder = Path(__file__).parents[1] / "benchmarks/peers"
    named = {
        word.partition(":")[0].rpartition(".")[2]
        for arguments in PEERS.values()
        for word in arguments
        if word.startswith("benchmarks.peers.")
    }

    assert named == {"bytewax_job", "quix_job", "stock_faust"}
    assert all((folder / f"{name}.py").exists() for name in named)
