"""TLS, SCRAM and rights on a real broker and Redis; errors name the setting to correct."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import TransactionalIdAuthorizationFailed

from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.acl import GATEWAY_NEEDS, NEEDS, WEBHOOK_NEEDS, check_gateway_permissions
from pipeline.kafka.topics import LOGS, add_partitions, ensure_audit_topic, ensure_topics
from pipeline.kafka.transactional_producer import transactional_id
from pipeline.local.ports import HOST
from pipeline.local.redis import Redis
from pipeline.local.workers import WorkerProcess, start_worker
from pipeline.messages.scores import decode_score
from pipeline.messages.transactions import encode_transaction
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import COMMAND_RIGHTS, GATEWAY_RIGHTS, RIGHTS, WEBHOOK_RIGHTS
from pipeline.webhooks.preflight import check_webhook_services
from pipeline.worker.preflight import check_services
from tests.fakes.running_gateway import make_token, start_gateway
from tests.fakes.running_pipeline import (
    PipelineUnderTest,
    assert_scored_once,
    transactions,
    until,
)
from tests.fakes.running_webhooks import webhooks_process
from tests.fakes.secure_services import (
    KAFKA_PASSWORDS,
    LACKING,
    REDIS_PASSWORD,
    REDIS_RULES,
    WEBHOOKS_LACKING,
    Authority,
    SecureKafka,
    TlsProxy,
    TokenEndpoint,
    allow,
    kafka_rules,
    redis_with_users,
    rules_of_the_lacking,
)
from tests.pipeline.webhooks.receiver import Receiver, endpoint_table

WORKER = "recur-worker"
OPERATOR = "recur-operator"
GATEWAY = "recur-gateway"
WEBHOOKS = "recur-webhooks"
FAST = {"startup_timeout_seconds": 0.8, "redis_timeout_seconds": 2.0}

SECRETS = (*KAFKA_PASSWORDS.values(), REDIS_PASSWORD, "wrong-secret", "key-secret")


def assert_holds_no_secret(text: str) -> None:
    """Check that the text shows none of the passwords."""
    assert not [secret for secret in SECRETS if secret in text], text


async def everything_shown(worker: WorkerProcess) -> str:
    """Collect what others see of a worker: its log, its pages and the process titles."""
    shown = [await asyncio.to_thread(worker.log_path.read_text)]
    for path in ("/metrics", "/ready", "/live"):
        _, page = await asyncio.to_thread(get, f"http://{worker.host}:{worker.port}{path}")
        shown.append(page)
    if sys.platform == "linux":
        shown += titles(worker.process.pid) + titles(worker.process.supervisor_pid)
    assert all(shown)
    return "\n".join(shown)


def titles(pid: int) -> list[str]:
    """Return what ps shows of a process."""
    return [Path(f"/proc/{pid}/{title}").read_text() for title in ("cmdline", "comm")]


def get(url: str) -> tuple[int, str]:
    """Get status and text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


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
        """Return settings of a worker with the rights of the files."""
        settings: dict[str, Any] = {
            "kafka_bootstrap_servers": self.broker.secure_bootstrap,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_sasl_username": WORKER,
            "kafka_sasl_password": KAFKA_PASSWORDS[WORKER],
            "kafka_ssl_cafile": self.authority.cafile,
            "redis_url": f"rediss://{HOST}:{self.proxy.port}/0",
            "redis_username": "recur",
            "redis_password": REDIS_PASSWORD,
            "redis_ssl_cafile": self.authority.cafile,
            "topic_partitions": 2,
        }
        return {name: v for name, v in (settings | changes).items() if v is not None}

    def of(self, user: str) -> dict[str, Any]:
        """Return the settings of another user, who has its name on Kafka and on Redis."""
        return {
            "kafka_sasl_username": user,
            "kafka_sasl_password": KAFKA_PASSWORDS[user],
            "redis_username": user,
        }

    def kafka_and_redis(self) -> dict[str, Any]:
        """Return the same settings under the names of :class:`PipelineUnderTest`."""
        settings = self.settings()
        return {"bootstrap": settings.pop("kafka_bootstrap_servers"), **settings}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start a site with all topics; the worker may not create any."""
    folder = tmp_path_factory.mktemp("site")
    authority, other = Authority.create(folder), Authority.create(folder, "another")
    certificate = authority.issue(folder, "server")
    with (
        SecureKafka(*certificate) as broker,
        redis_with_users() as redis,
        TlsProxy(*certificate, redis.port) as proxy,
    ):
        everything = load_settings(kafka_bootstrap_servers=broker.bootstrap, topic_partitions=2)
        asyncio.run(ensure_topics(everything))
        asyncio.run(ensure_audit_topic(everything))
        asyncio.run(allow(broker, kafka_rules() + rules_of_the_lacking()))
        yield Site(authority, other, broker, redis, proxy, folder)


COMMANDS = (
    "verify",
    "state show {account}",
    "state rebuild --all --dry-run",
    "state rebuild --merchants --dry-run",
    "state forget {account} --dry-run",
)
"""Commands that an operator runs beside a worker."""


def recur(settings: dict[str, Any], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ``recur`` as a process."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *command],
        env=os.environ | environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_worker_with_minimal_rights_runs_over_tls(site: Site, tmp_path: Path) -> None:
    """Certificates are verified, and no user has a right beyond the files of rules.

    The producer's and the reader's users, who may do nothing else, send and read records. A gateway
    answers, and a webhook is delivered.
    """
    sent = transactions(300, accounts=20)
    names = {"topic_prefix": "", "redis_key_prefix": "recur", "kafka_group_id": "recur"}
    system = PipelineUnderTest(
        directory=tmp_path,
        log_level="debug",
        review_threshold=0,
        decline_threshold=1,
        **names,
        **site.kafka_and_redis(),
    )

    def options(user: str) -> dict[str, Any]:
        own = site.settings(kafka_sasl_username=user, kafka_sasl_password=KAFKA_PASSWORDS[user])
        return load_settings(**own).kafka_client_options()

    async def run() -> None:
        async with system.running(workers=1):
            (worker,) = system.workers
            async with AIOKafkaProducer(**options("recur-producer")) as producer:
                for t in sent:
                    await producer.send(
                        "transactions", encode_transaction(t), t.account_id.encode()
                    )
            await system.until_applied()
            assert_scored_once(await system.scores(), sent)
            async with AIOKafkaConsumer(
                "scores",
                group_id="recur-reader",
                auto_offset_reset="earliest",
                **options("recur-reader"),
            ) as reader:
                assert decode_score((await reader.getone()).value)
            commands = [command.format(account=sent[0].account_id) for command in COMMANDS]
            operator = site.settings(**site.of(OPERATOR))
            await check_gateway_and_webhooks(site, system, operator)
            for run in await asyncio.gather(
                *(asyncio.to_thread(recur, operator, *command.split()) for command in commands)
            ):
                assert run.returncode == 0, run
                assert_holds_no_secret(run.stdout + run.stderr)
            with site.redis.client() as client:
                admin: Any = client
                assert "recur" in {client["user"] for client in admin.client_list()}
                admin.execute_command("ACL", "SETUSER", "recur", "resetpass", ">another")
                admin.client_kill_filter(_type="normal", skipme=True)

                async def has_noticed() -> bool:
                    await worker.refresh()
                    return worker.samples["recur_redis_errors_total"] > 0

                await until(has_noticed, "the worker to be refused by Redis")
                admin.execute_command("ACL", "SETUSER", "recur", "resetpass", f">{REDIS_PASSWORD}")
            assert_holds_no_secret(await everything_shown(worker))

    asyncio.run(run())


async def check_gateway_and_webhooks(
    site: Site, system: PipelineUnderTest, operator: dict[str, Any]
) -> None:
    """Let a gateway score a transaction, and an endpoint get its alert."""
    token = await make_token(load_settings(**operator))
    gateway = await start_gateway(system, token, **site.of(GATEWAY))
    (one,) = transactions(1, accounts=1, seed=9)
    async with Receiver().running() as receiver:
        endpoints = system.directory / "webhooks.toml"
        endpoints.write_text(endpoint_table("cases", receiver.url("/cases"), start="earliest"))
        options = system.overrides | site.of(WEBHOOKS)
        options |= {"webhooks_file": endpoints, "http_port": 0}
        log = system.directory / "webhooks.log"
        try:
            async with webhooks_process(options, log) as process:

                async def has_alert() -> bool:
                    assert process.returncode is None, log.read_text()
                    return one.transaction_id in receiver.ids("/cases")

                await gateway.until_ready()
                answer = await gateway.score(one)
                assert answer.status_code == 200, answer.text
                await until(has_alert, "the alert at the endpoint")
        finally:
            await gateway.close()
    assert_holds_no_secret(log.read_text() + gateway.log())


@pytest.mark.parametrize(
    ("user", "rights"),
    [
        ("recur", RIGHTS),
        (OPERATOR, f"{RIGHTS} {COMMAND_RIGHTS}"),
        (GATEWAY, GATEWAY_RIGHTS),
        (WEBHOOKS, WEBHOOK_RIGHTS),
    ],
)
def test_the_redis_rules_hold_exactly_the_needed_rights(user: str, rights: str) -> None:
    (line,) = [
        line for line in REDIS_RULES.read_text().splitlines() if line.startswith(f"user {user} ")
    ]

    assert set(rights.split()) == {word for word in line.split() if word.startswith("+")}


def test_a_worker_may_use_the_transactional_ids_of_its_partitions_and_no_others(
    site: Site,
) -> None:
    """These rights are needed for RECUR_PROCESSING_GUARANTEE=exactly_once."""
    settings = load_settings(**site.settings(), processing_guarantee="exactly_once")

    async def commit(name: str) -> None:
        producer = AIOKafkaProducer(transactional_id=name, **settings.kafka_client_options())
        try:
            await producer.start()
            async with producer.transaction():
                await producer.send_and_wait("dead-letter", b"none")
        finally:
            await producer.stop()
            await asyncio.sleep(0.1)

    asyncio.run(commit(transactional_id(settings, 1)))
    with pytest.raises(TransactionalIdAuthorizationFailed):
        asyncio.run(commit("another-transactions-1"))


async def checked(settings: Settings) -> int:
    """Run a worker's start checks; return the number of partitions."""
    try:
        return await check_services(settings, load_checkpoint(settings))
    finally:
        await asyncio.sleep(0.1)  # TLS closes connections after the clients are done


