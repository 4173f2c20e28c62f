"""Problems of the gateway's HTTP API (RFC 9457): one table of all types, and their responses.

``make docs`` writes docs/reference/gateway-errors.md from the table. A problem's ``type`` is a
relative reference, ``/problems/<name>``, that a gateway answers with the type's meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeline.errors import RecurError

MEDIA_TYPE = b"application/problem+json"
TYPE_PATH = "/problems/"

Headers = tuple[tuple[bytes, bytes], ...]
"""Response headers as ASGI takes them: lower-case names."""


@dataclass(frozen=True)
class ProblemType:
    """One kind of problem.

    Attributes:
        name: last part of its URI.
        status: HTTP status code.
        title: short summary, the same in each response.
        meaning: when it occurs and what a client does about it, for the documentation.
        retry_after_seconds: value of ``Retry-After``, unless the problem has its own; None for
            problems that waiting does not solve.
    """

    name: str
    status: int
    title: str
    meaning: str
    retry_after_seconds: int | None = None

    @property
    def uri(self) -> str:
        """The relative reference that names the type."""
        return TYPE_PATH + self.name


NOT_JSON = ProblemType(
    "not-json", 400, "The body is not JSON",
    "The body cannot be read as JSON. Correct it before you send it again.",
)  # fmt: skip
NOT_HTTP = ProblemType(
    "not-http", 400, "The request is not HTTP",
    "The head of the request cannot be read, or its URL is too long. The connection is closed.",
)  # fmt: skip
TOO_DEEP = ProblemType(
    "too-deep", 400, "The body is nested too deeply",
    "Arrays and objects lie in each other deeper than RECUR_GATEWAY_MAX_JSON_DEPTH, or brackets"
    " have no partner.",
)  # fmt: skip
INVALID_PARAMETER = ProblemType(
    "invalid-parameter", 400, "A parameter or header is not valid",
    "`errors` names each wrong query parameter, path parameter or header.",
)  # fmt: skip
UNAUTHENTICATED = ProblemType(
    "unauthenticated", 401, "Credentials are missing or not valid",
    "Send `Authorization: Bearer TOKEN` with an API key (`recur keys add`) or, where the gateway"
    " takes them, a JWT. An expired or revoked key is refused, too.",
)  # fmt: skip
FORBIDDEN = ProblemType(
    "forbidden", 403, "The credentials lack a scope",
    "The key is valid but may not do this. `scope` names the missing scope.",
)  # fmt: skip
NOT_FOUND = ProblemType(
    "not-found", 404, "There is no such resource",
    "The path, account or transaction does not exist, or the key's tenant may not see it. The two"
    " cases look the same.",
)  # fmt: skip
METHOD_NOT_ALLOWED = ProblemType(
    "method-not-allowed", 405, "The resource does not have this method",
    "`Allow` lists the methods of the path.",
)  # fmt: skip
NOT_ACCEPTABLE = ProblemType(
    "not-acceptable", 406, "No accepted media type is available",
    "The gateway answers in JSON. Accept `application/json` and `application/problem+json`.",
)  # fmt: skip
SLOW_REQUEST = ProblemType(
    "slow-request", 408, "The body did not arrive in time",
    "The whole body must arrive within RECUR_GATEWAY_BODY_TIMEOUT_SECONDS.",
)  # fmt: skip
CONFLICT = ProblemType(
    "conflict", 409, "The id stands for other content already",
    "Another body came under the same transaction_id or Idempotency-Key. Nothing was changed."
    " Use a new id for a new transaction.",
)  # fmt: skip
TOO_LARGE = ProblemType(
    "too-large", 413, "The body is too large",
    "The body has more bytes than RECUR_GATEWAY_MAX_BODY_BYTES, or more items than a batch may.",
)  # fmt: skip
UNSUPPORTED_MEDIA_TYPE = ProblemType(
    "unsupported-media-type", 415, "The body has an unsupported type or encoding",
    "Send `Content-Type: application/json` without a Content-Encoding.",
)  # fmt: skip
INVALID_FIELDS = ProblemType(
    "invalid-fields", 422, "Fields of the body are not valid",
    "`errors` names each wrong field by its JSON pointer.",
)  # fmt: skip
REJECTED = ProblemType(
    "rejected", 422, "The record was rejected",
    "The pipeline cannot score the transaction. `reason` is one of the reasons of the dead-letter"
    " topic. The same body gets the same answer again.",
)  # fmt: skip
HEAD_TOO_LARGE = ProblemType(
    "head-too-large", 431, "The head of the request is too large",
    "URL and headers have over 131,072 bytes. The connection is closed.",
)  # fmt: skip
RATE_LIMITED = ProblemType(
    "rate-limited", 429, "The key's rate limit is reached",
    "Wait for `Retry-After` seconds. The headers `RateLimit-Policy` and `RateLimit` tell the quota"
    " and what is left of it. Nothing was done.",
    retry_after_seconds=1,
)  # fmt: skip
TOO_MANY_FAILED_LOGINS = ProblemType(
    "too-many-failed-logins", 429, "Too many wrong credentials came from this address",
    "Correct the credentials, and wait for `Retry-After` seconds. Keys that this gateway knows are"
    " still served. RECUR_GATEWAY_FAILED_LOGINS_PER_MINUTE is the limit.",
    retry_after_seconds=1,
)  # fmt: skip
INTERNAL = ProblemType(
    "internal", 500, "The gateway failed",
    "A defect. The gateway's log has a line with the request id. A transaction may or may not be"
    " accepted: send the same body again.",
)  # fmt: skip
OVERLOADED = ProblemType(
    "overloaded", 503, "The gateway has as many requests as it takes",
    "Too many requests are open. Nothing was done. Wait for `Retry-After` seconds.",
    retry_after_seconds=1,
)  # fmt: skip
TIMED_OUT = ProblemType(
    "timed-out", 503, "The request took too long",
    "The gateway gave up after RECUR_GATEWAY_REQUEST_TIMEOUT_SECONDS. A transaction may or may not"
    " be accepted: send the same body again.",
    retry_after_seconds=1,
)  # fmt: skip
STORE_UNAVAILABLE = ProblemType(
    "store-unavailable", 503, "Redis does not answer",
    "Send the same body again after `Retry-After` seconds.",
    retry_after_seconds=2,
)  # fmt: skip
LOG_UNAVAILABLE = ProblemType(
    "log-unavailable", 503, "Kafka does not answer",
    "Send the same body again after `Retry-After` seconds.",
    retry_after_seconds=2,
)  # fmt: skip
AUDIT_UNAVAILABLE = ProblemType(
    "audit-unavailable", 503, "The audit record cannot be written",
    "Labels and administrative acts need an audit record. The act was refused.",
    retry_after_seconds=2,
)  # fmt: skip
IDENTITY_UNAVAILABLE = ProblemType(
    "identity-unavailable", 503, "The credentials cannot be checked",
    "Neither Redis nor a key remembered for a short time tells whether the credentials are valid,"
    " or the issuer's key set does not answer.",
    retry_after_seconds=2,
)  # fmt: skip
IN_DOUBT = ProblemType(
    "in-doubt", 503, "Another request with this transaction has not finished",
    "Another gateway took the transaction, and the log does not have it yet. Its gateway may have"
    " died. Send the same body again: it is produced once.",
    retry_after_seconds=1,
)  # fmt: skip
NOT_READY = ProblemType(
    "not-ready", 503, "The gateway cannot answer yet",
    "The gateway starts or ends, or no worker can score.",
    retry_after_seconds=2,
)  # fmt: skip

PROBLEM_TYPES: dict[str, ProblemType] = {
    kind.name: kind
    for kind in (
        NOT_JSON, NOT_HTTP, TOO_DEEP, INVALID_PARAMETER, UNAUTHENTICATED, FORBIDDEN, NOT_FOUND,
        METHOD_NOT_ALLOWED, NOT_ACCEPTABLE, SLOW_REQUEST, CONFLICT, TOO_LARGE,
        UNSUPPORTED_MEDIA_TYPE, INVALID_FIELDS, REJECTED, RATE_LIMITED, TOO_MANY_FAILED_LOGINS,
        HEAD_TOO_LARGE, INTERNAL, OVERLOADED, TIMED_OUT, STORE_UNAVAILABLE, LOG_UNAVAILABLE,
        AUDIT_UNAVAILABLE, IDENTITY_UNAVAILABLE, IN_DOUBT, NOT_READY,
    )
}  # fmt: skip
"""All types by their names."""


class FieldError(msgspec.Struct, frozen=True, omit_defaults=True):
    """One wrong field, parameter or header.

    Attributes:
        detail: what is wrong.
        pointer: JSON pointer (RFC 6901) to the field of the body; "" is the whole body.
        parameter: name of the query or path parameter.
        header: name of the header.
    """

    detail: str
    pointer: str | None = None
    parameter: str | None = None
    header: str | None = None


class Problem(RecurError):
    """An error that the gateway answers with.

    Args:
        kind: its type.
        detail: what was wrong in this request. It holds no secret. It may name the request's own
            values, so it goes to the client and never to the log.
        errors: wrong fields.
        retry_after_seconds: value of ``Retry-After``; by default the type's.
        headers: further response headers.
        extensions: further members of the body.
    """

    def __init__(
        self,
        kind: ProblemType,
        detail: str = "",
        *,
        errors: Sequence[FieldError] = (),
        retry_after_seconds: float | None = None,
        headers: Headers = (),
        extensions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(kind.title)
        self.kind = kind
        self.detail = detail
        self.errors = tuple(errors)
        wait = kind.retry_after_seconds if retry_after_seconds is None else retry_after_seconds
        self.retry_after_seconds = None if wait is None else max(1, math.ceil(wait))
        self.extra_headers = headers
        self.extensions = dict(extensions or {})

    def members(self, request_id: str) -> dict[str, Any]:
        """Return the members of the JSON body.

        Args:
            request_id: the request's id.
        """
        body: dict[str, Any] = {
            "type": self.kind.uri,
            "title": self.kind.title,
            "status": self.kind.status,
        }
        if self.detail:
            body["detail"] = self.detail
        body["request_id"] = request_id
        if self.errors:
            body["errors"] = self.errors
        return body | self.extensions

    def body(self, request_id: str) -> bytes:
        """Return the JSON body."""
        return msgspec.json.encode(self.members(request_id))

    def headers(self) -> Headers:
        """Return the response headers, without Content-Length and the request id."""
        found: Headers = ((b"content-type", MEDIA_TYPE), (b"cache-control", b"no-store"))
        if self.retry_after_seconds is not None:
            found += ((b"retry-after", b"%d" % self.retry_after_seconds),)
        return found + self.extra_headers


_PLACE = re.compile(r" - at `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def field_error(error: msgspec.ValidationError) -> FieldError:
    """Name the field that msgspec's decoder rejected.

    >>> class Item(msgspec.Struct):
    ...     amount: int
    >>> try:
    ...     msgspec.json.decode(b'[{"amount": "x"}]', type=list[Item])
    ... except msgspec.ValidationError as error:
    ...     field_error(error)
    FieldError(detail='Expected `int`, got `str`', pointer='/0/amount', parameter=None, header=None)
    """
    text = str(error)
    place = _PLACE.search(text)
    steps = [name or number for name, number in _STEP.findall(place[1])] if place else []
    steps = steps[: steps.index("...")] if "..." in steps else steps  # the key is not told
    named = _MISSING.search(text) or _UNKNOWN.search(text)
    if named is not None:
        steps.append(named[1])
    pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    return FieldError(_PLACE.sub("", text), pointer=pointer)


def invalid_fields(error: msgspec.ValidationError) -> Problem:
    """Make the problem for a body that msgspec's decoder rejected."""
    return Problem(INVALID_FIELDS, errors=[field_error(error)])
