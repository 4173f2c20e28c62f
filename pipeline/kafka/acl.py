"""Whether the broker lets a worker do all that it does, asked before it takes a partition.

A right that is missing shows late otherwise, at the first alert or the first crash, and the clients
wait for it in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiokafka import errors as kafka_errors
from aiokafka.protocol.admin import DescribeGroupsRequest_v3, DescribeGroupsResponse_v3
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

from pipeline.errors import StartupError
from pipeline.kafka.topics import NO_COORDINATOR_YET, TopicRole, admin_client
from pipeline.settings import Settings

READ, WRITE = "Read", "Write"

NEEDS: Mapping[TopicRole, tuple[str, ...]] = {
    "transactions": (READ,),
    "scores": (READ, WRITE),
    "alerts": (WRITE,),
    "labels": (READ,),
    "dead_letter": (WRITE,),
}
"""What a worker does with each topic."""

_OPERATIONS = {READ: 3, WRITE: 4}  # Kafka's numbers; a bit for each in what it answers
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


class _RightsRequest(Request[_MetadataRequestStruct]):  # type: ignore[misc]
    """Metadata with what we may do: a newer version of the request than aiokafka has."""

    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: type[_MetadataRequestStruct]) -> _MetadataRequestStruct:
        return request_struct_class(self._topics, False, False, True)


class _GroupRequestStruct(DescribeGroupsRequest_v3):  # type: ignore[misc]
    RESPONSE_TYPE = DescribeGroupsResponse_v3  # aiokafka reads it as version 2, without the rights


class _GroupRightsRequest(Request[_GroupRequestStruct]):  # type: ignore[misc]
    """The description of a group with what we may do."""

    API_KEY = _GroupRequestStruct.API_KEY

    def __init__(self, group: str) -> None:
        self._group = group

    def build(self, request_struct_class: type[_GroupRequestStruct]) -> _GroupRequestStruct:
        return request_struct_class([self._group], True)


async def check_rights(settings: Settings) -> None:
    """The user may do with topics and group what a worker does.

    Raises:
        StartupError: a right is missing; the message names it, or the broker does not answer.
    """
    async with admin_client(settings) as admin:
        allowed = await _topic_operations(admin, [settings.topic(role) for role in NEEDS])
        of_group = await _group_operations(admin, settings.kafka_group_id)
    for role, operations in NEEDS.items():
        if role == "labels" and not settings.update_merchant_profiles:
            continue
        topic = settings.topic(role)
        for operation in operations:
            if not _holds(allowed.get(topic), operation):
                raise _missing(settings, operation, f"topic {topic}")
    if not _holds(of_group, READ):
        raise _missing(settings, READ, f"group {settings.kafka_group_id}")


def _missing(settings: Settings, operation: str, resource: str) -> StartupError:
    user = "this user"
    if settings.kafka_sasl_username and settings.kafka_security_protocol.startswith("SASL"):
        user = f"the user {settings.kafka_sasl_username} (RECUR_KAFKA_SASL_USERNAME)"
    return StartupError(
        f"the broker does not allow {user} the operation {operation} on the {resource}: grant it"
        " with kafka-acls.sh; docs/security.md lists all that a worker needs"
    )


def _holds(operations: int | None, operation: str) -> bool:
    """Whether a right is among those told; True where the broker does not tell."""
    if operations is None or operations == _UNKNOWN:
        return True
    return bool(operations >> _OPERATIONS[operation] & 1)


async def _topic_operations(admin: Any, topics: list[str]) -> dict[str, int]:
    """Bits of what we may do with each topic; nothing where the broker is too old to tell."""
    try:
        reply = await admin._send_request(_RightsRequest(topics))
    except _TOO_OLD:
        return {}
    return {topic: operations for _, topic, _, _, operations in reply.topics}


async def _group_operations(admin: Any, group: str) -> int | None:
    """Bits of what we may do with the group; None where the broker does not tell."""
    try:
        coordinator = await admin.find_coordinator(group)
        reply = await admin._send_request(_GroupRightsRequest(group), coordinator)
    except kafka_errors.GroupAuthorizationFailedError:
        return 0
    except (*NO_COORDINATOR_YET, *_TOO_OLD):
        return None  # not there yet: nobody has joined a group of this broker before
    ((code, *_, operations),) = reply.groups
    return 0 if code == kafka_errors.GroupAuthorizationFailedError.errno else operations