def refusal(settings: dict[str, Any]) -> str:
    """Return the line with which a worker's start ends."""
    with pytest.raises(RecurError) as caught:
        asyncio.run(checked(load_settings(**settings | FAST)))
    message = str(caught.value)
    assert "\n" not in message
    assert_holds_no_secret(message)
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
def test_a_refused_login_names_the_setting(
    site: Site, changes: dict[str, Any], says: str | None
) -> None:
    if "another" in changes.values():
        changes = dict.fromkeys(changes, site.other.cafile)
    settings = site.settings(**changes)

    if says is None:
        assert asyncio.run(checked(load_settings(**settings))) == 2
    else:
        assert says in refusal(settings)


def test_a_worker_logs_in_with_tokens(site: Site, tmp_path: Path) -> None:
    """Worker, producer and reader get tokens from an identity provider, with the same rights."""
    sent = transactions(50, accounts=5)
    with TokenEndpoint() as endpoint:
        oauth = {
            "kafka_sasl_mechanism": "OAUTHBEARER",
            "kafka_oauth_token_url": endpoint.url,
            "kafka_oauth_scope": "kafka",
        }
        changed = site.kafka_and_redis() | oauth
        names = {"topic_prefix": "", "redis_key_prefix": "recur", "kafka_group_id": "recur"}
        system = PipelineUnderTest(directory=tmp_path, log_level="debug", **names, **changed)

        async def run() -> None:
            async with system.running(workers=1):
                (worker,) = system.workers
                producer = load_settings(
                    **site.settings(
                        kafka_sasl_username="recur-producer",
                        kafka_sasl_password=KAFKA_PASSWORDS["recur-producer"],
                        **oauth,
                    )
                )
                async with AIOKafkaProducer(**producer.kafka_client_options()) as sending:
                    for t in sent:
                        await sending.send(
                            "transactions", encode_transaction(t), t.account_id.encode()
                        )
                await system.until_applied()
                scored = {score.transaction_id for score in await system.scores()}
                assert {t.transaction_id for t in sent} <= scored
                assert_holds_no_secret(await everything_shown(worker))

        asyncio.run(run())
        assert set(endpoint.scopes) == {"kafka"}

        changed = site.settings(**oauth)
        message = refusal(changed | {"kafka_sasl_password": "wrong-secret"})
        assert "the token endpoint answers 401" in message
        assert "RECUR_KAFKA_OAUTH_TOKEN_URL" in message
    message = refusal(changed | {"kafka_sasl_username": "recur-reader"})  # not asked before
    assert "the token endpoint does not answer" in message


