"""Extra fields, reasons, new thresholds and `recur account`, on a real broker and Redis."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.architecture import Architecture
from model.checkpoint import Checkpoint, CheckpointThresholds, Header
from model.features.spec import ACCOUNT_INPUTS, FeatureSpec, Field, Input
from model.network import Network
from model.reasons import REASONS, REASONS_MAX
from model.stepper import sigmoid
from pipeline.admin.inspect_account import account_lines, describe, load_view
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError, StartupError
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.local.workers import WorkerProcess
from pipeline.messages.scores import Score, decode_alert
from pipeline.worker.preflight import check_services
from tests.fakes.running_pipeline import EVENT_TIME_MS, PipelineUnderTest, until

FIELDS = (
    Field("category", "categorical", ("food", "fuel")),
    Field("card age", "numeric"),
)
SCORE_TOLERANCE = 2e-3
"""Tolerance of a score that is computed again from recorded features, step by step."""


def checkpoint_with_fields(seed: int = 3, **changes: Any) -> Checkpoint:
    """Make an untrained network with a category embedding and a number that may be missing."""
    inputs = (
        *ACCOUNT_INPUTS,
        Input("card age", "linear", mean=4.0, deviation=2.0),
        Input("card age", "is_missing"),
        Input("category", "category"),
    )
    features = FeatureSpec(inputs, fields=FIELDS)
    architecture = Architecture(
        len(inputs) - 1, 8, 8, head_size=8, embeddings=((3, 2),), roles=features.roles
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(architecture)
    header: dict[str, Any] = {
        "architecture": architecture,
        "features": features,
        "thresholds": CheckpointThresholds(0.0, 1.0),
    } | changes
    return Checkpoint.of(network, Header(**header))


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    path = tmp_path / "model.safetensors"
    checkpoint_with_fields().save(path)
    return PipelineUnderTest(
        kafka.bootstrap,
        redis_server.url,
        tmp_path,
        checkpoint=path,
        checkpoint_poll_interval_seconds=0.2,
        startup_timeout_seconds=30,
    )


def record(number: int, account: str, **more: Any) -> tuple[bytes, bytes]:
    fields = {
        "transaction_id": f"t{number}",
        "account_id": account,
        "merchant_id": "m1",
        "amount": 20.0 + number,
        "currency": "EUR",
        "timestamp": EVENT_TIME_MS + number * 60_000,
    }
    return account.encode(), json.dumps(fields | more).encode()


def recomputed(checkpoint: Checkpoint, scores: list[Score]) -> list[float]:
    """Compute the scores of one account, step by step from their recorded features."""
    found = []
    hidden: NDArray[np.floating] = checkpoint.stepper.empty_hidden(1)
    for score in scores:
        raw = np.array([score.raw(checkpoint.header.features.names)], np.float32)
        logits, hidden = checkpoint.stepper.step(checkpoint.encode(raw), hidden)
        hidden = hidden.astype(np.float16)
        found.append(float(sigmoid(logits)[0]))
    return found


MORE: list[dict[str, Any]] = [
    {"category": "food", "card age": 3},
    {"category": "fuel", "card age": 9.5},
    {"category": "toys"},
    {"category": None, "card age": None},
    {"card age": -1.0},
]


def test_extra_fields_reach_the_network_and_the_score(system: PipelineUnderTest) -> None:
    async def run() -> None:
        async with system.running(workers=1):
            await system.send_records([record(i, "A", **more) for i, more in enumerate(MORE)])
            await system.send_records([record(9, "B", **{"card age": "old"})])
            await system.until_applied()
            scores = await system.scores()
            assert list(scores[0].features)[-2:] == ["category", "card age"]
            found = [(s.features["category"], s.features["card age"]) for s in scores]
            assert found == [(1, 3), (2, 9.5), (0, None), (0, None), (0, -1)]
            expected = recomputed(system.scorer.checkpoint, scores)
            assert [s.score for s in scores] == pytest.approx(expected, abs=SCORE_TOLERANCE)
            assert len({round(score, 4) for score in expected}) > 1
            (letter,) = await system.records("dead_letter")
            assert dict(letter.headers)["reason"] == b"wrong_type"
            alerts = [decode_alert(r.value) for r in await system.records("alerts")]
            assert len(alerts) == len(MORE)
            for alert in alerts:
                assert 1 <= len(alert.reasons) <= REASONS_MAX
                assert {reason.code for reason in alert.reasons} <= REASONS.keys()
            await assert_the_account_can_be_looked_at(system)

    asyncio.run(run())


async def assert_the_account_can_be_looked_at(system: PipelineUnderTest) -> None:
    lines = await account_lines(system.settings, "A")
    text = "\n".join(lines)
    assert lines[0] == "account A"
    assert "no trained account head" in text
    assert f"of model {system.scorer.checkpoint.digest}" in text
    seen = next(line for line in lines if "transactions seen" in line)
    assert seen.split()[-1] == str(len(MORE))
    with pytest.raises(RecurError, match="no state of this account"):
        await account_lines(system.settings, "B")

    fitted = system.scorer.checkpoint.with_header(metrics={"verdict_auc": 0.9})
    view = await load_view(system.settings, fitted, "A")
    hidden = torch.tensor(view.state.hidden).float()
    expected = float(torch.sigmoid(fitted.network.account_logit(hidden)))
    assert view.risk == pytest.approx(expected)
    text = "\n".join(describe(view, fitted, ttl_days=30.0))
    assert f"with probability {expected:.3f} (AUC 0.900 on days held out)" in text
    assert f"offset {view.state.last_offset[0]}" in text


async def gauge(worker: WorkerProcess, decision: str) -> float:
    await worker.refresh()
    return worker.samples[f'recur_threshold{{decision="{decision}"}}']


def test_new_thresholds_in_the_checkpoint_file_apply_without_a_restart(
    system: PipelineUnderTest,
) -> None:
    path = system.settings.checkpoint

    async def run() -> None:
        async with system.running(workers=1):
            (worker,) = system.workers
            assert await gauge(worker, "review") == 0.0
            await system.send_records([record(0, "A", **MORE[0])])
            await system.until_applied()
            load_checkpoint(system.settings).with_header(
                thresholds=CheckpointThresholds(1.0, 1.0)
            ).save(path)

            async def changed() -> bool:
                return await gauge(worker, "review") == 1.0

            await until(changed, "the worker to see the new thresholds", 30)
            await system.send_records([record(1, "A", **MORE[1])])
            await system.until_applied()

            path.write_bytes(b"not a checkpoint")
            await asyncio.sleep(1)
            checkpoint_with_fields(seed=4).with_header(
                thresholds=CheckpointThresholds(0.0, 0.1)
            ).save(path)
            await asyncio.sleep(1)
            assert await gauge(worker, "review") == 1.0, "of another model's thresholds none counts"
            text = worker.log_path.read_text()
            assert text.count("the checkpoint file is broken") == 1
            assert text.count("restart to use the new model") == 1

            decisions = [score.decision for score in await system.scores()]
            assert decisions == ["review", "approve"]
            (alert,) = [decode_alert(r.value) for r in await system.records("alerts")]
            assert alert.thresholds == {"review": 0.0, "decline": 1.0}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ({}, "card age, category"),
        ({"category": "food"}, "card age"),
        ({"category": "food", "card age": None}, None),
    ],
)
def test_a_topic_without_the_fields_of_the_checkpoint_is_rejected(
    system: PipelineUnderTest, more: dict[str, Any], missing: str | None
) -> None:
    async def run() -> None:
        checkpoint = load_checkpoint(system.settings)
        async with system.running(workers=0):
            await check_services(system.settings, checkpoint)  # an empty topic is accepted
            await system.send_records([(b"A", b"junk"), (b"B", None)])
            await check_services(system.settings, checkpoint)
            await system.send_records([record(i, f"A{i}", **more) for i in range(20)])
            if missing is None:
                await check_services(system.settings, checkpoint)
                return
            with pytest.raises(StartupError) as refused:
                await check_services(system.settings, checkpoint)
            text = str(refused.value)
            assert f"the field {missing}, and none of the last 20 transactions" in text
            assert "RECUR_CHECKPOINT" in text

    asyncio.run(run())


def test_a_field_of_every_transaction_is_no_extra_field(system: PipelineUnderTest) -> None:
    inputs = (*ACCOUNT_INPUTS, Input("merchant_id", "category"))
    spec = FeatureSpec(inputs, fields=(Field("merchant_id", "categorical", ("m1",)),))
    architecture = Architecture(
        len(ACCOUNT_INPUTS), 4, 4, head_size=4, embeddings=((2, 2),), roles=spec.roles
    )
    checkpoint = Checkpoint.of(
        Network(architecture), Header(architecture=architecture, features=spec)
    )

    with pytest.raises(StartupError, match="merchant_id as an extra field"):
        asyncio.run(check_services(system.settings, checkpoint))
