"""AsyncAPI 3.0 document of all topics, made from the types of their records.

`make docs` writes it to docs/asyncapi.yaml. A topic without an entry in :data:`CHANNELS` is an
error, and so is an event's header without a description.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from model.reasons import REASONS, Reason
from model.transaction import Transaction
from model.units import DAY_MS
from pipeline.kafka.topics import TopicRole
from pipeline.messages import decoding
from pipeline.messages.audit_records import AuditRecord
from pipeline.messages.cloudevents import ALERT_TYPE, SCORE_TYPE, EventHeaders
from pipeline.messages.control import CONTROL_HEADER, FORGET, LOOK
from pipeline.messages.decision import DECISIONS, DecisionThresholds
from pipeline.messages.labels import Label, encode_label
from pipeline.messages.replies import GATEWAY_ID_MAX, REPLY_HEADER
from pipeline.messages.scores import Alert, Score, ScoreEncoder, encode_alert, source_prefix
from pipeline.messages.transactions import HISTORY_HEADER, WARM_HEADER, encode_transaction
from pipeline.settings import Settings

VERSION = "1.0.0"
"""Version of the records' layout. A change that breaks readers or producers raises its first."""

TOPICS: tuple[TopicRole, ...] = get_args(TopicRole)

KAFKA_BINDING = "0.5.0"
JSON = "application/json"

_TIME = 1_534_327_200_000
_TRANSACTION = Transaction(
    "t-1001", "a-17", "m-204", 412.5, "EUR", _TIME, "electronics", "online", "DE"
)
_LABEL = Label("t-1001", "a-17", "m-204", "fraud", _TIME, _TIME + 9 * DAY_MS, "chargeback")
_ROLE = re.compile(r":\w+:`([^`]+)`")


class Channel(msgspec.Struct, frozen=True):
    """One topic in the document.

    Attributes:
        action: what Recur does: it receives from the topic, or sends to it.
        messages: names of the topic's messages.
        description: what the topic is for.
    """

    action: Literal["receive", "send"]
    messages: Sequence[str]
    description: str


CHANNELS: Mapping[TopicRole, Channel] = {
    "transactions": Channel(
        "receive",
        ("Transaction", "Control"),
        "Transactions to score. An account's records are in one partition, in order.",
    ),
    "labels": Channel(
        "receive", ("Label",), "The truth about transactions, once it is known. Read once each."
    ),
    "scores": Channel(
        "send",
        ("Score",),
        "One score for each transaction, in the partition with the transaction's number.",
    ),
    "alerts": Channel(
        "send",
        ("Alert",),
        "Scores at or over the review threshold, with reasons. An alert may be published again"
        " after a crash: its id stays the same.",
    ),
    "dead_letter": Channel(
        "send", ("DeadLetter",), "Records that could not be scored or counted, and why."
    ),
    "audit": Channel(
        "send",
        ("AuditRecord",),
        "Acts of gateways' callers and of commands that change keys: a record before and one after"
        " each act.",
    ),
}
"""The document's channels, one for each topic."""

EVENT_HEADERS: Mapping[str, str] = {
    "ce_specversion": "version of CloudEvents",
    "ce_type": "type of the event, with its version",
    "ce_source": "the log of transactions, by topic and topic id, and the topic of the event",
    "content-type": "type of the value",
    "ce_id": "topic, partition and offset of the transaction: the same when published again",
    "ce_time": "time of the transaction, RFC 3339 in UTC",
    "ce_subject": "transaction id; left out if it is not printable",
}
"""Descriptions of the headers that :class:`EventHeaders` makes."""

DEAD_LETTER_HEADERS: Mapping[str, str] = {
    "topic": "topic of the rejected record",
    "partition": "its partition",
    "offset": "its offset",
    "reason": "why it was rejected",
    "error": "what is wrong, without a quotation of the record",
    "time": "when it was rejected, epoch milliseconds",
    "truncated": "length of the whole value, if it was cut",
}


