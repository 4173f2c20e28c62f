"""The audit topic of a real broker: no act without a record, and no secret in one."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from click.testing import CliRunner

from pipeline.cli.keys import keys
from pipeline.errors import StartupError
from pipeline.gateway import audit as audit_module
from pipeline.gateway.api_keys import parse_token
from pipeline.gateway.audit import AuditLog, AuditUnavailableError, transaction_hash
from pipeline.gateway.principal import Principal
from pipeline.gateway.tenants import not_found
from pipeline.kafka.topics import AUDIT_PARTITIONS, ensure_audit_topic, partition_count
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.settings import Settings, load_settings
from tests.pipeline.gateway.calls import add_key, key_store

ANALYST = Principal("api_key", "0123456789abcdef", "case system", frozenset({"label"}))


def settings_of(kafka: Kafka, **changes: Any) -> Settings:
    return load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:8]}-",
        startup_timeout_seconds=10,
        **changes,
    )


async def records(settings: Settings) -> list[dict[str, Any]]:
    """Read all records of the audit topic."""
    partition = TopicPartition(settings.topic("audit"), 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers)
    await consumer.start()
    try:
        consumer.assign([partition])
        await consumer.seek_to_beginning()
        end = (await consumer.end_offsets([partition]))[partition]
        found: list[dict[str, Any]] = []
        while len(found) < end:
            found.append(json.loads((await consumer.getone()).value))
        return found
    finally:
        await consumer.stop()


def test_each_act_has_a_record_before_it_and_one_after_it(kafka: Kafka) -> None:
    async def run() -> None:
        settings = settings_of(kafka)
        audit = AuditLog(settings)
        await audit.start()
        try:
            label = {"request_id": "r1", "transaction_id": "shop-1"}
            async with audit.act("label_posted", ANALYST, **label):
                (begun,) = await records(settings)
            assert begun == {
                "act_id": begun["act_id"],
                "act": "label_posted",
                "result": "begun",
                "at": begun["at"],
                "principal_kind": "api_key",
                "principal_id": ANALYST.id,
                "principal_name": "case system",
                "request_id": "r1",
                "transaction_hash": transaction_hash("shop-1"),
            }
            for error in (not_found(), ValueError("shop-1")):
                with pytest.raises(type(error)):
                    async with audit.act("label_posted", ANALYST, **label):
                        raise error
            done, *failed = (await records(settings))[1:]
            assert done == begun | {"result": "done", "at": done["at"]}
            assert [(r["result"], r.get("reason")) for r in failed] == [
                ("begun", None),
                ("failed", "not-found"),
                ("begun", None),
                ("failed", "ValueError"),
            ]
            assert "shop-1" not in json.dumps([begun, done, *failed])
            assert await partition_count(settings, settings.topic("audit")) == AUDIT_PARTITIONS
        finally:
            await audit.stop()

    asyncio.run(run())


@pytest.mark.live
def test_an_act_without_its_record_does_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "AUDIT_SECONDS", 1.0)
    acts = 0

    async def run() -> None:
        nonlocal acts
        with Kafka() as broker:
            audit = AuditLog(settings_of(broker))
            with pytest.raises(AuditUnavailableError):  # not connected yet
                async with audit.act("label_posted", ANALYST):
                    acts += 1
            await audit.start()
            await asyncio.to_thread(broker.stop)
            with pytest.raises(AuditUnavailableError, match="nothing was done"):
                async with audit.act("label_posted", ANALYST):
                    acts += 1
            await asyncio.to_thread(broker.start)
            async with asyncio.timeout(60):
                while not acts:  # healthy again by itself
                    try:
                        async with audit.act("label_posted", ANALYST):
                            acts += 1
                    except AuditUnavailableError:
                        assert not acts
            await audit.stop()

    asyncio.run(run())
    assert acts == 1


def test_keys_are_administered_with_records_and_without_secrets(
    kafka: Kafka, redis_server: Redis
) -> None:
    settings = settings_of(kafka)
    environment = {
        "RECUR_REDIS_URL": redis_server.url,
        "RECUR_REDIS_KEY_PREFIX": f"audit-{uuid.uuid4().hex[:8]}",
        "RECUR_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "RECUR_TOPIC_PREFIX": settings.topic_prefix,
    }

    def recur(*arguments: str) -> str:
        result = CliRunner().invoke(keys, arguments, env=environment)
        assert result.exit_code == 0, result.output
        return result.output

    added = recur(
        "add", "case system", "--scope", "label", "--scope", "read", "--tenant", "acme-",
        "--expires", "90d", "--rate", "50/s",
    )  # fmt: skip
    token, told = added.splitlines()
    parts = parse_token(token)
    assert parts is not None
    key_id, secret = parts
    assert key_id in told
    shown = recur("show", key_id)
    assert [line.split(maxsplit=1)[1] for line in shown.splitlines()[1:6]] == [
        "case system", "active", "label, read", "acme-", "50/s",
    ]  # fmt: skip
    listed = recur("list")
    assert f"{key_id}  active    label,read  case system" in listed
    recur("revoke", key_id)
    assert f"{key_id}  revoked " in recur("list")
    recur("remove", key_id)
    assert key_id not in recur("list")

    found = asyncio.run(records(settings))
    assert [(r["act"], r["result"]) for r in found] == [
        (act, result)
        for act in ("key_added", "key_revoked", "key_removed")
        for result in ("begun", "done")
    ]
    assert {(r["key_id"], r["key_name"], r["principal_kind"]) for r in found} == {
        (key_id, "case system", "command")
    }
    assert secret not in shown + listed + told + json.dumps(found)


def test_without_kafka_a_key_is_not_added_but_may_be_revoked(redis_server: Redis) -> None:
    environment = {
        "RECUR_REDIS_URL": redis_server.url,
        "RECUR_REDIS_KEY_PREFIX": f"audit-{uuid.uuid4().hex[:8]}",
        "RECUR_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "RECUR_STARTUP_TIMEOUT_SECONDS": "0.5",
    }
    runner = CliRunner()
    refused = runner.invoke(keys, ["add", "till", "--scope", "score"], env=environment)
    assert isinstance(refused.exception, StartupError)
    assert "recur_" not in refused.output
    assert "no keys" in runner.invoke(keys, ["list"], env=environment).output

    async def add() -> str:
        settings = load_settings(
            redis_url=redis_server.url, redis_key_prefix=environment["RECUR_REDIS_KEY_PREFIX"]
        )
        async with key_store(settings) as (_, store):
            return (await add_key(store))[0]

    key_id = asyncio.run(add())
    assert runner.invoke(keys, ["revoke", key_id], env=environment).exit_code != 0
    assert "active" in runner.invoke(keys, ["list"], env=environment).output
    assert runner.invoke(keys, ["revoke", key_id, "--unaudited"], env=environment).exit_code == 0
    assert "revoked" in runner.invoke(keys, ["list"], env=environment).output


def test_the_audit_topic_is_kept_for_its_own_time(kafka: Kafka) -> None:
    from tests.pipeline.kafka.test_topics import topic_settings

    settings = settings_of(kafka, audit_retention_days=3)

    async def run() -> dict[str, str]:
        await asyncio.gather(*(ensure_audit_topic(settings) for _ in range(2)))
        return await topic_settings(settings, settings.topic("audit"))

    configured = asyncio.run(run())
    assert configured["retention.ms"] == str(3 * 86_400_000)
    assert configured["cleanup.policy"] == "delete"
