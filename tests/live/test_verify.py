"""`recur verify` and `recur state` on a real broker and Redis, while workers run and after."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete
from rich.console import Console

from pipeline.admin.inspect_state import shown_lines, state_at
from pipeline.audit.report import run_verify
from pipeline.audit.verifier import HIDDEN_TOLERANCE, SCORE_TOLERANCE, VerifyOptions, verify
from pipeline.checkpoint import load_checkpoint
from pipeline.cli import main as cli
from pipeline.errors import RecurError, StartupError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.services import Kafka, Redis
from pipeline.messages.scores import Score
from pipeline.storage.keys import Keys
from pipeline.storage.state_store import redis_client
from tests.fakes.memory_verify import NoBar
from tests.fakes.running_pipeline import PipelineUnderTest, transactions

TOGETHER = 2_000
ACCOUNTS = 120


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    return PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path)


class Faults:
    """What no worker does, done to a system's Redis and scores topic."""

    def __init__(self, system: PipelineUnderTest) -> None:
        settings = system.settings
        self._system = system
        self._keys = Keys(
            settings.redis_key_prefix,
            system.scorer.checkpoint.digest,
            settings.topic("transactions"),
        )
        self.client = redis_client(settings)

    def key(self, partition: int, account: str) -> bytes:
        return self._keys.accounts(partition, [account])[0]

    async def publish(self, score: Score) -> None:
        partition = int(score.source.rsplit(":", 2)[1])
        settings = self._system.settings
        async with AIOKafkaProducer(**settings.kafka_client_options()) as producer:
            topic, key = settings.topic("scores"), score.account_id.encode()
            await producer.send_and_wait(topic, msgspec.json.encode(score), key, partition)

    async def delete_records(self, role: Any, partition: int, before: int) -> None:
        place = TopicPartition(self._system.settings.topic(role), partition)
        admin = AIOKafkaAdminClient(**self._system.settings.kafka_client_options())
        await admin.start()
        try:
            await admin.delete_records({place: RecordsToDelete(before_offset=before)})
        finally:
            await admin.close()


def place_of(score: Score) -> tuple[int, int]:
    """Partition and offset of a score's transaction."""
    _, partition, offset = score.source.rsplit(":", 2)
    return int(partition), int(offset)


