"""The topics: their creation, partitions, retention and limits.

A worker, the demo and a replay call :func:`ensure_topics` first. Several may do so at once.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import collect_hosts, create_conn

from model.units import DAY_MS
from pipeline.errors import StartupError
from pipeline.kafka.metadata_request import ask_ids
from pipeline.logs import quiet
from pipeline.oauth_tokens import TokenRefusedError, TokenUnavailableError
from pipeline.settings import Settings

log = logging.getLogger(__name__)

TopicRole = Literal["transactions", "scores", "alerts", "labels", "dead_letter", "audit"]
ALL_ROLES: tuple[TopicRole, ...] = get_args(TopicRole)
ROLES: tuple[TopicRole, ...] = tuple(role for role in ALL_ROLES if role != "audit")
"""Roles of the topics that workers use. Only gateways and commands write to the audit topic."""

AUDIT_PARTITIONS = 1
"""One partition, so that all acts are in one order. They are few: labels and acts of people."""

RETRY_SECONDS = 0.25
"""Time between two attempts while the broker is away or a new topic is not visible yet."""

LOGS: Mapping[TopicRole, str] = {
    "transactions": "accounts' states",
    "scores": "states and merchants' features",
    "labels": "merchants' known frauds",
}
"""The data that is computed from each topic. Compaction would damage it."""

SHORT_LOGS: Mapping[TopicRole, str] = {
    "transactions": "after a loss of Redis's data, or in a rebuild, accounts get back only the"
    " history that the topic still has",
    "scores": "a rebuild lacks the merchants' features of older transactions, so its states differ",
}
"""The effect of a topic whose records are deleted before states expire."""

REFUSAL_SECONDS = 5.0
"""Longest wait for a broker to say why it refuses a connection."""

NO_COORDINATOR_YET = (  # a new broker creates its topic of groups at the first request
    kafka_errors.GroupCoordinatorNotAvailableError,
    kafka_errors.GroupLoadInProgressError,
)
_NOT_ALLOWED = (
    "create it by hand, or allow this user (RECUR_KAFKA_SASL_USERNAME) to create topics; if it"
    " exists, allow this user to use it: docs/security.md lists all that a worker needs"
)
_HINTS = {
    "InvalidReplicationFactorError": "lower RECUR_KAFKA_REPLICATION_FACTOR to the brokers' number",
    "TopicAuthorizationFailedError": _NOT_ALLOWED,
    "ClusterAuthorizationFailedError": _NOT_ALLOWED,
    "PolicyViolationError": "create it by hand as the brokers' policy demands",
    "InvalidPartitionsError": "change RECUR_TOPIC_PARTITIONS",
}


async def ensure_topics(
    settings: Settings, roles: Sequence[TopicRole] = ROLES
) -> dict[TopicRole, int]:
    """Create the missing topics.

    An existing topic stays as it is, whatever ``settings.topic_partitions`` says. A missing scores
    topic gets as many partitions as the transactions topic has. Waits up to
    ``settings.startup_timeout_seconds`` for the broker.

    Args:
        settings: name the broker and the topics.
        roles: the topics that this user may use; transactions and scores are among them.

    Returns:
        the number of partitions of each topic.

    Raises:
        StartupError: the broker does not answer or refuses to create a topic, or scores and
            transactions differ in their number of partitions.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    async with admin_client(settings, deadline) as admin:
        counts = await _create_missing(admin, settings, roles, deadline)
    if counts["scores"] != counts["transactions"]:
        raise StartupError(
            f"topic {settings.topic('scores')} has {counts['scores']} partitions and"
            f" {settings.topic('transactions')} has {counts['transactions']}; a score goes to its"
            " transaction's partition number: run kafka-topics --alter on the smaller one with"
            f" --partitions {max(counts['scores'], counts['transactions'])},"
            " or set another RECUR_SCORES_TOPIC"
        )
    return counts


async def ensure_audit_topic(settings: Settings) -> None:
    """Create the audit topic if it is missing.

    Raises:
        StartupError: the broker does not answer or refuses to create it.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    name = settings.topic("audit")
    async with admin_client(settings, deadline) as admin:
        if name not in await _partition_counts(admin):
            days = settings.audit_retention_days
            await _create(admin, settings, {name: AUDIT_PARTITIONS}, days)
            await _visible(admin, {name}, deadline)


async def partition_count(settings: Settings, topic: str) -> int | None:
    """Count the partitions of a topic without creating it; None if it does not exist.

    Raises:
        StartupError: the broker does not answer.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    async with admin_client(settings, deadline) as admin:
        return (await _partition_counts(admin)).get(topic)


