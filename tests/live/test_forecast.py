"""The forecast from a state in Redis is that of the offline history."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from model.features.merchant import MERCHANT_FEATURES
from model.features.spec import INPUTS
from model.forecast.answer import day_forecasts
from model.training.sequences import score_stepwise
from model.transaction import epoch_ms
from pipeline.admin.forecast_account import forecast_state, load_forecast
from pipeline.admin.inspect_account import load_view
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from tests.fakes.forecasts import with_random_forecast
from tests.fakes.memory_workers import small_checkpoint
from tests.fakes.running_pipeline import EVENT_TIME_MS, PipelineUnderTest, transactions

ACCOUNTS = 12
TOLERANCE = 0.02
"""Largest relative difference of an amount; hidden states differ by their float16 rounding."""


def test_the_forecast_of_a_live_state_is_that_of_the_offline_history(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    with_random_forecast(small_checkpoint(inputs=INPUTS)).save(path)
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, checkpoint=path)
    checkpoint = load_checkpoint(system.settings)
    sent = transactions(600, ACCOUNTS)
    asked_ms = EVENT_TIME_MS + 3 * 86_400_000

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent)
            await system.until_applied()
            scores = {score.transaction_id: score for score in await system.scores()}
            names = sorted({t.account_id for t in sent})
            others = np.array(
                [scores[t.transaction_id].raw(MERCHANT_FEATURES) for t in sent], np.float32
            )
            _, history, hidden = score_stepwise(
                checkpoint,
                np.array([names.index(t.account_id) for t in sent]),
                np.array([t.amount for t in sent]),
                np.array([epoch_ms(t.timestamp) for t in sent]),
                others,
            )
            assert checkpoint.forecaster is not None
            offline = checkpoint.forecaster.forecast(
                history, hidden, np.full(len(names), asked_ms), 30
            )
            for row, name in enumerate(names):
                view = await load_view(system.settings, checkpoint, name)
                live = forecast_state(checkpoint, name, view.state, asked_ms, 30)
                assert live.transactions_seen == history.count[row]
                for mine, its in zip(live.days, day_forecasts(offline, row), strict=True):
                    assert mine.date == its.date
                    assert mine.expected_payments == pytest.approx(
                        its.expected_payments, rel=TOLERANCE, abs=2e-3
                    )
                    assert mine.silent == pytest.approx(its.silent, abs=TOLERANCE)
                    for level in ("p10", "p50", "p95"):
                        assert getattr(mine.amount, level) == pytest.approx(
                            getattr(its.amount, level), rel=TOLERANCE, abs=0.1
                        )
            now = await load_forecast(system.settings, names[0], 5)
            assert len(now.days) == 5
            with pytest.raises(RecurError, match="no state of this account"):
                await load_forecast(system.settings, "nobody", 5)

    asyncio.run(run())
