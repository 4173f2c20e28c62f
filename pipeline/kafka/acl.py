"""Checks of the permissions that a process needs, at its start.

A missing permission would show late otherwise, at the first alert or the first crash, and the
clients would wait for it in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import errors as kafka_errors
from aiokafka.protocol.admin import DescribeGroupsRequest_v3, DescribeGroupsResponse_v3
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

from pipeline.errors import StartupError
from pipeline.kafka.topics import NO_COORDINATOR_YET, TopicRole, admin_client
from pipeline.settings import Settings

READ, WRITE, DESCRIBE = "Read", "Write", "Describe"

NEEDS: Mapping[TopicRole, tuple[str, ...]] = {
    "transactions": (READ,),
    "scores": (READ, WRITE),
    "alerts": (WRITE,),
    "labels": (READ,),
    "dead_letter": (WRITE,),
}
"""Operations of a worker on each topic."""

GATEWAY_NEEDS: Mapping[TopicRole, tuple[str, ...]] = {
    "transactions": (READ, WRITE),
    "scores": (READ,),
    "alerts": (READ,),
    "labels": (WRITE,),
    "audit": (WRITE,),
}
"""Operations of a gateway on each topic. It reads without a group, and describes the workers'."""

WEBHOOK_NEEDS: Mapping[TopicRole, tuple[str, ...]] = {
    "alerts": (READ,),
    "transactions": (READ,),
    "dead_letter": (WRITE,),
}
"""Operations of `recur webhooks` on each topic. It also reads as a group of each endpoint."""

_OPERATIONS = {READ: 3, WRITE: 4, DESCRIBE: 8}  # Kafka's numbers: positions of bits in its answer
_UNKNOWN = -(2**31)
_TEXT = String("utf-8")
_TOO_OLD = (NotImplementedError, kafka_errors.IncompatibleBrokerVersion)


class _MetadataResponse(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("brokers", Array(("node_id", Int32), ("host", _TEXT), ("port", Int32), ("rack", _TEXT))),
        ("cluster_id", _TEXT),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", _TEXT),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _MetadataRequestStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", Array(_TEXT)),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _TopicPermissionsRequest(Request[_MetadataRequestStruct]):  # type: ignore[misc]
    """Metadata request for our permissions, in a version that aiokafka does not have."""

    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: type[_MetadataRequestStruct]) -> _MetadataRequestStruct:
        return request_struct_class(self._topics, False, False, True)


class _GroupRequestStruct(DescribeGroupsRequest_v3):  # type: ignore[misc]
    RESPONSE_TYPE = DescribeGroupsResponse_v3  # aiokafka reads version 2, without permissions


class _GroupPermissionsRequest(Request[_GroupRequestStruct]):  # type: ignore[misc]
    """Request for a description of a group with our permissions."""

    API_KEY = _GroupRequestStruct.API_KEY

    def __init__(self, group: str) -> None:
        self._group = group

    def build(self, request_struct_class: type[_GroupRequestStruct]) -> _GroupRequestStruct:
        return request_struct_class([self._group], True)


async def check_permissions(settings: Settings) -> None:
    """Check that the broker allows the user what a worker does.

    Raises:
        StartupError: the broker does not answer, or a permission is missing. The message names it.
    """
    async with admin_client(settings) as admin:
        allowed = await _topic_operations(admin, [settings.topic(role) for role in NEEDS])
        of_group = await _group_operations(admin, settings.kafka_group_id)
    needs = dict(NEEDS)
    if not settings.update_merchant_profiles:
        del needs["labels"]
    _check_topics(settings, needs, allowed)
    if not _holds(of_group, READ):
        raise _missing(settings, READ, f"group {settings.kafka_group_id}")


async def check_gateway_permissions(settings: Settings) -> None:
    """Check that the broker allows the user what a gateway does.

    Raises:
        StartupError: the broker does not answer, or a permission is missing. The message names it.
    """
    async with admin_client(settings) as admin:
        allowed = await _topic_operations(admin, [settings.topic(role) for role in GATEWAY_NEEDS])
        of_group = await _group_operations(admin, settings.kafka_group_id)
    _check_topics(settings, GATEWAY_NEEDS, allowed)
    if not _holds(of_group, DESCRIBE):  # it would never see a worker, and never be ready
        raise _missing(settings, DESCRIBE, f"group {settings.kafka_group_id}")


async def check_webhook_permissions(settings: Settings, groups: Sequence[str]) -> None:
    """Check that the broker allows the user what `recur webhooks` does.

    Args:
        settings: name the broker and the topics.
        groups: the consumer groups of the endpoints.

    Raises:
        StartupError: the broker does not answer, or a permission is missing. The message names it.
    """
    async with admin_client(settings) as admin:
        allowed = await _topic_operations(admin, [settings.topic(role) for role in WEBHOOK_NEEDS])
        _check_topics(settings, WEBHOOK_NEEDS, allowed)
        for group in groups:
            if not _holds(await _group_operations(admin, group), READ):
                raise _missing(settings, READ, f"group {group}")


def _check_topics(
    settings: Settings, needs: Mapping[TopicRole, tuple[str, ...]], allowed: Mapping[str, int]
) -> None:
    for role, operations in needs.items():
        topic = settings.topic(role)
        for operation in operations:
            if not _holds(allowed.get(topic), operation):
                raise _missing(settings, operation, f"topic {topic}")


def _missing(settings: Settings, operation: str, resource: str) -> StartupError:
    user = "this user"
    if settings.kafka_sasl_username and settings.kafka_security_protocol.startswith("SASL"):
        user = f"the user {settings.kafka_sasl_username} (RECUR_KAFKA_SASL_USERNAME)"
    return StartupError(
        f"the broker does not allow {user} the operation {operation} on the {resource}: grant it"
        " with kafka-acls.sh; docs/security.md lists all that it needs"
    )


def _holds(operations: int | None, operation: str) -> bool:
    """Tell whether an operation is allowed; True if the broker does not tell."""
    if operations is None or operations == _UNKNOWN:
        return True
    return bool(operations >> _OPERATIONS[operation] & 1)


async def _topic_operations(admin: Any, topics: list[str]) -> dict[str, int]:
    """Ask for the permission bits of each topic; empty if the broker is too old to tell."""
    try:
        reply = await admin._send_request(_TopicPermissionsRequest(topics))
    except _TOO_OLD:
        return {}
    return {topic: operations for _, topic, _, _, operations in reply.topics}


async def _group_operations(admin: Any, group: str) -> int | None:
    """Ask for the permission bits of the group; None if the broker does not tell."""
    try:
        coordinator = await admin.find_coordinator(group)
        reply = await admin._send_request(_GroupPermissionsRequest(group), coordinator)
    except kafka_errors.GroupAuthorizationFailedError:
        return 0
    except (*NO_COORDINATOR_YET, *_TOO_OLD):
        return None  # a new broker, whose first group has no coordinator yet
    ((code, *_, operations),) = reply.groups
    return 0 if code == kafka_errors.GroupAuthorizationFailedError.errno else operations
