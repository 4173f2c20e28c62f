"""The short form of `make faults`, and that its counting finds what it is to find."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from click.testing import CliRunner

from pipeline.local.services import HOST, Kafka, Redis
from pipeline.storage.account_state import StateCodec
from pipeline.storage.keys import Keys
from pipeline.storage.state_store import RedisStateStore, Save, redis_client
from pipeline.storage.watermark import Watermark
from pipeline.topic_id import NO_ID
from tests.fakes.memory_verify import NoBar
from tests.faults.__main__ import main
from tests.faults.fault import Fault, Row, Shared, run_fault
from tests.faults.harness import Mark, NoEffectError, Rig
from tests.faults.input import Undecodable
from tests.faults.invariants import topic_records
from tests.faults.kafka import BrokerKilled, TopicMadeAgain
from tests.faults.proxy import Proxy
from tests.faults.redis import Eviction, RedisClusterFailover, RedisEmpty, require_loss
from tests.faults.registry import FAULTS
from tests.faults.workers import Sigkill, Zombie
from tests.faults.workload import NO_TRANSACTION, ChangeRecords, Sent, sent_twice

SHORT_SCALE = 0.04
SHORT: dict[str, Any] = {"topic_partitions": 4, "kafka_session_timeout_seconds": 3.0}
"""Settings under which a worker's death is noticed soon."""