async def topic_ids(
    settings: Settings, roles: Sequence[TopicRole] = ("transactions", "scores", "labels")
) -> dict[str, bytes]:
    """Ask for the ids of topics, by full name.

    Raises:
        StartupError: the broker does not answer.
    """
    async with admin_client(settings) as admin:
        return await ask_ids(admin._client, [settings.topic(role) for role in roles])


@dataclass(frozen=True)
class Retention:
    """Retention of a topic's records.

    Attributes:
        is_deleted: whether the broker deletes records by their age.
        retention_ms: time from a segment's last record to its deletion, milliseconds; -1: never.
        segment_ms: longest time that a segment accepts records, milliseconds.
    """

    is_deleted: bool
    retention_ms: int
    segment_ms: int

    @property
    def longest_ms(self) -> int | None:
        """Longest age of a record, but for minutes; None if records are never deleted."""
        if not self.is_deleted or self.retention_ms < 0:
            return None
        return self.retention_ms + self.segment_ms


async def retentions(settings: Settings) -> dict[TopicRole, Retention | None]:
    """Ask for the retention of the topics that exist; None if the broker does not tell.

    Raises:
        StartupError: the broker does not answer.
    """
    return {
        role: None
        if values is None
        else Retention(
            "delete" in values["cleanup.policy"],
            int(values["retention.ms"]),
            int(values["segment.ms"]),
        )
        for role, values in (await _configurations(settings)).items()
    }


async def _configurations(settings: Settings) -> dict[TopicRole, dict[str, str] | None]:
    """Ask for the configuration of the topics that exist; None if the broker does not tell."""
    deadline = time.monotonic() + settings.startup_timeout_seconds
    found: dict[TopicRole, dict[str, str] | None] = {}
    async with admin_client(settings, deadline) as admin:
        counts = await _partition_counts(admin)
        for role in ROLES:
            name = settings.topic(role)
            if name not in counts:
                continue
            asked = [ConfigResource(ConfigResourceType.TOPIC, name)]
            ((error, _, _, _, entries),) = (await admin.describe_configs(asked))[0].resources
            found[role] = None if error else {entry[0]: entry[1] for entry in entries}
    return found


async def batch_limits(settings: Settings, roles: Iterable[TopicRole]) -> dict[TopicRole, int]:
    """Ask for the largest batch that each topic accepts, bytes; left out if it is not told.

    Raises:
        StartupError: the broker does not answer.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    found: dict[TopicRole, int] = {}
    async with admin_client(settings, deadline) as admin:
        for role in roles:
            asked = [ConfigResource(ConfigResourceType.TOPIC, settings.topic(role))]
            ((error, _, _, _, entries),) = (await admin.describe_configs(asked))[0].resources
            values = {entry[0]: entry[1] for entry in entries}
            limits = [int(values[n]) for n in ("max.message.bytes", "segment.bytes") if n in values]
            if limits and not error:
                found[role] = min(limits)
    return found


async def check_retention(settings: Settings) -> None:
    """Check that no log of states is compacted, and warn of one that is kept too short.

    Raises:
        StartupError: a topic is compacted. The message names the policy and what to do.
    """
    configurations = await _configurations(settings)
    for role in LOGS:
        values = configurations.get(role)
        if values is not None and "compact" in values["cleanup.policy"]:
            raise StartupError(_compacted(settings, role, values["cleanup.policy"]))
    unknown = [settings.topic(role) for role in LOGS if configurations.get(role) is None]
    if unknown:
        log.info(
            "the broker does not tell the compaction and retention of these topics: allow this user"
            " DescribeConfigs on them",
            extra={"topics": unknown},
        )
    dead_letter = configurations.get("dead_letter")
    if dead_letter is not None and "compact" in dead_letter["cleanup.policy"]:
        log.warning(
            "the dead-letter topic is compacted: it keeps only the last record of each key",
            extra={"topic": settings.topic("dead_letter")},
        )
    for role, what in SHORT_LOGS.items():
        values = configurations.get(role)
        ttl_ms = settings.state_ttl_days * DAY_MS
        if values is not None and 0 <= int(values["retention.ms"]) < ttl_ms:
            log.warning(
                f"the topic's records are deleted before states expire: {what}; raise its"
                " retention.ms, or lower RECUR_STATE_TTL_DAYS",
                extra={
                    "topic": settings.topic(role),
                    "retention_days": round(int(values["retention.ms"]) / DAY_MS, 2),
                    "state_ttl_days": settings.state_ttl_days,
                },
            )


def _compacted(settings: Settings, role: TopicRole, policy: str) -> str:
    topic = settings.topic(role)
    return (
        f"topic {topic} has cleanup.policy {policy}: compaction deletes all but the last record of"
        f" a key, and with it the log that {LOGS[role]} are computed from. Run kafka-configs.sh"
        f" --bootstrap-server {settings.kafka_bootstrap_servers} --alter --entity-type topics"
        f" --entity-name {topic} --add-config cleanup.policy=delete, and start again"
    )


async def add_partitions(settings: Settings, topic: str, total: int) -> None:
    """Add partitions to a topic, and return once they have leaders.

    Raises:
        StartupError: the broker does not answer, or refuses.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    async with admin_client(settings, deadline) as admin:
        await admin.create_partitions({topic: NewPartitions(total_count=total)})
        while (await _partition_counts(admin, led=True)).get(topic) != total:
            if time.monotonic() > deadline:
                raise StartupError(
                    f"topic {topic} got {total} partitions, but some have no leader: see that"
                    " enough brokers are up, and start again"
                )
            await asyncio.sleep(RETRY_SECONDS)


