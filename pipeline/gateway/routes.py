"""Routes of the gateway: each reads its request, asks a service, and writes the answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

import msgspec
from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pipeline.gateway.alert_feed import CURSOR_MAX_CHARACTERS, AlertFilter
from pipeline.gateway.context import AsgiScope, context_of
from pipeline.gateway.incoming import Incoming, encode_sorted, read_label, read_object
from pipeline.gateway.log_producer import RefusedRecordError
from pipeline.gateway.principal import Principal, Scope
from pipeline.gateway.problems import (
    INVALID_FIELDS,
    LOG_UNAVAILABLE,
    NOT_FOUND,
    NOT_READY,
    PROBLEM_TYPES,
    STORE_UNAVAILABLE,
    TOO_LARGE,
    TYPE_PATH,
    FieldError,
    Problem,
)
from pipeline.gateway.readiness import BROKER, REDIS
from pipeline.gateway.request_parts import (
    Query,
    id_of_path,
    idempotency_key,
    location_of,
    preferred_wait,
    require_json,
)
from pipeline.gateway.request_spans import record_context
from pipeline.gateway.score_service import Outcome, Pending, Scored, account_of
from pipeline.gateway.service import Gateway
from pipeline.gateway.tenants import check_seen, not_found, sees
from pipeline.kafka.polls import LogUnavailableError
from pipeline.messages.decision import APPROVE, DECISIONS
from pipeline.storage.client import StoreUnavailableError

JSON = "application/json"
RETRY_SECONDS = 1
"""``Retry-After`` of a pending score."""

PAGE_DEFAULT, PAGE_MAX = 100, 1_000
"""Alerts in a page."""

VARIANT_FIELDS_MAX = 64
"""Most fields of a variant."""

WHAT_IF_ID = "what-if"
"""Transaction id of a what-if without one; it is written nowhere."""

Req = Request[Any, Any, Any]
Resp = Response[bytes]

_encode = msgspec.json.Encoder().encode


def _scope(request: Req) -> AsgiScope:
    """Return a request's ASGI scope; Litestar's type of it is narrower."""
    return cast("AsgiScope", request.scope)


class BatchItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """Outcome of one transaction of a batch.

    Attributes:
        status: the HTTP status that it would have alone.
        score: the score's record, with status 200.
        location: where the score will be, with status 202.
        problem: what is wrong, with all others.
    """

    status: int
    transaction_id: str | None = None
    score: msgspec.Raw | None = None
    location: str | None = None
    problem: dict[str, Any] | None = None


class BatchResult(msgspec.Struct, frozen=True):
    """Outcomes of a batch, in the order of its transactions."""

    results: list[BatchItem]


def make_routes(gateway: Gateway, document: Mapping[str, Any], page: str) -> list[HTTPRouteHandler]:
    """Make the routes.

    Args:
        gateway: the services.
        document: the OpenAPI document.
        page: the documentation page.
    """
    return [
        *_score_routes(gateway),
        *_reading_routes(gateway),
        *_writing_routes(gateway),
        *_public_routes(gateway, document, page),
    ]


# scores ----------------------------------------------------------------------------------


def _score_routes(gateway: Gateway) -> list[HTTPRouteHandler]:
    settings = gateway.settings

    @post("/v1/scores", status_code=200)
    async def post_score(request: Req) -> Resp:
        """Score one transaction."""
        principal = _json_caller(request, "score")
        incoming = gateway.transactions.read(await request.body())
        _check_seen(principal, incoming)
        wait = preferred_wait(
            _scope(request), settings.gateway_wait_ms, settings.gateway_wait_max_ms
        )
        _check_services(gateway)
        await _remember(gateway, request, principal, incoming.value)
        try:
            outcome = await gateway.scores.score(
                incoming, wait.seconds, record_context(_scope(request))
            )
        except Problem as problem:
            gateway.metrics.outcomes.labels(problem.kind.name).inc()
            raise
        gateway.metrics.outcomes.labels(_name_of(outcome)).inc()
        return _answer(outcome, wait.is_preferred, wait.seconds)

    @post("/v1/scores/batch", status_code=200)
    async def post_batch(request: Req) -> Resp:
        """Score several transactions, each with its own outcome."""
        context, principal = context_of(_scope(request)), _json_caller(request, "score")
        body = await request.body()
        listed = _list_of(read_batch(body), "transactions", settings.gateway_batch_max)
        await gateway.limiter.charge(principal, len(listed) - 1)
        wait = preferred_wait(
            _scope(request), settings.gateway_wait_ms, settings.gateway_wait_max_ms
        )
        _check_services(gateway)
        await _remember(gateway, request, principal, body)
        valid: list[Incoming] = []
        found: list[Problem | Incoming] = []
        for i, fields in enumerate(listed):
            try:
                incoming = _batch_item(gateway, principal, fields, f"/transactions/{i}")
            except Problem as problem:
                found.append(problem)
                continue
            valid.append(incoming)
            found.append(incoming)
        trace = record_context(_scope(request))
        scored = await gateway.scores.score_all(valid, wait.seconds, trace) if valid else ()
        outcomes = iter(scored)
        items = []
        for one in found:
            outcome = one if isinstance(one, Problem) else next(outcomes)
            name = None if isinstance(one, Problem) else one.transaction_id
            gateway.metrics.outcomes.labels(_name_of(outcome)).inc()
            items.append(_batch_outcome(outcome, name, context.request_id))
        return Response(_encode(BatchResult(items)), media_type=JSON)

    @get("/v1/scores/{transaction_id:path}")
    async def get_score(request: Req) -> Resp:
        """Return the score of a transaction."""
        context = context_of(_scope(request))
        principal = context.principal
        allowed: Any = "score" if principal and "score" in principal.scopes else "read"
        principal = context.require(allowed)
        Query(_scope(request), ())
        name = id_of_path(_scope(request), "/v1/scores/")
        check_seen(principal, transaction_id=name)
        wait = preferred_wait(_scope(request), 0, settings.gateway_wait_max_ms)
        outcome = await _find(gateway, principal, name, wait.seconds)
        return _answer(outcome, wait.is_preferred, wait.seconds)

    return [post_score, post_batch, get_score]


def _json_caller(request: Req, scope: Scope) -> Principal:
    """Return the principal of a request with a JSON body and without a query.

    Raises:
        Problem: the principal lacks the scope, there is a query, or the body is no JSON.
    """
    principal = context_of(_scope(request)).require(scope)
    Query(_scope(request), ())
    require_json(_scope(request))
    return principal


async def _remember(gateway: Gateway, request: Req, principal: Principal, content: bytes) -> None:
    """Bind the request's Idempotency-Key, if it has one, to its content."""
    key = idempotency_key(_scope(request))
    if key is not None:
        await gateway.remember(principal.label, key, content)