def run_short(fault: Fault, kafka: Kafka, redis_server: Redis, workers: int = 2) -> Row:
    return asyncio.run(
        run_fault(
            fault,
            Shared(kafka, redis_server),
            NoBar(),
            workers=workers,
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
        TopicMadeAgain(),
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
    """The guarantees hold on the real parts; nothing is measured here but what came out."""
    row = run_short(fault, kafka, redis_server)
    assert row.complaints == []
    assert row.outcome is not None
    assert row.outcome.transactions > 2_000
    assert row.outcome.verification.right == row.outcome.verification.accounts > 1_000


class MadeAgainUnnoticed(TopicMadeAgain):
    """Workers that know no ids, as they once were: what they skip has to be seen."""

    async def when_made_again(self, rig: Rig) -> None:
        workers = len(rig.crew.members)
        await rig.crew.stop()
        store = RedisStateStore.from_settings(rig.settings, rig.checkpoint.digest)
        try:
            for partition, value in (await store.watermarks(rig.settings.topic_partitions)).items():
                mark = replace(Watermark.from_bytes(value), log_id=NO_ID, next_offset=20)
                (stands,) = await store.save([Save(partition, value, mark.to_bytes(), [], [])])
                assert stands
        finally:
            await store.close()
        await rig.load.start(None, most=2_000)
        await rig.load.stop()
        await rig.crew.start(workers)


def test_a_topic_made_again_that_nobody_notices_is_seen_by_what_is_lost(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first records of each partition are taken for applied ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for the logs that are kept
    row = run_short(MadeAgainUnnoticed(), kafka, redis_server, workers=1)
    assert row.outcome is not None
    assert row.outcome.lost == 20 * SHORT["partitions"]
    assert any("transactions lost" in complaint for complaint in row.complaints)


class Tampered(Fault):
    """What no worker does: each kind of wrong that is counted, once."""

    name = "tampered"
    what = "states and scores changed by hand"

    def change_records(self) -> ChangeRecords:
        is_first = [True]

        def change(sent: Sent, rng: np.random.Generator) -> Sent:
            if is_first.pop() if is_first else False:
                sent.numbers[1] = NO_TRANSACTION  # and it is one
                return Sent(sent.keys, [b"none", *sent.values[1:]], sent.numbers)
            return sent

        return change

    async def disturb(self, rig: Rig) -> None:
        await rig.go_on(1.0)

    async def check(self, rig: Rig) -> list[str]:
        settings = rig.settings
        scores = [r async for some in topic_records(settings, "scores") for r in some]
        approved = [json.loads(r.value) for r in scores if b'"approve"' in r.value]
        differing, repeated = approved[-1], approved[-2]
        differing |= {"score": 0.5, "decision": "decline"}
        async with AIOKafkaProducer(**settings.kafka_client_options()) as producer:
            for score in (differing, repeated):
                partition = int(score["source"].split(":")[1])
                value, key = json.dumps(score).encode(), score["account_id"].encode()
                await producer.send_and_wait(settings.topic("scores"), value, key, partition)
        await self._count_once_more(rig, repeated)
        return ["a complaint of its own"]

    async def _count_once_more(self, rig: Rig, score: dict[str, Any]) -> None:
        settings, checkpoint = rig.settings, rig.checkpoint
        partition = int(score["source"].split(":")[1])
        keys = Keys(settings.redis_key_prefix, checkpoint.digest, settings.topic("transactions"))
        (key,) = keys.accounts(partition, [score["account_id"]])
        architecture = checkpoint.network.architecture
        codec = StateCodec(architecture.layers, architecture.hidden_size)
        client = redis_client(settings)
        try:
            states, _, _ = codec.decode([await client.get(key)])
            states.history.count[0] += 1
            (value,) = codec.encode(states, np.array([0]))
            await client.set(key, value)
        finally:
            await client.aclose()


def test_every_kind_of_wrong_is_counted(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harness that saw nothing would report that everything held."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for the logs that are kept
    row = run_short(Tampered(), kafka, redis_server, workers=1)
    found = row.outcome
    assert found is not None
    assert found.lost == 1
    assert found.strangers == 1
    assert found.twice == 2  # the one done by hand, and the transaction that is said to be none
    assert found.too_few == 1
    assert found.conflicting == 1
    assert found.duplicates == 2
    assert found.alerts_missing == 1
    assert found.verification.different_accounts == 1
    assert found.verification.conflicting == 1
    told = " ".join(row.complaints)
    for words in ("a complaint of its own", "1 transactions lost", "2 applied twice", "1 conflict"):
        assert words in told
    assert not any("conflicting" in line for line in found.complaints(allow_conflicts=True))


class UnseenEviction(Eviction):
    """States go, and Redis does not count them: workers act as if they did not look."""

    name = "unseen-eviction"
    what = "states deleted"
    rate = 500.0

    def evict(self, policy: str) -> int:
        with self.redis.client() as client:
            states = list(client.scan_iter(match="*:{*transactions-*}:*", count=1_000))
            return int(client.delete(*states[::4]))


def test_an_eviction_that_workers_do_not_see_is_counted(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `eviction` would report of workers that go on as if accounts were new."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row = run_short(UnseenEviction(), kafka, redis_server, workers=1)
    assert row.outcome is not None
    assert row.outcome.too_few > 100
    assert row.outcome.verification.different_accounts > 10
    assert any("not in a state" in line for line in row.complaints)


def test_a_fault_that_has_no_effect_is_no_proof() -> None:
    """A Redis that keeps its data shows nothing about one that loses it."""
    before = {0: 500, 1: 700}
    require_loss(before, Mark(0.0, {0: 500, 1: 699}, frozenset()))
    for after in (before, {0: 501, 1: 702}):
        with pytest.raises(NoEffectError, match="Redis lost nothing"):
            require_loss(before, Mark(0.0, after, frozenset()))


def test_a_repeat_has_the_number_of_what_it_repeats() -> None:
    """So that a repeat is no second transaction to be scored."""
    sent = Sent([b"a", b"b"], [b"1", b"2"], np.array([7, 8]))
    twice = sent_twice(1.0)(sent, np.random.default_rng(0))
    assert twice.keys == [b"a", b"a", b"b", b"b"]
    assert twice.values == [b"1", b"1", b"2", b"2"]
    assert twice.numbers.tolist() == [7, 7, 8, 8]


def test_the_proxy_delays_holds_and_leads_elsewhere() -> None:
    """Three faults of Redis are nothing but this."""

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
            assert clock() - start >= 0.2  # there and back
            proxy.delay_seconds = 0.0

            proxy.hold()
            writer.write(b"held\n")
            line = asyncio.ensure_future(reader.readline())
            await asyncio.sleep(0.1)
            assert not line.done()
            proxy.release()
            assert await line == b"one held\n"

            await proxy.lead_to(ports[1])
            assert await reader.read() == b""  # cut
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            writer.write(b"again\n")
            assert await reader.readline() == b"two again\n"
            writer.close()

    asyncio.run(run())


def test_the_command_names_its_faults() -> None:
    """--list tells what --only takes, and a name that is none does nothing."""
    listed = CliRunner().invoke(main, ["--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == [f.name for f in FAULTS]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    wrong = CliRunner().invoke(main, ["--only", "nothing"])
    assert wrong.exit_code == 2
    assert "there is no fault nothing" in wrong.output
