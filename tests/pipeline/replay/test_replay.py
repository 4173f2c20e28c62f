"""A person's file goes through broker and worker, and the report shows the real result."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.errors import RecurError, SettingsError
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.local.workers import start_worker, stop_all, until_ready
from pipeline.replay.replay import INTERRUPTED, ReplayOptions, run_replay
from pipeline.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[3]
START_MS = round(datetime(2018, 8, 1, tzinfo=UTC).timestamp() * 1000)


def environment_for(kafka: Kafka, redis_server: Redis) -> dict[str, str]:
    name = uuid.uuid4().hex[:8]
    return {
        "RECUR_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        "RECUR_REDIS_URL": redis_server.url,
        "RECUR_TOPIC_PREFIX": f"{name}-",
        "RECUR_KAFKA_GROUP_ID": f"group-{name}",
        "RECUR_REDIS_KEY_PREFIX": f"recur-{name}",
        "RECUR_TOPIC_PARTITIONS": "4",
    }


def settings_for(environment: dict[str, str]) -> Settings:
    fields = {name.removeprefix("RECUR_").lower(): value for name, value in environment.items()}
    return load_settings(**fields)


@pytest.fixture(scope="module")
def worker(
    kafka: Kafka, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Settings of a running worker, as environment variables."""
    environment = environment_for(kafka, redis_server)
    process = start_worker(1, tmp_path_factory.mktemp("worker"), environment)
    try:
        asyncio.run(until_ready([process], 60))
        yield environment
    finally:
        asyncio.run(stop_all([process]))


def handbook_file(directory: Path, rows: int, **changes: Any) -> Path:
    """Write transactions in the Handbook's columns, one a minute; every 20th is a large fraud."""
    rng = np.random.default_rng(rows)
    fraud = np.arange(rows) % 20 == 19
    prefix = uuid.uuid4().hex[:8]
    columns: dict[str, Any] = {
        "TRANSACTION_ID": [f"{prefix}-{number}" for number in range(rows)],
        "TX_DATETIME": pa.array(START_MS + 60_000 * np.arange(rows)).cast(pa.timestamp("ms")),
        "CUSTOMER_ID": rng.integers(0, 40, rows),
        "TERMINAL_ID": rng.integers(0, 90, rows),
        "TX_AMOUNT": np.where(fraud, 900.0, rng.integers(5, 60, rows)),
        "TX_FRAUD": fraud.astype(np.int8),
        "TX_FRAUD_SCENARIO": fraud.astype(np.int8),
    }
    path = directory / f"{prefix}.parquet"
    pq.write_table(pa.table(columns | changes), path)
    return path


def replayed(options: ReplayOptions, settings: Settings) -> tuple[int, str]:
    """Replay and return the exit code and the output, with single spaces."""
    file = io.StringIO()
    code = run_replay(options, settings, Console(file=file, width=200))
    return code, re.sub(" +", " ", file.getvalue())


def test_the_report_shows_the_real_result(worker: dict[str, str], tmp_path: Path) -> None:
    path = handbook_file(tmp_path, 2000)
    code, text = replayed(ReplayOptions(path, "handbook", report=True), settings_for(worker))

    assert code == 0, text
    assert "sent 2,000 transactions" in text
    assert "scored 2,000 of 2,000 transactions" in text
    assert "not scored 0" in text
    assert "scored twice 0" in text
    assert "measured over 2,000 rows, 100 frauds (5.00%)" in text
    flagged = int(re.findall(r"flagged ([\d,]+) \(", text)[0].replace(",", ""))
    alerts = int(re.findall(r"; ([\d,]+) alerts", text)[0].replace(",", ""))
    assert flagged == alerts >= 50  # 900 is a large amount for the shipped model
    assert float(re.findall(r"AP ([\d.]+)", text)[0]) > 0.5
    assert re.search(r"scenario 1 [\d.]+% of 100 flagged", text)