def asyncapi_document(settings: Settings) -> dict[str, Any]:
    """Make the document, for topics with the names that the settings give."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Recur",
            "version": VERSION,
            "description": "Topics of Recur, which scores card transactions as they happen."
            " Unknown fields and headers are to be ignored.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON,
        "servers": {
            "kafka": {
                "host": settings.kafka_bootstrap_servers,
                "protocol": "kafka",
                "description": "Kafka brokers (RECUR_KAFKA_BOOTSTRAP_SERVERS)",
            }
        },
        "channels": {role: _channel(role, settings) for role in TOPICS},
        "operations": {f"{CHANNELS[role].action}_{role}": _operation(role) for role in TOPICS},
        "components": {"messages": _messages(settings), "schemas": _schemas()},
    }


def _channel(role: TopicRole, settings: Settings) -> dict[str, Any]:
    channel = CHANNELS[role]
    return {
        "address": settings.topic(role),
        "description": channel.description,
        "messages": {name: _reference("messages", name) for name in channel.messages},
        "bindings": {
            "kafka": {
                "topic": settings.topic(role),
                "topicConfiguration": {"cleanup.policy": ["delete"]},
                "bindingVersion": KAFKA_BINDING,
            }
        },
    }


def _operation(role: TopicRole) -> dict[str, Any]:
    channel = CHANNELS[role]
    return {
        "action": channel.action,
        "channel": {"$ref": f"#/channels/{role}"},
        "messages": [{"$ref": f"#/channels/{role}/messages/{name}"} for name in channel.messages],
    }


def _reference(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


# messages --------------------------------------------------------------------------------


def _messages(settings: Settings) -> dict[str, Any]:
    score, alert = _score_and_alert(settings)
    return {
        "Transaction": _message(
            "A payment to score.",
            "account id",
            _reference("schemas", "Transaction"),
            example=encode_transaction(_TRANSACTION),
            headers={
                HISTORY_HEADER: _text("marks a transaction of the past; any value"),
                WARM_HEADER: _text("marks one that builds state and raises no alert; any value"),
                REPLY_HEADER: _text("id of the gateway that waits for the answer")
                | {"maxLength": GATEWAY_ID_MAX},
            },
        ),
        "Control": _message(
            "A command to workers, instead of a transaction.",
            "account id",
            {"type": "null"},
            headers={
                CONTROL_HEADER: _text("forget the account, or only look at the watermark")
                | {"enum": [FORGET.decode(), LOOK.decode()]}
            },
            required=[CONTROL_HEADER],
        ),
        "Label": _message(
            "Whether a transaction was fraud.",
            "merchant id",
            _reference("schemas", "Label"),
            example=encode_label(_LABEL),
        ),
        "Score": _message(
            "A transaction's score; an event of CloudEvents 1.0 with RECUR_CLOUDEVENTS_SCORES.",
            "account id",
            _reference("schemas", "Score"),
            example=score,
            headers=_event_headers(SCORE_TYPE, settings, "scores"),
        ),
        "Alert": _message(
            "A score with reasons; an event of CloudEvents 1.0 unless RECUR_CLOUDEVENTS_ALERTS is"
            " off.",
            "account id",
            _reference("schemas", "Alert"),
            example=alert,
            headers=_event_headers(ALERT_TYPE, settings, "alerts"),
        ),
        "DeadLetter": _message(
            "A rejected record's value as it was, or its begin.",
            "key of the record, or topic:partition:offset without one",
            {"type": ["string", "null"], "format": "binary"},
            content_type="application/octet-stream",
            headers={
                name: _text(description)
                | ({"enum": list(decoding.REASONS)} if name == "reason" else {})
                for name, description in DEAD_LETTER_HEADERS.items()
            },
            required=[name for name in DEAD_LETTER_HEADERS if name != "truncated"],
        ),
        "AuditRecord": _message(
            "One record of an act; two with the same act_id belong together.",
            "id of the act",
            _reference("schemas", "AuditRecord"),
        ),
    }


def _message(
    summary: str,
    key: str,
    payload: Mapping[str, Any],
    *,
    example: bytes | None = None,
    content_type: str = JSON,
    headers: Mapping[str, Any] | None = None,
    required: Sequence[str] = (),
) -> dict[str, Any]:
    """Make a message.

    Args:
        summary: what it is.
        key: what its record's key is.
        payload: schema of its value.
        example: a value.
        content_type: type of its value.
        headers: schemas of its headers.
        required: names of the headers that each record has.
    """
    message: dict[str, Any] = {"summary": summary, "contentType": content_type}
    if headers:
        message["headers"] = {"type": "object", "properties": dict(headers)}
        if required:
            message["headers"]["required"] = list(required)
    message["payload"] = dict(payload)
    message["bindings"] = {
        "kafka": {"key": _text(key), "bindingVersion": KAFKA_BINDING},
    }
    if example is not None:
        message["examples"] = [{"payload": msgspec.json.decode(example)}]
    return message


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _event_headers(event_type: str, settings: Settings, role: TopicRole) -> dict[str, Any]:
    """Describe the headers that an event has."""
    events = EventHeaders(event_type, settings.topic("transactions"), settings.topic(role))
    (made,) = events.of(0, bytes(range(16)), [17], [_TIME], [_TRANSACTION.transaction_id])
    constant = ("ce_specversion", "ce_type", "content-type")
    return {
        name: _text(EVENT_HEADERS[name])
        | ({"const": value.decode()} if name in constant else {"examples": [value.decode()]})
        for name, value in made
    }


def _score_and_alert(settings: Settings) -> tuple[bytes, bytes]:
    """Encode a score and its alert as a worker does."""
    encoder = ScoreEncoder(["amount", "count_1d"], "3f1c09a2b7d4")
    raw = np.array([[_TRANSACTION.amount, 3]], np.float32)
    (numbers,) = encoder.numbers(np.array([0.9375], np.float32), raw)
    source = f"{source_prefix(settings.topic('transactions'), 0)}17"
    thresholds = DecisionThresholds(0.5, 0.875)
    score = encoder.encode(_TRANSACTION, _TIME, source, numbers, DECISIONS[-1], thresholds)
    reasons = [Reason("amount_unusual", 0.75), Reason("velocity", 0.25)]
    return score, encode_alert(score, reasons, _TIME + 12)


# schemas ---------------------------------------------------------------------------------


def _schemas() -> dict[str, Any]:
    """Make the schemas of all records from their types."""
    types = (Transaction, Label, Score, Alert, AuditRecord)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        schema["description"] = _plain(schema["description"])
    for name in ("Score", "Alert"):  # types that stay open, for records of other versions
        schemas[name]["properties"]["decision"]["enum"] = list(DECISIONS)
    schemas["Reason"]["properties"]["code"]["enum"] = list(REASONS)
    return dict(sorted(schemas.items()))


def _plain(docstring: str) -> str:
    """Turn a docstring into one paragraph, without examples and attributes."""
    text = re.split(r"\n\n(?:>>>|Attributes:)", inspect.cleandoc(docstring))[0]
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    return " ".join(text.split())