@pytest.mark.parametrize("user", LACKING)
def test_a_missing_right_on_kafka_is_named_at_the_start(site: Site, user: str) -> None:
    """The worker neither waits in silence nor fails at the first alert."""
    operation, name = LACKING[user]

    message = refusal(
        site.settings(kafka_sasl_username=user, kafka_sasl_password=KAFKA_PASSWORDS[user])
    )

    assert name in message
    assert "docs/security.md" in message
    assert "RECUR_KAFKA_SASL_USERNAME" in message
    if name == "scores":  # the other topics are invisible without their one right
        assert f"{user} (RECUR_KAFKA_SASL_USERNAME) the operation {operation} on" in message


def test_the_kafka_rules_hold_exactly_the_needed_rights() -> None:
    settings = load_settings()
    rules = {
        (rule.resource, rule.name, rule.operation)
        for rule in kafka_rules()
        if rule.principal == f"User:{WORKER}" and rule.resource != "transactional-id"
    }

    assert rules == {("group", settings.kafka_group_id, "Read")} | {
        ("topic", settings.topic(role), operation)
        for role, operations in NEEDS.items()
        for operation in operations
    } | {
        # Optional: with it a worker sees limits, compaction and retention at the start.
        ("topic", settings.topic(role), "DescribeConfigs")
        for role in (*LOGS, "dead_letter")
    }


