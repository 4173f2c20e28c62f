"""Checks before webhooks are delivered; a failed one ends the start with one line.

A missing right would show late otherwise: at the first retry, dead letter or answer 410.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import StartupError
from pipeline.kafka.acl import WEBHOOK_NEEDS, check_webhook_permissions
from pipeline.kafka.topics import partition_count
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError, retry_within
from pipeline.webhooks.runner import group_of
from pipeline.webhooks.switches import Switches
from pipeline.worker.preflight import check_redis


async def check_webhook_services(settings: Settings, endpoints: Sequence[str]) -> None:
    """Check the topics, this user's rights on them and on the groups, and Redis.

    Args:
        settings: name broker and Redis.
        endpoints: names of the endpoints.

    Raises:
        RecurError: a check failed; the message says what to do.
    """
    for role in WEBHOOK_NEEDS:
        topic = settings.topic(role)
        if await partition_count(settings, topic) is None:
            raise StartupError(
                f"there is no topic {topic}, or this user may not see it: start a worker first,"
                " which creates it, or correct RECUR_TOPIC_PREFIX; docs/security.md lists all"
                " rights that it needs"
            )
    await check_webhook_permissions(settings, [group_of(settings, name) for name in endpoints])
    switches = Switches.from_settings(settings)
    try:
        await check_redis(settings, switches.servers)
        await retry_within(settings.startup_timeout_seconds, switches.check_access)
    except StoreUnavailableError as error:
        raise StartupError(
            f"Redis went away during the start ({error}): see that it is up, and start again"
        ) from error
    finally:
        await switches.close()
