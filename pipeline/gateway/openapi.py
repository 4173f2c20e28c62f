"""The OpenAPI 3.1 document of a gateway, with an example of each request and answer.

Schemas of what travels come from the types that decode and encode it. The rest is here, beside the
table of problems. Tests compare the document with the routes, and run its examples.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from model.checkpoint import Checkpoint
from model.features.spec import Field
from model.transaction import ID_MAX_CHARACTERS, Transaction
from model.units import DAY_MS
from pipeline.gateway import problems
from pipeline.gateway.accounts import Account
from pipeline.gateway.alert_feed import CURSOR_MAX_CHARACTERS, AlertPage
from pipeline.gateway.problems import TYPE_PATH, ProblemType
from pipeline.gateway.routes import PAGE_DEFAULT, PAGE_MAX, BatchResult
from pipeline.gateway.what_if import WhatIf
from pipeline.messages.extra_fields import NUMBER_MAX, TEXT_MAX_CHARACTERS
from pipeline.messages.labels import Label
from pipeline.messages.scores import Alert, Score
from pipeline.settings import Settings
from pipeline.timestamps import RECORD_TIME_MIN_MS

OPENAPI_VERSION = "3.1.0"
REF = "#/components/schemas/"

EXAMPLE_TRANSACTION = {
    "transaction_id": "shop7-000001",
    "account_id": "A000042",
    "merchant_id": "M000007",
    "amount": 129.9,
    "currency": "EUR",
    "timestamp": 1_700_000_000_000,
}
EXAMPLE_LABEL = {
    "transaction_id": "shop7-000001",
    "account_id": "A000042",
    "merchant_id": "M000007",
    "label": "fraud",
    "timestamp": 1_700_000_000_000,
    "labelled_at": 1_700_600_000_000,
    "source": "chargeback",
}
EXAMPLE_SCORE = {
    **EXAMPLE_TRANSACTION,
    "score": 0.0125,
    "decision": "approve",
    "model": "0f3a5c7e9b1d",
    "source": "transactions:3:4711",
    "features": {"amount": 129.9},
}
del EXAMPLE_SCORE["currency"]

ALWAYS = (
    problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.RATE_LIMITED,
    problems.TOO_MANY_FAILED_LOGINS, problems.SLOW_REQUEST, problems.TOO_LARGE,
    problems.UNSUPPORTED_MEDIA_TYPE, problems.NOT_JSON, problems.TOO_DEEP,
    problems.INVALID_PARAMETER, problems.HEAD_TOO_LARGE, problems.INTERNAL, problems.OVERLOADED,
    problems.TIMED_OUT, problems.IDENTITY_UNAVAILABLE, problems.STORE_UNAVAILABLE,
    problems.LOG_UNAVAILABLE, problems.NOT_READY,
)  # fmt: skip
"""Problems that every route with credentials may answer with."""

_WAIT = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`wait=SECONDS` waits that long for the score, `respond-async` not at all"
    " (RFC 7240).",
    "schema": {"type": "string", "examples": ["wait=2"]},
    "example": "wait=2",
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Another body under the same key is refused with 409. The transaction_id does"
    " the same, so that this header is optional.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}


def make_document(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """Make the document.

    Args:
        settings: the limits that it names.
        checkpoint: its currency and extra fields.
    """
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Recur gateway",
            "version": version("recur"),
            "summary": "Scores of card payments, labels, accounts and alerts",
            "description": "A request to score is a record of the transactions topic; the answer is"
            " the record of the scores topic, byte for byte.",
            "license": {"name": "See the project's LICENSE file"},
        },
        "security": [{"bearer": []}, {"apiKey": []}],
        "paths": _paths(settings),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "schemas": _schemas(settings, checkpoint),
        },
    }


def _paths(settings: Settings) -> dict[str, Any]:
    transaction_id = _path_id("transaction_id", "shop7-000001")
    conflict = (problems.IN_DOUBT, problems.CONFLICT, problems.INVALID_FIELDS, problems.REJECTED)
    pending = _pending()
    return {
        "/v1/scores": {
            "post": _operation(
                "scoreTransaction", "Score one transaction", "score",
                "Produces the transaction and waits for its score. The same body again gives the"
                " same answer, and the transaction is scored once.",
                parameters=[_WAIT, _IDEMPOTENCY_KEY],
                body=_body(REF + "Transaction", EXAMPLE_TRANSACTION),
                answers={
                    "200": _answer("The score", REF + "Score", EXAMPLE_SCORE, _scored_headers()),
                    "202": pending,
                },
                found=conflict,
            ),
        },
        "/v1/scores/batch": {
            "post": _operation(
                "scoreBatch", "Score several transactions", "score",
                "Each transaction has an outcome of its own, with the status that it would have"
                " alone.",
                parameters=[_WAIT, _IDEMPOTENCY_KEY],
                body=_body(REF + "Batch", {"transactions": [EXAMPLE_TRANSACTION]}),
                answers={
                    "200": _answer(
                        "The outcomes, in the order of the transactions", REF + "BatchResult",
                        {"results": [{"status": 200, "transaction_id": "shop7-000001",
                                      "score": EXAMPLE_SCORE}]},
                    ),
                },
                found=(problems.CONFLICT, problems.INVALID_FIELDS),
            ),
        },
        "/v1/scores/{transaction_id}": {
            "get": _operation(
                "getScore", "Find the score of a transaction", "score or read",
                "Finds what a gateway produced, and what came through Kafka if it is recent.",
                parameters=[transaction_id, _WAIT],
                answers={
                    "200": _answer("The score", REF + "Score", EXAMPLE_SCORE, _scored_headers()),
                    "202": pending,
                },
                found=(problems.NOT_FOUND, problems.CONFLICT, problems.REJECTED),
            ),
        },
        "/v1/what-if": {
            "post": _operation(
                "whatIf", "Score variants without any effect", "score",
                "The score that the transaction would get now, with some fields changed in each"
                " variant. Nothing is written.",
                body=_body(
                    REF + "WhatIfRequest",
                    {"transaction": EXAMPLE_TRANSACTION,
                     "variants": [{"amount": 10}, {"amount": 5000}]},
                ),
                answers={"200": _answer("The scores of the variants", REF + "WhatIf", {
                    "account_id": "A000042", "model": "0f3a5c7e9b1d", "transactions_seen": 12,
                    "variants": [{"merchant_id": "M000007", "amount": 10.0,
                                  "timestamp": 1_700_000_000_000, "score": 0.004,
                                  "decision": "approve"}],
                })},
                found=(problems.INVALID_FIELDS, problems.NOT_FOUND),
            ),
        },
        "/v1/accounts/{account_id}": {
            "get": _operation(
                "getAccount", "Show an account", "read",
                "Standing, counts, recent scores and a forecast, from the account's state.",
                parameters=[_path_id("account_id", "A000042")],
                answers={"200": _answer("The account", REF + "Account")},
                found=(problems.NOT_FOUND,),
            ),
        },
        "/v1/labels": {
            "post": _operation(
                "postLabel", "Report the truth about a transaction", "label",
                "The label is in the labels topic when the answer comes. A worker records it once,"
                " however often it is sent.",
                parameters=[_IDEMPOTENCY_KEY],
                body=_body(REF + "Label", EXAMPLE_LABEL),
                answers={"202": _answer("The label is accepted", REF + "Accepted",
                                        {"transaction_id": "shop7-000001", "status": "accepted"})},
                found=(problems.CONFLICT, problems.INVALID_FIELDS, problems.NOT_FOUND,
                       problems.AUDIT_UNAVAILABLE),
            ),
        },
        "/v1/alerts": {
            "get": _operation(
                "listAlerts", "Read alerts in order", "read",
                "Begins after a cursor, at a time, or with the oldest alert. An alert may come"
                " twice after a crash; its `source` stays the same.",
                parameters=_alert_parameters(),
                answers={"200": _answer("A page of alerts", REF + "AlertPage",
                                        {"alerts": [], "cursor": "kgGTAAAA", "more": False})},
            ),
        },
        **_operations_paths(),
    }  # fmt: skip


def _operations_paths() -> dict[str, Any]:
    ready = {
        "type": "object",
        "properties": {
            "ready": {"type": "boolean"},
            "missing": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["ready", "missing"],
    }
    plain = {"description": "The answer", "content": {"application/json": {"schema": ready}}}
    live = {"description": "The process answers", "content": {"application/json": {"schema": {
        "type": "object", "properties": {"live": {"type": "boolean"}}}}}}  # fmt: skip
    text = {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "/live": {"get": {
            "operationId": "live", "summary": "Whether the process answers", "security": [],
            "tags": ["operations"], "responses": {"200": live}}},
        "/ready": {"get": {
            "operationId": "ready", "summary": "Whether an answer can come", "security": [],
            "tags": ["operations"], "responses": {"200": plain, "503": {
                **plain, "description": "Something is missing for an answer"}}}},
        "/metrics": {"get": _operation(
            "metrics", "Metrics for Prometheus", "read", "", answers={"200": text},
            tag="operations")},
    }  # fmt: skip


def _operation(
    name: str,
    summary: str,
    scope: str,
    description: str,
    *,
    answers: Mapping[str, Any],
    parameters: Sequence[Any] = (),
    body: Mapping[str, Any] | None = None,
    found: Sequence[ProblemType] = (),
    tag: str = "api",
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "description": f"{description} Scope: {scope}.".strip(),
        "tags": [tag],
        "parameters": list(parameters),
        "responses": {**answers, **_problem_answers((*ALWAYS, *found), set(answers))},
    }
    if body is not None:
        operation["requestBody"] = body
    return operation


def _problem_answers(kinds: Sequence[ProblemType], taken: set[str]) -> dict[str, Any]:
    by_status: dict[str, list[ProblemType]] = {}
    for kind in sorted(kinds, key=lambda kind: kind.status):
        by_status.setdefault(str(kind.status), []).append(kind)
    return {
        status: {
            "description": "; ".join(kind.title for kind in of_status),
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": REF + "Problem"},
                    "examples": {
                        kind.name: {
                            "value": {
                                "type": TYPE_PATH + kind.name,
                                "title": kind.title,
                                "status": kind.status,
                                "instance": "urn:request:0af7651916cd43dd8448eb211c80319c",
                                "request_id": "0af7651916cd43dd8448eb211c80319c",
                            }
                        }
                        for kind in of_status
                    },
                }
            },
        }
        for status, of_status in by_status.items()
        if status not in taken
    }


def _path_id(name: str, example: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": ID_MAX_CHARACTERS},
        "example": example,
    }


def _alert_parameters() -> list[dict[str, Any]]:
    fields: list[tuple[str, str, dict[str, Any]]] = [
        ("cursor", "`cursor` of an earlier page; it wins over `from`",
         {"type": "string", "minLength": 1, "maxLength": CURSOR_MAX_CHARACTERS}),
        ("from", "time of the first record: RFC 3339, or epoch milliseconds",
         {"type": "string", "anyOf": [{"format": "date-time"}, {"pattern": "^[0-9]{11,14}$"}]}),
        ("limit", f"most alerts; {PAGE_DEFAULT} without it",
         {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT}),
        ("decision", "only these", {"type": "string", "enum": ["review", "decline"]}),
        ("min_score", "only this score or higher ones",
         {"type": "number", "minimum": 0, "maximum": 1}),
        ("merchant_id", "only of this merchant",
         {"type": "string", "minLength": 1, "maxLength": ID_MAX_CHARACTERS}),
    ]  # fmt: skip
    return [
        {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
        for name, text, schema in fields
    ]


def _body(ref: str, example: Any) -> dict[str, Any]:
    content = {"schema": {"$ref": ref}, "examples": {"example": {"value": example}}}
    return {"required": True, "content": {"application/json": content}}


def _answer(
    description: str, ref: str, example: Any = None, headers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": ref}}
    if example is not None:
        content["examples"] = {"example": {"value": example}}
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/json": content},
    }
    if headers:
        answer["headers"] = headers
    return answer


def _header(text: str, **schema: Any) -> dict[str, Any]:
    return {"description": text, "required": False, "schema": {"type": "string", **schema}}


def _scored_headers() -> dict[str, Any]:
    return {
        "Idempotent-Replayed": _header("`true` if the transaction was scored before"),
        "Preference-Applied": _header("the wait that the request asked for, bounded"),
    }


def _pending() -> dict[str, Any]:
    example = {
        "transaction_id": "shop7-000001",
        "status": "pending",
        "location": "/v1/scores/shop7-000001",
    }
    headers = {
        "Location": _header("where the score will be"),
        "Retry-After": _header("seconds"),
        "Preference-Applied": _header("the wait that the request asked for, bounded"),
    }
    text = "The transaction is in the log, and its score is not there within the wait"
    return _answer(text, REF + "Pending", example, headers)


def _schemas(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    types = (Transaction, Score, Alert, Label, WhatIf, Account, AlertPage, BatchResult)
    _, schemas = msgspec.json.schema_components(types, ref_template=REF + "{name}")
    transaction, label = schemas["Transaction"], schemas["Label"]
    transaction["properties"]["currency"] = {"type": "string", "const": checkpoint.header.currency}
    for schema in (transaction, label):
        schema["properties"]["timestamp"] = _time(settings)
    label["properties"]["labelled_at"] = _time(settings)
    label["required"] = [name for name in label["required"] if name != "labelled_at"]
    label["properties"]["label"] = {"type": "string", "enum": ["fraud", "legitimate"]}
    for field in checkpoint.header.features.fields:
        transaction["properties"][field.name] = _extra_field(field)
    score, alert, problem = ({"$ref": REF + name} for name in ("Score", "Alert", "Problem"))
    schemas["Account"]["properties"]["recent_scores"]["items"] = score
    schemas["AlertPage"]["properties"]["alerts"]["items"] = alert
    schemas["BatchItem"]["properties"] |= {"score": score, "problem": problem}
    batch = settings.gateway_batch_max
    return schemas | {
        "Batch": {
            "type": "object",
            "properties": {
                "transactions": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": batch,
                    "items": {"$ref": REF + "Transaction"},
                }
            },
            "required": ["transactions"],
        },
        "WhatIfRequest": _what_if_request(transaction, batch),
        "Pending": _object(transaction_id="string", status="string", location="string"),
        "Accepted": _object(transaction_id="string", status="string"),
        "Problem": _problem_schema(),
    }


def _time(settings: Settings) -> dict[str, Any]:
    """Return the schema of a time; the bounds of the past and the future move with the clock."""
    now_ms = time.time_ns() // 1_000_000
    oldest_ms = now_ms - round(settings.max_timestamp_age_seconds * 1000) + DAY_MS
    newest_ms = now_ms + round(settings.max_timestamp_ahead_seconds * 1000)
    return {
        "description": "epoch milliseconds, or RFC 3339 with a zone",
        "anyOf": [
            {
                "type": "integer",
                "minimum": max(RECORD_TIME_MIN_MS, oldest_ms),
                "maximum": newest_ms,
            },
            {"type": "string", "format": "date-time"},
        ],
    }


def _extra_field(field: Field) -> dict[str, Any]:
    if field.kind == "numeric":
        return {"type": ["number", "null"], "minimum": -NUMBER_MAX, "maximum": NUMBER_MAX}
    text = {"type": "string", "maxLength": TEXT_MAX_CHARACTERS}
    return {"anyOf": [text, {"type": "integer"}, {"type": "boolean"}, {"type": "null"}]}


def _what_if_request(transaction: Mapping[str, Any], most: int) -> dict[str, Any]:
    optional = ("transaction_id", "timestamp")
    base = {
        **transaction,
        "title": "WhatIfTransaction",
        "description": "A transaction; without a timestamp it is now. Its transaction_id is"
        " ignored.",
        "properties": {
            name: schema
            for name, schema in transaction["properties"].items()
            if name != "transaction_id"
        },
        "required": [name for name in transaction["required"] if name not in optional],
    }
    kept = ("merchant_id", "amount", "timestamp", "category", "channel", "country")
    properties = {name: transaction["properties"][name] for name in kept}
    return {
        "type": "object",
        "properties": {
            "transaction": base,
            "variants": {
                "description": "fields that replace those of the transaction; without variants it"
                " is scored as it is",
                "type": "array",
                "minItems": 1,
                "maxItems": most,
                "items": {"type": "object", "properties": properties},
            },
        },
        "required": ["transaction"],
    }


def _object(**types: str) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, kind in types.items()}
    return {"type": "object", "properties": properties, "required": list(types)}


def _problem_schema() -> dict[str, Any]:
    error = _object(detail="string")
    error["properties"] |= {
        "pointer": {"type": "string", "description": "JSON pointer to the field of the body"},
        "parameter": {"type": "string"},
        "header": {"type": "string"},
    }
    schema = _object(type="string", title="string", status="integer")
    schema["description"] = "RFC 9457"
    schema["properties"] |= {
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "request_id": {"type": "string"},
        "reason": {"type": "string", "description": "reason of a rejection"},
        "errors": {"type": "array", "items": error},
    }
    return schema