def read_batch(body: bytes) -> dict[str, Any]:
    """Read the object of a batch or what-if, which may be larger than one record.

    Raises:
        Problem: it is no JSON object.
    """
    return read_object(body, size_max=None)


async def _find(
    gateway: Gateway, principal: Principal, transaction_id: str, wait_seconds: float
) -> Outcome:
    """Find a transaction's outcome by its id: in the answer keys, then among recent scores.

    Raises:
        Problem: there is none that the principal may see.
    """
    found = await gateway.answers.find(gateway.partitions, transaction_id)
    pending: Pending | None = None
    for partition, answer in found:
        try:
            outcome = await gateway.scores.look_up(partition, transaction_id, answer, wait_seconds)
        except Problem as problem:
            if problem.kind is NOT_FOUND:  # a claim that its gateway left behind
                continue
            raise
        if isinstance(outcome, Pending):
            pending = outcome
        elif sees(principal, account_id=account_of(outcome.value)):
            return outcome
    if pending is not None:
        return pending
    partitions = range(gateway.partitions)
    recent = await gateway.search.recent_score(partitions, transaction_id)
    if recent is None or not sees(principal, account_id=account_of(recent[2])):
        raise not_found()
    return Scored(recent[2], "repeated")


def _batch_item(gateway: Gateway, principal: Principal, fields: Any, pointer: str) -> Incoming:
    if not isinstance(fields, dict):
        raise Problem(INVALID_FIELDS, errors=[FieldError("must be an object", pointer=pointer)])
    incoming = gateway.transactions.read_fields(fields, pointer)
    _check_seen(principal, incoming)
    return incoming


def _check_seen(principal: Principal, incoming: Incoming) -> None:
    check_seen(
        principal,
        account_id=incoming.transaction.account_id,
        transaction_id=incoming.transaction_id,
    )


def _check_services(gateway: Gateway) -> None:
    """Refuse at once what would only wait for a service that is away.

    Raises:
        Problem: 503.
    """
    readiness = gateway.readiness
    if readiness.is_stopping:
        raise Problem(NOT_READY)
    if readiness.lacks(BROKER):
        raise Problem(LOG_UNAVAILABLE)
    if readiness.lacks(REDIS):
        raise Problem(STORE_UNAVAILABLE)


