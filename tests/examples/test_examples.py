"""Each example runs as its README says, on the real broker and Redis where it needs them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from model.checkpoint import Checkpoint
from model.training import merchant_weight_fit
from pipeline.cli.main import recur
from pipeline.files.column_mapping import load_mapping
from pipeline.files.reader import TransactionFile
from pipeline.local.services import Kafka, Redis
from tests.fakes.running_pipeline import PipelineUnderTest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
OWN_DATA = EXAMPLES / "own_data"
SENT = 5
LIMIT_SECONDS = 240.0


def run(name: str, *arguments: str) -> str:
    """Output of an example that ends well."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.iterdir():
        assert file.name in ("README.md", "__pycache__") or f"({file.name})" in listed, file.name


def test_sent_transactions_come_back_as_alerts(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    """At a threshold of 0 every score is an alert."""
    pipeline = PipelineUnderTest(
        kafka.bootstrap, redis_server.url, tmp_path, review_threshold=0.0, decline_threshold=1.0
    )
    transactions = pipeline.settings.topic("transactions")
    alerts_topic = pipeline.settings.topic("alerts")

    async def both() -> tuple[str, str]:
        async with pipeline.running(workers=1):
            producer = "send_transactions.py", kafka.bootstrap, transactions
            sent = await asyncio.to_thread(run, *producer)
            consumer = "read_alerts.py", kafka.bootstrap, alerts_topic, str(SENT)
            return sent, await asyncio.to_thread(run, *consumer)

    sent, read = asyncio.run(both())

    assert sent.count("sent") == SENT
    alerts = read.splitlines()
    assert len(alerts) == SENT
    assert all("A0000017: " in alert for alert in alerts)
    assert "2400.00" in alerts[-1]


@pytest.mark.slow
def test_the_model_alone_finds_the_payment_that_is_out_of_the_ordinary() -> None:
    lines = run("score_without_kafka.py").splitlines()

    assert [line.endswith("alert") for line in lines] == [False] * (len(lines) - 1) + [True]


def test_the_mapping_reads_every_row_of_the_csv() -> None:
    mapping = load_mapping(str(OWN_DATA / "mapping.toml"))

    parts = list(TransactionFile(OWN_DATA / "transactions.csv", mapping).parts())

    assert sum(len(part) for part in parts) == 910


@pytest.mark.slow
def test_a_model_is_trained_on_the_csv(tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    arguments = [
        *("train", str(output), "--data", str(OWN_DATA / "transactions.csv")),
        *("--columns", str(OWN_DATA / "mapping.toml"), "--label-delay-days", "2"),
        *("--hidden-size", "16", "--epochs", "1", "--no-probe"),
    ]
    # What a payment explains takes most of the time of so small a training.
    with mock.patch.object(merchant_weight_fit, "UPDATES", 40):
        recur.main(arguments, standalone_mode=False)

    features = Checkpoint.load(output).header.features
    assert [field.name for field in features.fields] == ["how_paid"]