async def group_members(settings: Settings) -> int:
    """Count the workers in the consumer group.

    Raises:
        StartupError: the broker does not answer.
    """
    deadline = time.monotonic() + settings.startup_timeout_seconds
    async with admin_client(settings, deadline) as admin:
        while True:
            try:
                (reply,) = await admin.describe_consumer_groups([settings.kafka_group_id])
            except NO_COORDINATOR_YET:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
                continue
            ((_, _, _, _, _, members, *_),) = reply.groups
            return len(members)


@asynccontextmanager
async def admin_client(settings: Settings, deadline: float | None = None) -> AsyncIterator[Any]:
    """Connect an admin client, and turn its errors into StartupError.

    Args:
        settings: name the broker.
        deadline: end of the wait for the broker (``time.monotonic``); by default
            ``settings.startup_timeout_seconds`` from now.

    Raises:
        StartupError: the broker does not answer or refuses the connection.
    """
    if deadline is None:
        deadline = time.monotonic() + settings.startup_timeout_seconds
    with quiet("aiokafka"):  # it logs each attempt; our error reports the failure once
        admin = await _connect(settings, deadline)
    try:
        yield admin
    except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
        raise StartupError(
            f"the broker at {settings.kafka_bootstrap_servers} gave no answer about topics"
            f" ({_describe(error)}): see that it is up, and start again"
        ) from error
    finally:
        await admin.close()


async def _connect(settings: Settings, deadline: float) -> Any:
    """Connect an admin client; retry until the deadline (``time.monotonic``)."""
    while True:
        admin = AIOKafkaAdminClient(
            **settings.kafka_client_options(),
            request_timeout_ms=round(settings.startup_timeout_seconds * 1000),
        )
        try:
            await asyncio.wait_for(admin.start(), max(0.1, deadline - time.monotonic()))
            return admin
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            await admin.close()
            if time.monotonic() + RETRY_SECONDS > deadline:
                refusal = await _refusal(settings)
                if refusal is not None:
                    raise StartupError(refusal) from error
                raise StartupError(
                    f"no Kafka broker answers at {settings.kafka_bootstrap_servers}"
                    f" ({_describe(error)}): start one, or correct RECUR_KAFKA_BOOTSTRAP_SERVERS or"
                    " the RECUR_KAFKA_SASL_ and RECUR_KAFKA_SSL_ settings"
                ) from error
            await asyncio.sleep(RETRY_SECONDS)


async def _refusal(settings: Settings) -> str | None:
    """Find out why a broker refuses the connection, and name the setting to correct.

    The clients tell only that there is no connection. So this tries one more.

    Returns:
        the reason, or None if no broker refuses a connection.
    """
    options = settings.kafka_client_options()
    for host, port, _ in collect_hosts(options.pop("bootstrap_servers")):
        try:
            connection = await create_conn(
                host, port, request_timeout_ms=round(REFUSAL_SECONDS * 1000), **options
            )
        except (kafka_errors.KafkaError, ValueError, OSError, TimeoutError) as error:
            hint = _hint(error)
            if hint is not None:
                return f"the broker at {host}:{port} {hint}"
        else:
            connection.close()
    return None