def _name_of(outcome: Outcome | Problem) -> str:
    if isinstance(outcome, Problem):
        return outcome.kind.name
    return "pending" if isinstance(outcome, Pending) else outcome.source


def _answer(outcome: Outcome, is_preferred: bool, wait_seconds: float) -> Resp:
    headers = {"Cache-Control": "no-store"}
    if is_preferred:
        headers["Preference-Applied"] = f"wait={wait_seconds:g}"
    if isinstance(outcome, Scored):
        if outcome.source == "repeated":
            headers["Idempotent-Replayed"] = "true"
        return Response(outcome.value, media_type=JSON, headers=headers)
    location = location_of(outcome.transaction_id)
    headers |= {"Location": location, "Retry-After": str(RETRY_SECONDS)}
    body = {"transaction_id": outcome.transaction_id, "status": "pending", "location": location}
    return Response(_encode(body), media_type=JSON, status_code=202, headers=headers)


def _batch_outcome(
    outcome: Outcome | Problem, transaction_id: str | None, request_id: str
) -> BatchItem:
    if isinstance(outcome, Problem):
        problem = outcome.members(request_id)
        return BatchItem(outcome.kind.status, transaction_id, problem=problem)
    if isinstance(outcome, Pending):
        return BatchItem(202, transaction_id, location=location_of(outcome.transaction_id))
    return BatchItem(200, transaction_id, score=msgspec.Raw(outcome.value))


# what-if, accounts, alerts ---------------------------------------------------------------


