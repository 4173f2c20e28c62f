"""Faults in their short form, and proof that their counts find violations."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from click.testing import CliRunner

from pipeline.local.kafka import Kafka
from pipeline.local.ports import HOST
from pipeline.local.redis import Redis
from pipeline.storage.account_state import StateCodec
from pipeline.storage.client import redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.state_store import RedisStateStore, Save
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID
from tests.fakes.memory_verify import NoBar
from tests.faults.__main__ import main
from tests.faults.fault import Fault, Row, Shared, run_fault
from tests.faults.harness import Harness, Mark, NoEffectError
from tests.faults.input import Undecodable
from tests.faults.invariants import topic_records
from tests.faults.kafka import BrokerKilled, TopicRecreated
from tests.faults.proxy import Proxy
from tests.faults.redis import Eviction, RedisClusterFailover, RedisEmpty, require_loss
from tests.faults.registry import FAULTS
from tests.faults.workers import Sigkill, Zombie
from tests.faults.workload import NO_TRANSACTION, ChangeRecords, SentRecords, sent_twice

SHORT_SCALE = 0.04
RATE_MAX = 1_500.0
"""Records/s that the workers can apply even on a slow machine."""

SHORT: dict[str, Any] = {"topic_partitions": 4, "kafka_session_timeout_seconds": 3.0}
"""Settings with which a worker's death is noticed soon."""


def run_short(fault: Fault, kafka: Kafka, redis_server: Redis, workers: int = 2) -> Row:
    return asyncio.run(
        run_fault(
            fault,
            Shared(kafka, redis_server),
            NoBar(),
            workers=workers,
            rate_max=RATE_MAX,
            scale=SHORT_SCALE,
            overrides=SHORT,
        )
    )


@pytest.mark.parametrize(
    "fault",
    [
        Sigkill(),
        Zombie(),
        BrokerKilled(),
        TopicRecreated(),
        RedisEmpty(),
        RedisClusterFailover(),
        Eviction(),
        Undecodable(),
    ],
    ids=lambda fault: fault.name,
)
def test_a_fault_loses_nothing_and_applies_nothing_twice(
    fault: Fault, kafka: Kafka, redis_server: Redis
) -> None:
    """The guarantees hold on real services; this test does not measure times."""
    row = run_short(fault, kafka, redis_server)
    assert row.complaints == []
    assert row.invariants is not None
    assert row.invariants.transactions > 2_000
    assert row.invariants.verification.right == row.invariants.verification.accounts > 1_000


class UnnoticedRecreation(TopicRecreated):
    """A recreated topic and workers without topic ids: the test must find the skipped records."""

    async def when_recreated(self, harness: Harness) -> None:
        workers = len(harness.pool.members)
        await harness.pool.stop()
        store = RedisStateStore.from_settings(harness.settings, harness.checkpoint.digest)
        try:
            for partition, value in (
                await store.watermarks(harness.settings.topic_partitions)
            ).items():
                mark = msgspec.structs.replace(
                    Watermark.from_bytes(value), log_id=NO_ID, next_offset=20
                )
                (is_saved,) = await store.save([Save(partition, value, mark.to_bytes(), [], [])])
                assert is_saved
        finally:
            await store.close()
        await harness.workload.start(None, most=2_000)
        await harness.workload.stop()
        await harness.pool.start(workers)