def test_a_real_run_is_verified_while_it_runs_and_each_fault_afterwards(
    system: PipelineUnderTest,
) -> None:
    """The numbers of a log that a worker applied, of what is done to it, and of the past."""
    sent = transactions(2 * TOGETHER, ACCOUNTS)
    settings, checkpoint = system.settings, load_checkpoint(system.settings)

    async def found(**options: Any) -> Any:
        return await verify(settings, checkpoint, VerifyOptions(**options), NoBar())

    async def run() -> None:
        async with system.running(workers=1):
            await system.send_records([(b"A000001", b"not a transaction")])
            await system.send(sent[:TOGETHER])
            await system.send(sent[TOGETHER - 1 : TOGETHER])  # as a producer that tries again does
            await system.until_applied()
            faults = Faults(system)
            try:
                await run_on(faults)
            finally:
                await faults.client.aclose()

    async def run_on(faults: Faults) -> None:
        first_half = await system.scores()
        watched = first_half[-1].account_id
        partition = place_of(first_half[-1])[0]
        before = await faults.client.get(faults.key(partition, watched))
        await asyncio.sleep(0.05)
        half_ms = time.time_ns() // 1_000_000
        await asyncio.sleep(0.05)

        # while it runs
        sending = asyncio.create_task(system.send(sent[TOGETHER:], rate=1_500))
        while not sending.done():
            live = await found()
            assert live.is_right, live
            assert live.accounts == live.right >= ACCOUNTS - 1
        await sending
        await system.until_applied()
        assert live.records >= TOGETHER

        # afterwards, all of it
        whole = await found()
        assert whole.is_right
        assert (whole.records, whole.transactions) == (2 * TOGETHER + 2, 2 * TOGETHER)
        assert whole.scores == 2 * TOGETHER
        assert whole.accounts == whole.right == len({t.account_id for t in sent})
        assert whole.largest_hidden <= HIDDEN_TOLERANCE
        assert (await found(from_ms=half_ms)).scores == TOGETHER

        # the past: what Redis held then
        past = await state_at(settings, checkpoint, watched, half_ms, NoBar())
        codec = system.scorer.codec
        held, _, _ = codec.decode([before])
        assert past.partition == partition
        assert past.is_complete
        assert past.is_applied
        assert past.state.last_offset[0] == held.last_offset[0]
        assert np.array_equal(past.state.recent_ids, held.recent_ids)
        difference = past.state.hidden.astype("f4") - held.hidden.astype("f4")
        assert np.abs(difference).max() <= HIDDEN_TOLERANCE
        with pytest.raises(RecurError, match="has no transaction of this account up to then"):
            await state_at(settings, checkpoint, watched, 1_000, NoBar())
        shown = "\n".join(await shown_lines(settings, watched))
        assert faults.key(partition, watched).decode() in shown
        assert "0 records before the log's end" in shown

        # a state that is another, one that is damaged, one that is gone
        mine = [s for s in first_half if place_of(s)[0] == partition and s.account_id != watched]
        damaged, gone = sorted({s.account_id for s in mine})[:2]
        assert before is not None
        keys = [faults.key(partition, account) for account in (watched, damaged, gone)]
        values = [await faults.client.get(key) for key in keys]
        await faults.client.set(keys[0], before)
        await faults.client.setrange(keys[1], 100, b"\x00\x01\x02")
        await faults.client.delete(keys[2])
        wrong = await found()
        assert {d.account_id: d.what for d in wrong.differences} == {
            watched: "its last transaction is another",
            damaged: "of another format or damaged",
            gone: "no state in Redis",
        }
        assert wrong.right == wrong.accounts - 3
        code, text, report = await asyncio.to_thread(reported, system, VerifyOptions())
        assert code == 1
        assert "NOT what the log says" in text
        assert watched in text
        assert report["found"]["different_accounts"] == 3
        for key, value in zip(keys, values, strict=True):
            await faults.client.set(key, value)

        # a score twice, and another one for the same transaction
        score = first_half[-1]
        await faults.publish(score)
        await faults.publish(msgspec.structs.replace(score, score=score.score + 0.25))
        contradicted = await found()
        assert (contradicted.duplicate, contradicted.conflicting) == (1, 1)
        assert contradicted.first_conflicting == place_of(score)
        assert contradicted.different_accounts == 0
        assert not contradicted.is_right
        assert not (await found(account=watched)).is_right
        assert (await found(account=damaged)).is_right

        # what retention deletes can be verified no more, and what it leaves can
        cut = min(place_of(s)[1] for s in mine[len(mine) // 2 :])
        await faults.delete_records("transactions", partition, cut)
        begun = {s.account_id for s in mine if place_of(s)[1] < cut} | {watched}
        partial = await found()
        assert {account for account, _, _ in partial.unverifiable} == begun
        assert partial.accounts == partial.right == whole.accounts - len(begun)
        code, text, _ = await asyncio.to_thread(reported, system, VerifyOptions(sample=20))
        assert "unverifiable" in text

    asyncio.run(run())


def reported(system: PipelineUnderTest, options: VerifyOptions) -> tuple[int, str, Any]:
    """Exit code, printed text and JSON."""
    text = io.StringIO()
    file = system.directory / "verified.json"
    code = run_verify(options, system.settings, file, Console(file=text, width=200))
    return code, text.getvalue(), json.loads(file.read_text())


def test_what_is_not_there_is_said_in_one_line(kafka: Kafka, system: PipelineUnderTest) -> None:
    """No topic, another count of partitions, no Redis, no broker."""
    checkpoint = load_checkpoint(system.settings)

    async def run(**changed: Any) -> None:
        settings = system.settings.model_copy(update={"startup_timeout_seconds": 1.0, **changed})
        await verify(settings, checkpoint, VerifyOptions(), NoBar())

    with pytest.raises(StartupError, match=r"there is no topic .*-transactions at"):
        asyncio.run(run())
    asyncio.run(ensure_topics(system.settings))
    other = system.settings.model_copy(update={"scores_topic": "few", "topic_partitions": 1})
    asyncio.run(ensure_topics(other.model_copy(update={"transactions_topic": "few-in"})))
    with pytest.raises(StartupError, match=r"has 4 partitions and .*-few has 1"):
        asyncio.run(run(scores_topic="few"))
    with pytest.raises(RecurError, match="Redis does not answer"):
        asyncio.run(run(redis_url="redis://127.0.0.1:1/0"))
    with pytest.raises(StartupError, match="no Kafka broker answers"):
        asyncio.run(run(kafka_bootstrap_servers="127.0.0.1:1"))


def test_the_command_s_defaults_are_the_measured_tolerances() -> None:
    """The command line states numbers of its own, so that it need not import what computes."""
    defaults = {
        parameter.name: parameter.default
        for parameter in cli.verify.params
        if isinstance(parameter, click.Option)
    }
    assert defaults["tolerance_hidden"] == HIDDEN_TOLERANCE
    assert defaults["tolerance_score"] == SCORE_TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["verify", "--account", "A", "--sample", "3"], "--account or --sample, not both"),
        (["verify", "--from", "yesterday"], "--from is no time"),
        (["state", "at", "A", "--time", "2024-05-31T18:00:00"], "--time is no time"),
    ],
)
def test_a_wrong_option_ends_with_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is asked of broker or Redis."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err