def test_the_kafka_rules_of_a_gateway_hold_exactly_the_needed_rights() -> None:
    settings = load_settings()
    rules = {
        (rule.name, rule.operation)
        for rule in kafka_rules()
        if rule.principal == "User:recur-gateway"
    }

    assert rules == {
        (settings.topic(role), operation)
        for role, operations in GATEWAY_NEEDS.items()
        for operation in operations
    } | {(settings.kafka_group_id, "Describe")}


def test_the_kafka_rules_of_webhooks_hold_exactly_the_needed_rights() -> None:
    settings = load_settings()
    rules = {
        (rule.resource, rule.name, rule.operation, rule.pattern)
        for rule in kafka_rules()
        if rule.principal == f"User:{WEBHOOKS}"
    }

    assert rules == {("group", f"{settings.kafka_group_id}-webhooks-", "Read", "prefixed")} | {
        ("topic", settings.topic(role), operation, "literal")
        for role, operations in WEBHOOK_NEEDS.items()
        for operation in operations
    }


def webhooks_refusal(settings: dict[str, Any]) -> str:
    """Return the line with which the start of `recur webhooks` ends."""

    async def check() -> None:
        try:
            await check_webhook_services(load_settings(**settings | FAST), ["cases", "archive"])
        finally:
            await asyncio.sleep(0.1)  # TLS closes connections after the clients are done

    with pytest.raises(RecurError) as caught:
        asyncio.run(check())
    message = str(caught.value)
    assert "\n" not in message
    assert_holds_no_secret(message)
    return message


@pytest.mark.parametrize("user", WEBHOOKS_LACKING)
def test_a_right_that_webhooks_lack_on_kafka_is_named_at_the_start(site: Site, user: str) -> None:
    _, name = WEBHOOKS_LACKING[user]
    settings = site.settings(**site.of(user) | {"redis_username": WEBHOOKS})

    message = webhooks_refusal(settings)

    assert name in message
    assert "docs/security.md" in message
    if name == "recur-webhooks-":
        assert f"{user} (RECUR_KAFKA_SASL_USERNAME) the operation Read on the group" in message


