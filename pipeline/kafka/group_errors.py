"""Errors of a consumer group that refuses a worker, and the setting to correct."""

from __future__ import annotations

from aiokafka import errors as kafka_errors

from pipeline.errors import StartupError
from pipeline.settings import Settings

PERMANENT_ERRORS = (kafka_errors.InvalidSessionTimeoutError, kafka_errors.InvalidGroupIdError)
"""Errors that stay until somebody corrects a setting."""


def group_refusal(settings: Settings, error: BaseException) -> StartupError:
    """Turn a lasting error of the group into a line that says what to do."""
    group = settings.kafka_group_id
    return StartupError(
        f"the group {group} refuses this worker ({_describe(error)}): {_hint(settings, error)}"
    )


def _hint(settings: Settings, error: BaseException) -> str:
    if isinstance(error, kafka_errors.InvalidSessionTimeoutError):
        return (
            f"RECUR_KAFKA_SESSION_TIMEOUT_SECONDS is {settings.kafka_session_timeout_seconds:g};"
            " set it within the broker's group.min.session.timeout.ms and"
            " group.max.session.timeout.ms (6 s and 30 min unless configured)"
        )
    if isinstance(error, kafka_errors.InconsistentGroupProtocolError):
        return (
            "its members are of another program, or share out partitions in another way; end"
            " them, or set RECUR_KAFKA_GROUP_ID to a group of Recur's own"
        )
    if isinstance(error, kafka_errors.InvalidGroupIdError):
        return "the broker does not take that name; set RECUR_KAFKA_GROUP_ID to another one"
    if isinstance(error, kafka_errors.GroupAuthorizationFailedError):
        return (
            "allow this user (RECUR_KAFKA_SASL_USERNAME) to Read the group with kafka-acls.sh, or"
            " correct RECUR_KAFKA_GROUP_ID; docs/security.md lists all that a worker needs"
        )
    if isinstance(error, kafka_errors.TopicAuthorizationFailedError):
        return (
            "allow this user (RECUR_KAFKA_SASL_USERNAME) to Read the topics with kafka-acls.sh;"
            " docs/security.md lists all that a worker needs"
        )
    return (
        "see the broker's log; such as a group of group.max.size members; RECUR_KAFKA_GROUP_ID"
        " names another group"
    )


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    text = " ".join(str(error).split())[:200]
    return text if name in text else f"{name}: {text}".removesuffix(": ")