def test_warm_rows_are_scored_without_alerts(worker: dict[str, str], tmp_path: Path) -> None:
    path = handbook_file(tmp_path, 400)
    options = ReplayOptions(path, "handbook", warm=True, report=True, report_skip_days=0)
    code, text = replayed(options, settings_for(worker))

    assert code == 0, text
    assert "scored 400 of 400" in text
    assert "; 0 alerts published" in text


def test_rows_sent_twice_are_reported_as_dropped(worker: dict[str, str], tmp_path: Path) -> None:
    path = handbook_file(tmp_path, 30)
    options = ReplayOptions(path, "handbook", report=True)
    assert replayed(options, settings_for(worker))[0] == 0

    code, text = replayed(options, settings_for(worker))

    assert code == 1
    assert "not scored 30 dropped: the accounts' states have their transaction ids" in text


def test_rejected_rows_are_reported_by_reason(worker: dict[str, str], tmp_path: Path) -> None:
    path = handbook_file(tmp_path, 20)
    mapping = (ROOT / "pipeline" / "files" / "mappings" / "handbook.toml").read_text()
    dollars = tmp_path / "dollars.toml"
    dollars.write_text(mapping.replace('"EUR"', '"USD"'))
    code, text = replayed(ReplayOptions(path, str(dollars), report=True), settings_for(worker))

    assert code == 0
    assert "scored 0 of 20" in text
    assert "not scored 20 rejected for currency" in text


def test_a_limit_a_speed_and_a_rate_are_kept(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    path = handbook_file(tmp_path, 500)
    settings = settings_for(environment_for(kafka, redis_server))
    at_speed = ReplayOptions(path, "handbook", limit=101, speed=6_000)  # a row a minute: 100/s
    at_rate = ReplayOptions(path, "handbook", limit=101, rate=100)
    for options in (at_speed, at_rate):
        started = time.monotonic()
        code, text = replayed(options, settings)
        assert code == 0
        assert "sent 101 transactions" in text
        assert time.monotonic() - started >= 1.0


def test_without_workers_the_report_names_the_missing_scores(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.replay.report.STALL_SECONDS", 3.0)
    path = handbook_file(tmp_path, 10)
    options = ReplayOptions(path, "handbook", report=True)
    code, text = replayed(options, settings_for(environment_for(kafka, redis_server)))

    assert code == 1
    assert "10 had no score when no score came for 3 s: see that workers of this group" in text


def test_an_unusable_row_stops_the_replay_and_can_be_skipped(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    amounts = [5.0] * 9 + [-1.0]
    path = handbook_file(tmp_path, 10, TX_AMOUNT=amounts)
    settings = settings_for(environment_for(kafka, redis_server))

    with pytest.raises(RecurError, match="row 10: amount is negative"):
        replayed(ReplayOptions(path, "handbook"), settings)
    code, text = replayed(ReplayOptions(path, "handbook", skip_unusable=True), settings)

    assert code == 0
    assert "sent 9 transactions" in text
    assert "skipped 1 rows" in text
    assert "row 10: amount is negative" in text


def test_ctrl_c_stops_the_feed_and_shows_the_number_sent(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    path = handbook_file(tmp_path, 10_000)
    replay = (
        "import sys; from pathlib import Path; from pipeline.settings import load_settings;"
        "from pipeline.replay.replay import ReplayOptions, run_replay;"
        f"options = ReplayOptions(Path({str(path)!r}), 'handbook', rate=100);"
        "sys.exit(run_replay(options, load_settings()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", replay],
        cwd=ROOT,
        env=os.environ | environment_for(kafka, redis_server),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if " sending, 0 " not in line)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=240)

    assert process.returncode == INTERRUPTED
    sent = int(re.findall(r"stopped; sent +([\d,]+) transactions", text)[0].replace(",", ""))
    assert 0 < sent < 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 5.0, "speed": 2.0}, "exclude each other"),
        ({"rate": 0.0}, "--rate is 0"),
        ({"speed": float("inf")}, "--speed is inf"),
        ({"limit": -1}, "--limit is -1"),
        ({"offset_days": float("nan")}, "--offset-days is nan"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ReplayOptions(Path("file"), "handbook", **options)