# ValueError: aiokafka found that the server does not know the password either.
_LOGIN_REFUSED = (
    kafka_errors.AuthenticationFailedError,
    kafka_errors.SaslAuthenticationFailed,
    ValueError,
)


def _hint(error: BaseException) -> str | None:
    """Name the setting to correct for a failed connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"shows a certificate that is not trusted ({error.verify_message}): set"
            " RECUR_KAFKA_SSL_CAFILE to the authorities that signed it, and"
            " RECUR_KAFKA_BOOTSTRAP_SERVERS to a host that it names"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"and we do not agree on TLS ({error.reason}): correct RECUR_KAFKA_SECURITY_PROTOCOL,"
            " the port in RECUR_KAFKA_BOOTSTRAP_SERVERS, or RECUR_KAFKA_SSL_CERTFILE if it asks"
            " for a client's certificate"
        )
    if isinstance(error, kafka_errors.UnsupportedSaslMechanismError):
        return f"does not take RECUR_KAFKA_SASL_MECHANISM ({_describe(error)})"
    if isinstance(error, TokenRefusedError | TokenUnavailableError):
        return (
            f"asks for a token, and {error}: correct RECUR_KAFKA_OAUTH_TOKEN_URL,"
            " RECUR_KAFKA_SASL_USERNAME, RECUR_KAFKA_SASL_PASSWORD or RECUR_KAFKA_OAUTH_SCOPE"
        )
    if isinstance(error, _LOGIN_REFUSED):
        return (
            "refuses the login: correct RECUR_KAFKA_SASL_USERNAME, RECUR_KAFKA_SASL_PASSWORD or"
            " RECUR_KAFKA_SASL_MECHANISM"
        )
    return None


async def _create_missing(
    admin: Any, settings: Settings, roles: Sequence[TopicRole], deadline: float
) -> dict[TopicRole, int]:
    names = {settings.topic(role): role for role in roles}
    counts = await _partition_counts(admin)
    transactions = settings.topic("transactions")
    if transactions not in counts:
        await _create(admin, settings, {transactions: settings.topic_partitions})
        counts |= await _visible(admin, {transactions}, deadline)
    missing = {name: settings.topic_partitions for name in names if name not in counts}
    if settings.topic("scores") in missing:
        missing[settings.topic("scores")] = counts[transactions]
    if missing:
        await _create(admin, settings, missing)
        counts |= await _visible(admin, set(missing), deadline)
    return {role: counts[name] for name, role in names.items()}


async def _partition_counts(admin: Any, *, led: bool = False) -> dict[str, int]:
    """Count the partitions of each topic; with ``led``, of topics without a leaderless partition.

    Asks for all topics, since a request for one by name may create it.
    """
    return {
        topic["topic"]: len(topic["partitions"])
        for topic in await admin.describe_topics()
        if topic["partitions"]
        and not (led and any(part["leader"] < 0 for part in topic["partitions"]))
    }


async def _visible(admin: Any, names: set[str], deadline: float) -> dict[str, int]:
    """Wait until all of ``names`` exist with leaders; return all partition counts."""
    while True:
        counts = await _partition_counts(admin, led=True)
        absent = sorted(names - counts.keys())
        if not absent:
            return counts
        if time.monotonic() > deadline:
            raise StartupError(
                f"topic {', '.join(absent)} was created but has partitions without a leader:"
                " see that enough brokers are up, and start again"
            )
        await asyncio.sleep(RETRY_SECONDS / 5)


async def _create(
    admin: Any,
    settings: Settings,
    partitions: dict[str, int],
    retention_days: float | None = None,
) -> None:
    days = settings.log_retention_days if retention_days is None else retention_days
    retention_ms = str(round(days * DAY_MS))
    reply = await admin.create_topics(
        [
            NewTopic(
                name=name,
                num_partitions=count,
                replication_factor=settings.kafka_replication_factor,
                topic_configs={"retention.ms": retention_ms, "cleanup.policy": "delete"},
            )
            for name, count in partitions.items()
        ]
    )
    for name, code, *message in reply.topic_errors:
        error = kafka_errors.for_code(code)
        if error in (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError):
            continue  # another worker may have created it first
        text = next(iter(message), None) or error.description or error.__name__
        hint = _HINTS.get(error.__name__, "see the broker's log")
        raise StartupError(f"the broker refused to create topic {name} ({text}): {hint}")


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    text = str(error).removeprefix(f"{name}: ")  # aiokafka's errors begin with their name
    return " ".join(f"{name}: {text}".rstrip(": ").split())
