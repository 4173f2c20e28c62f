"""What must be right before a worker takes its first partition.

Each check that fails ends the start with one line that says what to do.
"""

from __future__ import annotations

import logging

from model.checkpoint import Checkpoint
from model.features.account import FeatureSpec
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
from pipeline.storage.client import IS_A_CLUSTER, StoreAddressError, retry_within
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.servers import unreachable_nodes
from pipeline.storage.state_store import RedisStateStore, StoreUnavailableError
from pipeline.topic_id import NO_ID, is_other, other_log

RECORDS_LOOKED_AT = 400
"""So many of the last transactions tell which fields there are; from one partition or more."""

_LOGIN_SIGNS = ("WRONGPASS", "NOAUTH", "AuthenticationError", "invalid username-password")

log = logging.getLogger(__name__)


async def check_services(settings: Settings, checkpoint: Checkpoint) -> int:
    """Broker, topics, Redis and watermarks are as they must be; missing topics are created.

    Returns:
        the partition count of the transactions topic.

    Raises:
        StartupError: something is not right; the message says what to do.
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
        await _check_redis(settings, store)
        await score_log.start()
        await _check_watermarks(settings, store, score_log, partitions)
        await _check_labels(settings, merchant_store, score_log, counts["labels"])
        await _check_fields(settings, checkpoint.header.features, score_log, partitions)
    finally:
        await score_log.stop()
        await store.close()
        await merchant_store.close()
    return partitions


async def _check_redis(settings: Settings, store: RedisStateStore) -> None:
    address = redis_address(settings.redis_url)
    try:
        servers = await retry_within(settings.startup_timeout_seconds, store.servers)
    except StoreUnavailableError as error:
        away = await unreachable_nodes(settings)
        if away:
            raise StartupError(
                f"the Redis Cluster at {address} announces {', '.join(away)}, where nothing"
                " answers from here: set cluster-announce-ip and cluster-announce-port of its nodes"
                " to addresses that workers reach, or start those nodes"
            ) from error
        raise StartupError(_redis_hint(address, str(error))) from error
    for server in servers:
        if server.is_sentinel:
            raise StartupError(
                f"at {address} a Sentinel answers, which holds no data: set RECUR_REDIS_URL to"
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


def _redis_hint(address: str, said: str) -> str:
    """What a first call to Redis failed with, as the setting to correct."""
    if "unknown command" in said and "SENTINEL" in said.upper().partition("UNKNOWN COMMAND")[2]:
        return (
            f"at {address} no Sentinel answers, but a Redis: set RECUR_REDIS_URL to redis:// and"
            " its address, or to the Sentinels' (port 26379 as a rule)"
        )
    if "MasterNotFound" in said:
        return (
            f"the Sentinels at {address} do not answer, or know no primary of that name, or none"
            f" that is up ({said}): correct RECUR_REDIS_URL, RECUR_REDIS_SENTINEL_PASSWORD where"
            " they have a password, or see `redis-cli -p 26379 sentinel masters`"
        )
    if any(sign in said for sign in _LOGIN_SIGNS):
        return (
            f"the Redis at {address} refuses the login ({said}): correct RECUR_REDIS_USERNAME and"
            " RECUR_REDIS_PASSWORD"
        )
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return (
            f"the Redis at {address} shows a certificate that is not trusted ({said}): set"
            " RECUR_REDIS_SSL_CAFILE to the authorities that signed it, and RECUR_REDIS_URL to a"
            " host that is named in it"
        )
    if "SSL" in said:
        return (
            f"the Redis at {address} and we do not agree on TLS ({said}): correct RECUR_REDIS_URL"
            " (rediss:// is with TLS), or RECUR_REDIS_SSL_CERTFILE where it asks for a client's"
            " certificate"
        )
    return f"no Redis answers at {address} ({said}): start one, or set RECUR_REDIS_URL"


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
            continue  # whoever takes the partition begins it
        check_watermark(topic, partition, mark, partitions, ends[partition], log_id)


async def _check_labels(
    settings: Settings, store: RedisMerchantStore, score_log: KafkaScoreLog, partitions: int
) -> None:
    """No labels are booked past the end of their log: those to come would count as booked."""
    topic = settings.topic("labels")
    try:
        # In this order: running workers record labels meanwhile, and may start a newer log.
        named = {p: await store.labels_log(p, None) for p in range(partitions)}
        booked = {p: await store.recorded_to(p) for p in range(partitions)}
        ends = await score_log.ends(topic, list(range(partitions)))
        log_id = await score_log.topic_id(topic) or NO_ID
    except (StoreUnavailableError, LogUnavailableError) as error:
        raise StartupError(f"cannot compare the recorded labels with the log: {error}") from error
    for partition, end in ends.items():
        known = named[partition] or NO_ID
        if is_other(known, log_id):
            if settings.on_new_log == "begin":
                continue  # whoever takes the partition begins it
            raise other_log(topic, known, log_id, "recorded labels")
        if booked[partition] > end:
            raise StartupError(
                f"labels in Redis are booked past the end of {topic}-{partition} (offset "
                f"{booked[partition]}, the log ends at {end}): the topic was recreated or "
                "truncated. Run `recur state rebuild --new-log` to book its labels from its begin"
            )


def check_names(features: FeatureSpec) -> None:
    """The checkpoint's further fields are such as a transaction may have besides the others.

    Raises:
        StartupError: they are not.
    """
    wrong = sorted({field.name for field in features.fields} & ALWAYS_THERE)
    if wrong:
        raise StartupError(
            f"the checkpoint looks at the field {', '.join(wrong)} as if it were a further one, "
            "but every transaction has it: train with a mapping that gives it another name"
        )


async def _check_fields(
    settings: Settings, features: FeatureSpec, score_log: KafkaScoreLog, partitions: int
) -> None:
    """The topic's last transactions carry the further fields that the checkpoint looks at."""
    if not features.fields:
        return
    topic = settings.topic("transactions")
    missing = {field.name for field in features.fields}
    seen = 0
    try:
        for partition in range(partitions):
            for value in await score_log.last_values(topic, partition, RECORDS_LOOKED_AT):
                names = field_names(value)
                seen += bool(names)
                missing -= names
            if not missing or seen >= RECORDS_LOOKED_AT:
                break
    except LogUnavailableError as error:
        raise StartupError(f"cannot look at the transactions in {topic}: {error}") from error
    if not seen:
        log.info(
            "no transactions yet; the checkpoint expects fields", extra={"fields": sorted(missing)}
        )
        return
    if missing:
        raise StartupError(
            f"the checkpoint looks at the field {', '.join(sorted(missing))}, and none of the "
            f"last {seen} transactions in {topic} carries it: have the producers send what the "
            "checkpoint was trained with, or set RECUR_CHECKPOINT to one trained without it"
        )
