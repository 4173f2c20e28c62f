"""Checks before a worker takes its first partition.

A failed check ends the start with one line that says what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from model.checkpoint import Checkpoint
from model.features.spec import FeatureSpec
from pipeline.errors import StartupError
from pipeline.kafka.acl import check_permissions
from pipeline.kafka.message_limits import MessageLimits
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import check_retention, ensure_topics
from pipeline.messages.extra_fields import ALWAYS_THERE
from pipeline.messages.transactions import field_names
from pipeline.scoring.watermark_check import check_watermark, read_watermark
from pipeline.settings import Settings, redis_address
from pipeline.storage.client import (
    IS_A_CLUSTER,
    StoreAddressError,
    StoreUnavailableError,
    retry_within,
)
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.servers import RedisServer, unreachable_nodes
from pipeline.storage.state_store import RedisStateStore
from pipeline.topic_id import NO_ID, is_other, other_log

RECORDS_CHECKED = 400
"""Number of the last transactions whose fields are checked."""

_LOGIN_SIGNS = ("WRONGPASS", "NOAUTH", "AuthenticationError", "invalid username-password")

log = logging.getLogger(__name__)


async def check_services(settings: Settings, checkpoint: Checkpoint) -> int:
    """Check broker, topics, Redis and watermarks; create missing topics.

    Returns:
        partition count of the transactions topic.

    Raises:
        StartupError: a check failed; the message says what to do.
    """
    check_names(checkpoint.header.features)
    counts = await ensure_topics(settings)
    partitions = counts["transactions"]
    await check_permissions(settings)
    await check_retention(settings)
    await MessageLimits(settings).read()
    store = RedisStateStore.from_settings(settings, checkpoint.digest)
    merchant_store = RedisMerchantStore.from_settings(settings)
    score_log = KafkaScoreLog(settings)
    try:
        await check_redis(settings, store.servers)
        await score_log.start()
        await _check_watermarks(settings, store, score_log, partitions)
        await _check_labels(settings, merchant_store, score_log, counts["labels"])
        await _check_fields(settings, checkpoint.header.features, score_log, partitions)
    finally:
        await score_log.stop()
        await store.close()
        await merchant_store.close()
    return partitions


async def check_redis(
    settings: Settings, describe: Callable[[], Awaitable[Sequence[RedisServer]]]
) -> None:
    """Check that Redis answers, is a primary, and evicts nothing.

    Args:
        settings: name the Redis.
        describe: asks it (:func:`pipeline.storage.servers.servers`).

    Raises:
        StartupError, StoreAddressError: a check failed; the message says what to do.
        StoreForbiddenError: Redis forbids the user to ask.
    """
    address = redis_address(settings.redis_url)
    try:
        servers = await retry_within(settings.startup_timeout_seconds, describe)
    except StoreUnavailableError as error:
        away = await unreachable_nodes(settings)
        if away:
            raise StartupError(
                f"the Redis Cluster at {address} announces {', '.join(away)}, where no"
                " Redis answers this worker: set cluster-announce-ip and cluster-announce-port of"
                " its nodes to addresses that workers reach, or start those nodes"
            ) from error
        raise StartupError(_redis_hint(address, str(error))) from error
    for server in servers:
        if server.is_sentinel:
            raise StartupError(
                f"a Sentinel answers at {address}, and holds no data: set RECUR_REDIS_URL to"
                " redis+sentinel://host:26379/ and the name of the primary (`redis-cli -p 26379"
                " sentinel masters` prints it)"
            )
        if server.may_evict:
            raise StartupError(
                f"the Redis at {server.name or address} has maxmemory-policy {server.policy}, so it"
                " would evict account states: set it to noeviction (redis-cli config set"
                " maxmemory-policy noeviction, or the provider's parameter of that name)"
            )
        if server.is_replica:
            raise StartupError(
                f"the Redis at {address} is a replica and refuses writes: set RECUR_REDIS_URL to"
                " its primary, or to redis+sentinel://, which follows the primary"
            )
        if server.is_of_cluster and not settings.redis_cluster:
            raise StoreAddressError(IS_A_CLUSTER)


def _redis_hint(address: str, error: str) -> str:
    """Turn the error of a first call to Redis into the setting to correct."""
    if "unknown command" in error and "SENTINEL" in error.upper().partition("UNKNOWN COMMAND")[2]:
        return (
            f"a Redis answers at {address}, and no Sentinel: set RECUR_REDIS_URL to redis:// and"
            " its address, or to the address of the Sentinels (usually port 26379)"
        )
    if "MasterNotFound" in error:
        return (
            f"the Sentinels at {address} do not answer, or know no running primary of that name"
            f" ({error}): correct RECUR_REDIS_URL, or RECUR_REDIS_SENTINEL_PASSWORD if they have a"
            " password, or see `redis-cli -p 26379 sentinel masters`"
        )
    if any(sign in error for sign in _LOGIN_SIGNS):
        return (
            f"the Redis at {address} refuses the login ({error}): correct RECUR_REDIS_USERNAME and"
            " RECUR_REDIS_PASSWORD"
        )
    if "CERTIFICATE_VERIFY_FAILED" in error:
        return (
            f"the Redis at {address} presents a certificate that is not trusted ({error}): set"
            " RECUR_REDIS_SSL_CAFILE to the authorities that signed it, and RECUR_REDIS_URL to a"
            " host that is named in it"
        )
    if "SSL" in error:
        return (
            f"the Redis at {address} and this worker do not agree on TLS ({error}): correct"
            " RECUR_REDIS_URL (rediss:// uses TLS), or RECUR_REDIS_SSL_CERTFILE if Redis asks for a"
            " client's certificate"
        )
    return f"no Redis answers at {address} ({error}): start one, or set RECUR_REDIS_URL"


async def _check_watermarks(
    settings: Settings, store: RedisStateStore, score_log: KafkaScoreLog, partitions: int
) -> None:
    topic = settings.topic("transactions")
    try:
        marks = await store.watermarks(partitions)
        ends = await score_log.ends(topic, list(range(partitions)))
        log_id = await score_log.topic_id(topic) or NO_ID  # last: the ends may be a newer log's
    except (StoreUnavailableError, LogUnavailableError) as error:
        raise StartupError(f"cannot compare the states with the log: {error}") from error
    for partition, value in marks.items():
        mark = read_watermark(topic, partition, value)
        if settings.on_new_log == "begin" and is_other(mark.log_id, log_id):
            continue  # the next owner of the partition begins the new log
        check_watermark(topic, partition, mark, partitions, ends[partition], log_id)


async def _check_labels(
    settings: Settings, store: RedisMerchantStore, score_log: KafkaScoreLog, partitions: int
) -> None:
    """Check that the labels' watermarks belong to their log, and do not lie past its end.

    Otherwise new labels would count as recorded.
    """
    topic = settings.topic("labels")
    try:
        # In this order: running workers go on recording, and may begin a newer log.
        known_logs = {p: await store.labels_log(p, None) for p in range(partitions)}
        recorded = {p: await store.recorded_to(p) for p in range(partitions)}
        ends = await score_log.ends(topic, list(range(partitions)))
        log_id = await score_log.topic_id(topic) or NO_ID
    except (StoreUnavailableError, LogUnavailableError) as error:
        raise StartupError(
            f"cannot compare the labels' watermarks with the log: {error}"
        ) from error
    for partition, end in ends.items():
        known = known_logs[partition] or NO_ID
        if is_other(known, log_id):
            if settings.on_new_log == "begin":
                continue  # the next owner of the partition begins the new log
            raise other_log(topic, known, log_id, "recorded labels")
        if recorded[partition] > end:
            raise StartupError(
                f"labels in Redis are recorded past the end of {topic}-{partition} (offset "
                f"{recorded[partition]}, the log ends at {end}): the topic was recreated or "
                "truncated. Run `recur state rebuild --new-log` to record its labels from its begin"
            )


def check_names(features: FeatureSpec) -> None:
    """Check that the checkpoint's extra fields are not fields that every transaction has.

    Raises:
        StartupError: one of them is.
    """
    wrong = sorted({field.name for field in features.fields} & ALWAYS_THERE)
    if wrong:
        raise StartupError(
            f"the checkpoint uses the field {', '.join(wrong)} as an extra field, "
            "but every transaction has it: train with a mapping that gives it another name"
        )


async def _check_fields(
    settings: Settings, features: FeatureSpec, score_log: KafkaScoreLog, partitions: int
) -> None:
    """Check that the topic's last transactions have the checkpoint's extra fields."""
    if not features.fields:
        return
    topic = settings.topic("transactions")
    missing = {field.name for field in features.fields}
    seen = 0
    try:
        for partition in range(partitions):
            for value in await score_log.last_values(topic, partition, RECORDS_CHECKED):
                names = field_names(value)
                seen += bool(names)
                missing -= names
            if not missing or seen >= RECORDS_CHECKED:
                break
    except LogUnavailableError as error:
        raise StartupError(f"cannot read the transactions in {topic}: {error}") from error
    if not seen:
        log.info(
            "no transactions yet; the checkpoint expects fields", extra={"fields": sorted(missing)}
        )
        return
    if missing:
        raise StartupError(
            f"the checkpoint uses the field {', '.join(sorted(missing))}, and none of the "
            f"last {seen} transactions in {topic} has it: let the producers send the fields of "
            "the training, or set RECUR_CHECKPOINT to a checkpoint trained without them"
        )