@pytest.mark.parametrize("missing", ["+set", "+del", "+mget", "+info", "~recur:{webhooks}:*"])
def test_a_right_that_webhooks_lack_on_redis_ends_the_start(site: Site, missing: str) -> None:
    """The first pause or answer 410 would find it out otherwise."""
    granted = [f">{REDIS_PASSWORD}", "~recur:{webhooks}:*", *WEBHOOK_RIGHTS.split()]
    granted.remove(missing)
    with site.redis.client() as client:
        admin: Any = client
        admin.execute_command("ACL", "SETUSER", "lacks", "reset", "on", *granted)
    settings = site.settings(**site.of(WEBHOOKS) | {"redis_username": "lacks"})

    assert WEBHOOK_RIGHTS in webhooks_refusal(settings)


def test_a_gateway_that_may_not_see_the_workers_group_does_not_start(site: Site) -> None:
    """It would wait for workers for ever."""
    user = "gateway-lacks-group"
    settings = load_settings(**site.settings(**site.of(user)), **FAST)

    with pytest.raises(RecurError, match="the operation Describe on the group recur"):
        asyncio.run(check_gateway_permissions(settings))


def test_webhooks_name_the_setting_of_a_refused_login(site: Site) -> None:
    for changes, says in (
        ({"kafka_sasl_password": "wrong-secret"}, "RECUR_KAFKA_SASL_PASSWORD"),
        ({"redis_password": "wrong-secret"}, "RECUR_REDIS_PASSWORD"),
        ({"redis_url": f"rediss://{HOST}:1/0"}, "RECUR_REDIS_URL"),
    ):
        assert says in webhooks_refusal(site.settings(**site.of(WEBHOOKS) | changes))


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """Turn settings into environment variables of a process."""
    return {f"RECUR_{name.upper()}": str(value) for name, value in settings.items()}


def test_workers_that_do_not_start_give_the_reason_in_one_line_without_a_secret(
    site: Site, tmp_path: Path
) -> None:
    """Whole processes at the level debug write nothing else, and no traceback."""
    inside = f"redis://recur:wrong-secret@{HOST}:{site.redis.port}/0"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kafka_bootstrap_servers": f"{HOST}:1"}, "RECUR_KAFKA_BOOTSTRAP_SERVERS"),
        ({"kafka_sasl_password": "wrong-secret"}, "RECUR_KAFKA_SASL_PASSWORD"),
        ({"redis_password": "wrong-secret"}, "RECUR_REDIS_PASSWORD"),
        ({"redis_url": inside, "redis_ssl_cafile": None}, "RECUR_REDIS_PASSWORD"),
        ({"redis_url": "rediss://recur:wrong-secret/1@host/0"}, "redis_url"),
    ]
    workers = []
    for number, (changes, _) in enumerate(cases):
        settings = site.settings(**changes) | FAST | {"log_level": "debug"}
        if "redis_url" in changes:
            del settings["redis_username"], settings["redis_password"]
        workers.append(start_worker(number, tmp_path, environment(settings)))

    try:
        codes = [worker.process.wait(90) for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()
    assert set(codes) <= {1, 2}
    for worker, (_, says) in zip(workers, cases, strict=True):
        (line,) = worker.log_path.read_text().splitlines()
        assert line.startswith("recur: ")
        assert says in line
        assert_holds_no_secret(line)


def test_recur_settings_shows_no_secret(site: Site) -> None:
    settings = site.settings(
        kafka_ssl_key_password="key-secret",
        redis_url=f"rediss://recur:wrong-secret@{HOST}:1/0?password=wrong-secret",
    )

    shown = recur(settings, "settings")

    assert shown.returncode == 0
    assert_holds_no_secret(shown.stdout + shown.stderr)
    assert shown.stdout.count("**********") >= 5


def test_an_operator_may_give_the_scores_topic_more_partitions(site: Site) -> None:
    """`recur state repartition` does this. The test is the last: the others need two partitions."""
    settings = site.settings(
        kafka_sasl_username=OPERATOR, kafka_sasl_password=KAFKA_PASSWORDS[OPERATOR]
    )

    asyncio.run(add_partitions(load_settings(**settings), "scores", 3))
    with pytest.raises(RecurError, match=r"ClusterAuthorization|TopicAuthorization"):
        asyncio.run(add_partitions(load_settings(**settings), "transactions", 3))
