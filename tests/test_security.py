"""TLS, SCRAM and rights on a real broker and Redis; what is refused is told by its setting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from pipeline.codec import decode_score, encode_transaction
from pipeline.errors import RecurError
from pipeline.redis_calls import RIGHTS
from pipeline.services import HOST, Redis
from pipeline.settings import load_settings
from pipeline.startup import check_services, load_checkpoint
from pipeline.topics import ensure_topics
from tests.pipeline_under_test import PipelineUnderTest, assert_scored_once, transactions
from tests.secure_services import (
    KAFKA_PASSWORDS,
    REDIS_PASSWORD,
    REDIS_RULES,
    Authority,
    SecureKafka,
    TlsProxy,
    allow,
    kafka_rules,
    redis_with_users,
)

WORKER = "recur-worker"
FAST = {"startup_timeout_seconds": 1.5, "redis_timeout_seconds": 2.0}


@dataclass(frozen=True)
class Site:
    """A broker and a Redis behind TLS, with the users and rights of the files of rules."""

    authority: Authority
    other: Authority
    broker: SecureKafka
    redis: Redis
    proxy: TlsProxy
    folder: Path

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Of a worker with the rights of the files."""
        settings: dict[str, Any] = {
            "kafka_bootstrap": self.broker.secure_bootstrap,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_sasl_username": WORKER,
            "kafka_sasl_password": KAFKA_PASSWORDS[WORKER],
            "kafka_ssl_cafile": self.authority.cafile,
            "redis_url": f"rediss://{HOST}:{self.proxy.port}/0",
            "redis_username": "recur",
            "redis_password": REDIS_PASSWORD,
            "redis_ssl_cafile": self.authority.cafile,
            "partitions": 2,
        }
        return {name: v for name, v in (settings | changes).items() if v is not None}


    def kafka_and_redis(self) -> dict[str, Any]:
        """The same, with the addresses by the names that :class:`PipelineUnderTest` has for them."""
        settings = self.settings()
        return {"bootstrap": settings.pop("kafka_bootstrap"), **settings}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Topics are there and owned by the operator; the worker may not create any."""
    folder = tmp_path_factory.mktemp("site")
    authority, other = Authority.create(folder), Authority.create(folder, "another")
    certificate = authority.issue(folder, "server")
    with (
        SecureKafka(*certificate) as broker,
        redis_with_users() as redis,
        TlsProxy(*certificate, redis.port) as proxy,
    ):
        asyncio.run(ensure_topics(load_settings(kafka_bootstrap=broker.bootstrap, partitions=2)))
        asyncio.run(allow(broker, kafka_rules()))
        yield Site(authority, other, broker, redis, proxy, folder)


def test_a_worker_of_least_rights_runs_over_tls(site: Site, tmp_path: Path) -> None:
    """End to end, with verified certificates and no right beyond those of the files of rules.

    Sent and read by the producer's and the reader's users, who may do nothing else either.
    """
    sent = transactions(300, accounts=20)
    names = {"topic_prefix": "", "key_prefix": "recur", "kafka_group": "recur"}
    system = PipelineUnderTest(directory=tmp_path, **names, **site.kafka_and_redis())

    def options(user: str) -> dict[str, Any]:
        own = site.settings(kafka_sasl_username=user, kafka_sasl_password=KAFKA_PASSWORDS[user])
        return load_settings(**own).kafka_client_options()

    async def run() -> None:
        async with system.running(workers=1):
            async with AIOKafkaProducer(**options("recur-producer")) as producer:
                for t in sent:
                    await producer.send("transactions", encode_transaction(t), t.account_id.encode())
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            async with AIOKafkaConsumer(
                "scores",
                group_id="recur-reader",
                auto_offset_reset="earliest",
                **options("recur-reader"),
            ) as reader:
                assert decode_score((await reader.getone()).value)
            with site.redis.client() as admin:
                assert "recur" in {client["user"] for client in admin.client_list()}

    asyncio.run(run())


def test_the_file_of_redis_rights_holds_what_recur_says_it_needs() -> None:
    (line,) = [line for line in REDIS_RULES.read_text().splitlines() if line.startswith("user recur ")]

    assert set(RIGHTS.split()) == {word for word in line.split() if word.startswith("+")}


def refusal(settings: dict[str, Any]) -> str:
    """The line that a worker's start ends with."""
    configured = load_settings(**settings | FAST)
    with pytest.raises(RecurError) as caught:
        asyncio.run(check_services(configured, load_checkpoint(configured)))
    message = str(caught.value)
    assert "\n" not in message
    for secret in (*KAFKA_PASSWORDS.values(), REDIS_PASSWORD, "wrong-secret"):
        assert secret not in message
    return message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kafka_sasl_mechanism": "SCRAM-SHA-256"}, None),
        ({"kafka_sasl_password": "wrong-secret"}, "RECUR_KAFKA_SASL_PASSWORD"),
        ({"kafka_sasl_username": "nobody"}, "RECUR_KAFKA_SASL_USERNAME"),
        ({"kafka_sasl_mechanism": "PLAIN"}, "RECUR_KAFKA_SASL_MECHANISM"),
        ({"kafka_ssl_cafile": "another"}, "RECUR_KAFKA_SSL_CAFILE"),
        ({"kafka_ssl_cafile": None}, "RECUR_KAFKA_SSL_CAFILE"),
        ({"kafka_security_protocol": "PLAINTEXT", "kafka_ssl_cafile": None}, "RECUR_KAFKA_S"),
        ({"redis_password": "wrong-secret"}, "RECUR_REDIS_PASSWORD"),
        ({"redis_password": None, "redis_username": None}, "RECUR_REDIS_PASSWORD"),
        ({"redis_ssl_cafile": "another"}, "RECUR_REDIS_SSL_CAFILE"),
        ({"redis_ssl_cafile": None}, "RECUR_REDIS_SSL_CAFILE"),
    ],
)
def test_who_is_not_let_in_is_told_which_setting(
    site: Site, changes: dict[str, Any], says: str | None
) -> None:
    if "another" in changes.values():
        changes = dict.fromkeys(changes, site.other.cafile)
    settings = site.settings(**changes)

    if says is None:
        configured = load_settings(**settings)
        assert asyncio.run(check_services(configured, load_checkpoint(configured))) == 2
    else:
        assert says in refusal(settings)
