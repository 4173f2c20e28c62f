"""Authentication and rate limits of requests, as ASGI middleware: nothing is open by mistake."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from pipeline.gateway.api_keys import ApiKeyCache, InvalidKeyError
from pipeline.gateway.context import (
    AsgiApp,
    AsgiScope,
    Receive,
    Send,
    context_of,
    unauthenticated,
)
from pipeline.gateway.failed_logins import FailedLogins
from pipeline.gateway.jwt_tokens import InvalidJwtError, JwksUnavailableError, JwtVerifier
from pipeline.gateway.limits import RateLimiter
from pipeline.gateway.principal import Principal
from pipeline.gateway.problems import (
    IDENTITY_UNAVAILABLE,
    TOO_MANY_FAILED_LOGINS,
    TYPE_PATH,
    Problem,
)
from pipeline.storage.client import StoreUnavailableError

CREDENTIALS_MAX_BYTES = 8_200
"""Longest value of ``Authorization`` that is looked at."""

PUBLIC_PATHS = frozenset({"/live", "/ready"})
"""Paths without authentication, besides :data:`pipeline.gateway.problems.TYPE_PATH`."""

_DETAILS = {
    "expired": "the credentials have expired",
    "revoked": "the key was revoked",
}
"""Details for owners of credentials; everybody else learns only that they are not valid."""

log = logging.getLogger(__name__)


class Authenticator:
    """Finds out who makes a request.

    Args:
        keys: verifies API keys.
        jwt: verifies JWTs; None: only API keys are taken.
        failed: counts failed logins; None: without a limit.
    """

    def __init__(
        self,
        keys: ApiKeyCache,
        jwt: JwtVerifier | None = None,
        failed: FailedLogins | None = None,
    ) -> None:
        self._keys = keys
        self._jwt = jwt
        self._failed = FailedLogins(0) if failed is None else failed

    async def authenticate(
        self, headers: Iterable[tuple[bytes, bytes]], request_id: str, address: str = ""
    ) -> Principal:
        """Return whom the credentials of ``Authorization: Bearer`` or ``X-API-Key`` stand for.

        Args:
            headers: the request's, as ASGI has them.
            request_id: for the log's line about refused credentials.
            address: the client's.

        Raises:
            Problem: 401 without valid credentials, 429 after too many wrong ones, 503 if they
                cannot be checked.
        """
        token = _token(headers)
        wait_seconds = self._failed.wait_seconds(address)
        try:
            if token.startswith("recur_") or self._jwt is None:
                # Behind a proxy many clients have one address: the known ones go on.
                if wait_seconds and not self._keys.remembers(token):
                    raise _too_many(wait_seconds)
                return await self._keys.verify(token)
            return await self._jwt.verify(token)
        except (StoreUnavailableError, JwksUnavailableError) as error:
            raise Problem(IDENTITY_UNAVAILABLE) from error
        except (InvalidKeyError, InvalidJwtError) as error:
            if wait_seconds:  # no line in the log: it would be one for each guess
                raise _too_many(wait_seconds) from None
            if self._failed.count(address):
                log.warning(
                    "an address has no failed logins left", extra={"request_id": request_id}
                )
            key_id = error.key_id if isinstance(error, InvalidKeyError) else "-"
            log.info(
                "credentials were refused",
                extra={"why": error.reason, "key": key_id, "request_id": request_id},
            )
            detail = _DETAILS.get(error.reason, "the credentials are not valid")
            raise unauthenticated(detail, invalid=True) from None


def _too_many(wait_seconds: float) -> Problem:
    return Problem(TOO_MANY_FAILED_LOGINS, retry_after_seconds=wait_seconds)


def _token(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the one token of a request.

    Raises:
        Problem: there is none, or more than one.
    """
    found = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value[:CREDENTIALS_MAX_BYTES].partition(b" ")
            if scheme.lower() != b"bearer":
                raise unauthenticated("the scheme of Authorization must be Bearer", invalid=True)
            found.append(token.strip())
        elif name == b"x-api-key":
            found.append(value[:CREDENTIALS_MAX_BYTES].strip())
    if not found:
        raise unauthenticated("there are no credentials")
    if len(found) > 1:
        raise unauthenticated("there are several credentials", invalid=True)
    return found[0].decode("latin-1")


class AccessControl:
    """ASGI middleware: authenticates each request and takes it from its principal's rate limit.

    Handlers ask for the scope: ``context_of(request.scope).require("score")``. A batch is charged
    for its further items by the handler (:meth:`pipeline.gateway.limits.RateLimiter.charge`).

    Args:
        app: the next application.
        authenticator: finds out who makes a request.
        limiter: the rate limits.
        public_paths: paths that need no credentials.
    """

    def __init__(
        self,
        app: AsgiApp,
        authenticator: Authenticator,
        limiter: RateLimiter,
        public_paths: Collection[str] = PUBLIC_PATHS,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._limiter = limiter
        self._public = frozenset(public_paths)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve a request, or raise its problem."""
        if scope["type"] == "http" and not self._is_public(scope["path"]):
            context = context_of(scope)
            client = scope.get("client")
            context.principal = await self._authenticator.authenticate(
                scope["headers"], context.request_id, client[0] if client else ""
            )
            decision = await self._limiter.charge(context.principal)
            if decision is not None:
                context.headers.extend(decision.headers())
        await self._app(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        return path in self._public or path.startswith(TYPE_PATH)
