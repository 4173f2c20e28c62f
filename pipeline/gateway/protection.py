"""The gateway's middlewares in their order, from the settings."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.errors import SettingsError
from pipeline.gateway.api_keys import ApiKeyCache, ApiKeyStore
from pipeline.gateway.authentication import PUBLIC_PATHS, AccessControl, Authenticator
from pipeline.gateway.context import AsgiApp
from pipeline.gateway.failed_logins import FailedLogins
from pipeline.gateway.jwt_tokens import JwtVerifier
from pipeline.gateway.limits import RateLimiter
from pipeline.gateway.rates import parse_rate
from pipeline.gateway.request_limits import Admission, RequestLimits
from pipeline.gateway.request_log import RequestLog
from pipeline.gateway.request_spans import TracedRequests
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient
from pipeline.storage.keys import GatewayKeys
from pipeline.tracing.http_spans import HttpTracer


def make_authenticator(settings: Settings, client: RedisClient) -> Authenticator:
    """Make the authenticator of API keys, and of JWTs if the settings name an issuer.

    Raises:
        SettingsError: JWTs are configured, and PyJWT is not installed.
    """
    keys = ApiKeyCache(ApiKeyStore(client, GatewayKeys(settings.redis_key_prefix)))
    return Authenticator(
        keys,
        JwtVerifier(settings) if settings.gateway_jwt_issuer else None,
        FailedLogins(settings.gateway_failed_logins_per_minute),
    )


def make_limiter(settings: Settings, client: RedisClient) -> RateLimiter:
    """Make the rate limits.

    Raises:
        SettingsError: the default rate is out of bounds.
    """
    try:
        default = parse_rate(settings.gateway_default_rate)
    except ValueError as error:
        raise SettingsError(f"gateway_default_rate (RECUR_GATEWAY_DEFAULT_RATE): {error}") from None
    return RateLimiter(client, GatewayKeys(settings.redis_key_prefix), default)


def protect(
    app: AsgiApp,
    settings: Settings,
    authenticator: Authenticator,
    limiter: RateLimiter,
    public_paths: Collection[str] = PUBLIC_PATHS,
    tracer: HttpTracer | None = None,
) -> AsgiApp:
    """Put the middlewares around an application.

    From the outside: request id, log and problems; open requests; credentials and rate; span; body,
    depth, concurrency and time. So a request without credentials has neither a span nor a body
    read, and a slow body holds no place among those that work.

    Args:
        app: the routes. A Problem that a handler raises must leave it, or become its response.
        settings: the limits.
        authenticator: finds out who makes a request.
        limiter: the rate limits.
        public_paths: paths without credentials, which are also served under overload.
        tracer: makes spans of score requests; None: tracing is off, and costs nothing.
    """
    limited: AsgiApp = RequestLimits(app, settings)
    if tracer is not None:
        limited = TracedRequests(limited, tracer)
    controlled = AccessControl(limited, authenticator, limiter, public_paths)
    return RequestLog(Admission(controlled, settings.gateway_max_open_requests, public_paths))