def _reading_routes(gateway: Gateway) -> list[HTTPRouteHandler]:
    settings = gateway.settings

    @post("/v1/what-if", status_code=200)
    async def post_what_if(request: Req) -> Resp:
        """Score variants of a transaction, and change nothing."""
        principal = _json_caller(request, "score")
        fields = read_batch(await request.body())
        base = fields.get("transaction")
        if not isinstance(base, dict):
            error = FieldError("must be an object", pointer="/transaction")
            raise Problem(INVALID_FIELDS, errors=[error])
        base = {"timestamp": time.time_ns() // 1_000_000, **base, "transaction_id": WHAT_IF_ID}
        # A fault in the transaction stays one if every variant replaces the field.
        variants = [gateway.transactions.read_fields(base, "/transaction")]
        _check_seen_account(principal, variants[0])
        if fields.get("variants") is not None:
            changes = _list_of(fields, "variants", settings.gateway_batch_max)
            await gateway.limiter.charge(principal, len(changes) - 1)
            variants = [
                _variant(gateway, base, change, f"/variants/{i}")
                for i, change in enumerate(changes)
            ]
        result = await gateway.what_ifs.score(variants, time.time_ns() // 1_000_000)
        gateway.metrics.variants.inc(len(variants))
        return Response(_encode(result), media_type=JSON, headers={"Cache-Control": "no-store"})

    @get("/v1/accounts/{account_id:path}")
    async def get_account(request: Req) -> Resp:
        """Return an account's standing, counts and recent scores."""
        principal = context_of(_scope(request)).require("read")
        Query(_scope(request), ())
        name = id_of_path(_scope(request), "/v1/accounts/")
        check_seen(principal, account_id=name)
        account = await gateway.accounts.read(name)
        if account is None:
            raise not_found()
        return Response(_encode(account), media_type=JSON, headers={"Cache-Control": "no-store"})

    @get("/v1/alerts")
    async def get_alerts(request: Req) -> Resp:
        """Return alerts after a cursor or from a time on."""
        principal = context_of(_scope(request)).require("read")
        query = Query(
            _scope(request), ("cursor", "from", "limit", "decision", "min_score", "merchant_id")
        )
        wanted = AlertFilter(
            query.choice("decision", [name for name in DECISIONS if name != APPROVE]),
            query.share("min_score"),
            query.text("merchant_id", 256),
        )
        page = await gateway.alerts.page(
            query.text("cursor", CURSOR_MAX_CHARACTERS),
            query.time_ms("from"),
            query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX),
            wanted,
            lambda alert: sees(
                principal, account_id=alert.account_id, transaction_id=alert.transaction_id
            ),
        )
        return Response(_encode(page), media_type=JSON, headers={"Cache-Control": "no-store"})

    return [post_what_if, get_account, get_alerts]


def _check_seen_account(principal: Principal, incoming: Incoming) -> None:
    check_seen(principal, account_id=incoming.transaction.account_id)


def _variant(gateway: Gateway, base: Mapping[str, Any], change: Any, pointer: str) -> Incoming:
    """Read a variant: the transaction with some fields changed.

    Raises:
        Problem: it is no transaction, or of another account.
    """
    if not isinstance(change, dict) or len(change) > VARIANT_FIELDS_MAX:
        raise Problem(INVALID_FIELDS, errors=[FieldError("must be an object", pointer=pointer)])
    if "account_id" in change and change["account_id"] != base.get("account_id"):
        error = FieldError("all variants are of one account", pointer=f"{pointer}/account_id")
        raise Problem(INVALID_FIELDS, errors=[error])
    fields = {**base, **change, "transaction_id": WHAT_IF_ID}
    return gateway.transactions.read_fields(fields, pointer)


def _list_of(fields: Mapping[str, Any], name: str, most: int) -> list[Any]:
    """Return a list of the body that is not empty.

    Raises:
        Problem: it is no list, empty or too long.
    """
    found = fields.get(name)
    if not isinstance(found, list) or not found:
        error = FieldError("must be a list with at least one item", pointer=f"/{name}")
        raise Problem(INVALID_FIELDS, errors=[error])
    if len(found) > most:
        error = FieldError(f"has over {most} items", pointer=f"/{name}")
        raise Problem(TOO_LARGE, errors=[error])
    return found


# labels ----------------------------------------------------------------------------------


def _writing_routes(gateway: Gateway) -> list[HTTPRouteHandler]:
    topic = gateway.settings.topic("labels")

    @post("/v1/labels", status_code=202)
    async def post_label(request: Req) -> Resp:
        """Report the truth about a transaction."""
        context, principal = context_of(_scope(request)), _json_caller(request, "label")
        body = await request.body()
        name, account, key, value = read_label(body, time.time_ns() // 1_000_000)
        check_seen(principal, account_id=account, transaction_id=name)
        _check_services(gateway)
        idempotency = idempotency_key(_scope(request))
        if idempotency is not None:
            content = encode_sorted(read_object(body))
            await gateway.remember(principal.label, idempotency, content)
        async with gateway.audit.act(
            "label_posted", principal, request_id=context.request_id, transaction_id=name
        ):
            try:
                await (await gateway.producer.send(topic, key, value))
            except RefusedRecordError as error:
                kind = TOO_LARGE if error.is_too_large else LOG_UNAVAILABLE
                raise Problem(kind) from error
        gateway.metrics.labels.inc()
        body = _encode({"transaction_id": name, "status": "accepted"})
        return Response(body, media_type=JSON, status_code=202)

    return [post_label]


# health and documentation ----------------------------------------------------------------


def _public_routes(
    gateway: Gateway, document: Mapping[str, Any], page: str
) -> list[HTTPRouteHandler]:
    schema, shown = _encode(document), page.encode()
    style = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

    @get("/live")
    async def get_live() -> Resp:
        """Say that the process answers."""
        return Response(b'{"live":true}', media_type=JSON)

    @get("/ready")
    async def get_ready() -> Resp:
        """Say whether an answer can come."""
        missing = gateway.readiness.missing
        body = _encode({"ready": not missing, "missing": missing})
        return Response(body, media_type=JSON, status_code=503 if missing else 200)

    @get("/metrics")
    async def get_metrics(request: Req) -> Resp:
        """Return the metrics."""
        context_of(_scope(request)).require("read")
        body = generate_latest(gateway.metrics.registry)
        kind = CONTENT_TYPE_LATEST.partition("; charset")[0]  # the framework adds it
        return Response(body, media_type=kind)

    @get("/openapi.json")
    async def get_document() -> Resp:
        """Return the OpenAPI document."""
        return Response(schema, media_type=JSON)

    @get("/docs")
    async def get_page() -> Resp:
        """Return the documentation page."""
        return Response(shown, media_type="text/html", headers=style)

    @get(TYPE_PATH + "{name:str}")
    async def get_problem(name: str) -> Resp:
        """Explain a type of problem."""
        kind = PROBLEM_TYPES.get(name)
        if kind is None:
            raise not_found()
        body = {"type": kind.uri, "title": kind.title, "status": kind.status}
        return Response(_encode({**body, "meaning": kind.meaning}), media_type=JSON)

    return [get_live, get_ready, get_metrics, get_document, get_page, get_problem]


def problem_from(error: Exception) -> Exception:
    """Translate the errors of services into problems; others stay as they are."""
    if isinstance(error, LogUnavailableError):
        return Problem(LOG_UNAVAILABLE)
    if isinstance(error, StoreUnavailableError):
        return Problem(STORE_UNAVAILABLE)
    return error