def test_an_unnoticed_recreation_of_a_topic_is_found_by_its_losses(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers take the first records of each partition for applied ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # place of the kept logs
    row = run_short(UnnoticedRecreation(), kafka, redis_server, workers=1)
    assert row.invariants is not None
    assert row.invariants.lost == 20 * SHORT["topic_partitions"]
    assert any("transactions lost" in complaint for complaint in row.complaints)


class Tampered(Fault):
    """Changes that no worker makes: one violation of each kind."""

    name = "tampered"
    what = "states and scores changed by hand"

    def change_records(self) -> ChangeRecords:
        is_first = [True]

        def change(sent: SentRecords, rng: np.random.Generator) -> SentRecords:
            if is_first.pop() if is_first else False:
                sent.numbers[1] = NO_TRANSACTION  # although it is one
                return SentRecords(sent.keys, [b"none", *sent.values[1:]], sent.numbers)
            return sent

        return change

    async def disturb(self, harness: Harness) -> None:
        await harness.run_for(1.0)

    async def check(self, harness: Harness) -> list[str]:
        settings = harness.settings
        scores = [r async for some in topic_records(settings, "scores") for r in some]
        approved = [json.loads(r.value) for r in scores if b'"approve"' in r.value]
        differing, repeated = approved[-1], approved[-2]
        differing |= {"score": 0.5, "decision": "decline"}
        async with AIOKafkaProducer(**settings.kafka_client_options()) as producer:
            for score in (differing, repeated):
                partition = int(score["source"].split(":")[1])
                value, key = json.dumps(score).encode(), score["account_id"].encode()
                await producer.send_and_wait(settings.topic("scores"), value, key, partition)
        await self._count_once_more(harness, repeated)
        return ["a violation from the check"]

    async def _count_once_more(self, harness: Harness, score: dict[str, Any]) -> None:
        settings, checkpoint = harness.settings, harness.checkpoint
        partition = int(score["source"].split(":")[1])
        keys = Keys(settings.redis_key_prefix, checkpoint.digest, settings.topic("transactions"))
        (key,) = keys.accounts(partition, [score["account_id"]])
        architecture = checkpoint.header.architecture
        codec = StateCodec(architecture.layers, architecture.hidden_size)
        client = redis_client(settings)
        try:
            states, _, _ = codec.decode([await client.get(key)])
            states.history.count[0] += 1
            (value,) = codec.encode(states, np.array([0]))
            await client.set(key, value)
        finally:
            await client.aclose()


def test_every_kind_of_violation_is_counted(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harness that sees nothing would report that all guarantees held."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # place of the kept logs
    row = run_short(Tampered(), kafka, redis_server, workers=1)
    found = row.invariants
    assert found is not None
    assert found.lost == 1
    assert found.unknown == 1
    assert found.twice == 2  # the manual one, and the transaction that counts as none
    assert found.too_few == 1
    assert found.conflicting == 1
    assert found.duplicates == 2
    assert found.alerts_missing == 1
    assert found.verification.different_accounts == 1
    assert found.verification.conflicting == 1
    text = " ".join(row.complaints)
    for words in (
        "a violation from the check",
        "1 transactions lost",
        "2 applied twice",
        "1 conflict",
    ):
        assert words in text
    assert not any("conflicting" in line for line in found.complaints(allow_conflicts=True))


class UnseenEviction(Eviction):
    """Deleted states that Redis does not count as evicted: workers do not notice them."""

    name = "unseen-eviction"
    what = "states deleted"
    rate = 500.0

    def evict(self, policy: str) -> int:
        with self.redis.client() as client:
            states = list(client.scan_iter(match="*:{*transactions-*}:*", count=1_000))
            return int(client.delete(*states[::4]))


def test_an_unnoticed_eviction_is_counted(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault `eviction` would report workers that take the accounts for new ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row = run_short(UnseenEviction(), kafka, redis_server, workers=1)
    assert row.invariants is not None
    assert row.invariants.too_few > 100
    assert row.invariants.verification.different_accounts > 10
    assert any("not in a state" in line for line in row.complaints)


def test_a_fault_without_effect_is_an_error() -> None:
    """A Redis that keeps its data proves nothing about lost data."""
    before = {0: 500, 1: 700}
    require_loss(before, Mark(0.0, {0: 500, 1: 699}, frozenset()))
    for after in (before, {0: 501, 1: 702}):
        with pytest.raises(NoEffectError, match="Redis lost nothing"):
            require_loss(before, Mark(0.0, after, frozenset()))


def test_a_repeat_has_the_number_of_its_transaction() -> None:
    """A repeat must not count as a second transaction."""
    sent = SentRecords([b"a", b"b"], [b"1", b"2"], np.array([7, 8]))
    twice = sent_twice(1.0)(sent, np.random.default_rng(0))
    assert twice.keys == [b"a", b"a", b"b", b"b"]
    assert twice.values == [b"1", b"1", b"2", b"2"]
    assert twice.numbers.tolist() == [7, 7, 8, 8]


def test_the_proxy_delays_holds_and_redirects() -> None:
    """Three faults of Redis depend on it."""

    async def run() -> None:
        async def answer(
            name: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            while line := await reader.readline():
                writer.write(name + line)
            writer.close()

        one = await asyncio.start_server(lambda r, w: answer(b"one ", r, w), HOST, 0)
        two = await asyncio.start_server(lambda r, w: answer(b"two ", r, w), HOST, 0)
        ports = [server.sockets[0].getsockname()[1] for server in (one, two)]
        clock = asyncio.get_running_loop().time
        async with one, two, Proxy(ports[0]) as proxy:
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            writer.write(b"at once\n")
            assert await reader.readline() == b"one at once\n"

            proxy.delay_seconds = 0.1
            start = clock()
            writer.write(b"late\n")
            assert await reader.readline() == b"one late\n"
            assert clock() - start >= 0.2  # in both directions
            proxy.delay_seconds = 0.0

            proxy.hold()
            writer.write(b"held\n")
            line = asyncio.ensure_future(reader.readline())
            await asyncio.sleep(0.1)
            assert not line.done()
            proxy.release()
            assert await line == b"one held\n"

            await proxy.redirect(ports[1])
            assert await reader.read() == b""  # disconnected
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            writer.write(b"again\n")
            assert await reader.readline() == b"two again\n"
            writer.close()

    asyncio.run(run())


def test_the_command_lists_its_faults() -> None:
    """--list shows the names for --only; an unknown name is an error."""
    listed = CliRunner().invoke(main, ["--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == [f.name for f in FAULTS]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    wrong = CliRunner().invoke(main, ["--only", "nothing"])
    assert wrong.exit_code == 2
    assert "there is no fault nothing" in wrong.output
