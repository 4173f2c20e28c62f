"""JSON Web Tokens of an OpenID Connect issuer, verified by PyJWT; an option.

The issuer's keys (a JWKS) come from an https address or a file. A gateway remembers them, and asks
again for a key that it does not know, but not for each such token: an attacker chooses the ids.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import SettingsError
from pipeline.gateway.principal import SCOPES, SUBJECT_MAX_CHARACTERS, TENANT, Principal
from pipeline.settings import Settings

JWKS_SECONDS = 300.0
"""The issuer's keys are read again after this."""

JWKS_RETRY_SECONDS = 10.0
"""Shortest time between two reads of the issuer's keys."""

JWKS_STALE_SECONDS = 3_600.0
"""While the issuer does not answer, its keys are used for at most this long."""

JWKS_TIMEOUT_SECONDS = 5.0
JWKS_MAX_BYTES = 262_144
LEEWAY_SECONDS = 30.0
"""Tolerance for clocks that differ, in expiry and not-before."""

TOKEN_MAX_CHARACTERS = 8_192

# PyJWT parses a key set that is not what it expects with any of these.
_NO_KEY_SET = (ValueError, TypeError, AttributeError, LookupError, RecursionError)

log = logging.getLogger(__name__)


class InvalidJwtError(Exception):
    """A token is not valid.

    Attributes:
        reason: a word for the log; never a part of the token.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class JwksUnavailableError(Exception):
    """The issuer's keys cannot be read."""


class JwtVerifier:
    """Verifies tokens of the issuer in the settings.

    Args:
        settings: name the issuer, its keys, the audience and the claims.
        read_jwks: reads the key set as bytes, in a thread; by default from the settings' address.
        clock: monotonic seconds.

    Raises:
        SettingsError: PyJWT is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        read_jwks: Callable[[], bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import jwt
            import jwt.algorithms

            if not jwt.algorithms.has_crypto:
                raise ImportError("PyJWT without cryptography")
        except ImportError as error:
            raise SettingsError(
                "gateway_jwt_issuer (RECUR_GATEWAY_JWT_ISSUER) needs PyJWT: install pyjwt[crypto]"
            ) from error
        self._jwt = jwt
        self._settings = settings
        source = settings.gateway_jwt_jwks
        self._read_jwks = read_jwks or (lambda: _read_source(source))
        self._clock = clock
        self._algorithms = settings.jwt_algorithms()
        self._keys: dict[str | None, Any] = {}
        self._read_at = float("-inf")
        self._tried_at = float("-inf")
        self._one_at_a_time = asyncio.Lock()

    async def verify(self, token: str) -> Principal:
        """Return whom a token stands for.

        Raises:
            InvalidJwtError: the token is not valid.
            JwksUnavailableError: the issuer's keys are not known.
        """
        if len(token) > TOKEN_MAX_CHARACTERS:
            raise InvalidJwtError("too long")
        settings, errors = self._settings, self._jwt.exceptions
        try:
            header = self._jwt.get_unverified_header(token)
            if header.get("alg") not in self._algorithms:
                raise InvalidJwtError("algorithm")
            key_id = header.get("kid")
            if key_id is not None and not isinstance(key_id, str):
                raise InvalidJwtError("key id")
            key = await self._key(key_id)
            claims = self._jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                audience=settings.gateway_jwt_audience,
                issuer=settings.gateway_jwt_issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except errors.ExpiredSignatureError:
            raise InvalidJwtError("expired") from None
        except (errors.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise InvalidJwtError(type(error).__name__) from None
        return self._principal(claims)

    def _principal(self, claims: dict[str, Any]) -> Principal:
        subject = claims["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= SUBJECT_MAX_CHARACTERS:
            raise InvalidJwtError("subject")
        tenant: str | None = None
        if self._settings.gateway_jwt_tenant_claim:
            tenant = claims.get(self._settings.gateway_jwt_tenant_claim)
            # Without its tenant a token would see everything.
            if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
                raise InvalidJwtError("tenant")
        scopes = frozenset(_words(claims.get(self._settings.gateway_jwt_scope_claim)))
        return Principal("jwt", subject, subject, scopes & frozenset(SCOPES), tenant)

    async def _key(self, key_id: str | None) -> Any:
        """Return the issuer's key of an id; without an id its only key."""
        now = self._clock()
        if now - self._read_at > JWKS_SECONDS or (key_id is not None and key_id not in self._keys):
            await self._read_again(now)
        if self._clock() - self._read_at > JWKS_STALE_SECONDS:
            raise JwksUnavailableError
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if key_id is None or key_id not in self._keys:
            raise InvalidJwtError("unknown key")
        return self._keys[key_id]

    async def _read_again(self, asked_at: float) -> None:
        async with self._one_at_a_time:
            if self._tried_at >= asked_at or asked_at - self._tried_at < JWKS_RETRY_SECONDS:
                return
            self._tried_at = self._clock()
            try:
                self._keys = self._parse(await asyncio.to_thread(self._read_jwks))
                self._read_at = self._clock()
            except (OSError, *_NO_KEY_SET, self._jwt.exceptions.PyJWTError) as error:
                log.warning(
                    "the keys of the JWT issuer cannot be read",
                    extra={"why": type(error).__name__, "known_keys": len(self._keys)},
                )

    def _parse(self, text: bytes) -> dict[str | None, Any]:
        """Return the public keys by id; leave out keys for encryption and symmetric ones."""
        keys = self._jwt.PyJWKSet.from_dict(json.loads(text)).keys
        usable = {
            key.key_id: key
            for key in keys
            if key.public_key_use in (None, "sig") and key.key_type != "oct"
        }
        if not usable:
            raise ValueError("no key for signatures")
        return usable


def _words(claim: Any) -> Iterable[str]:
    """Read a claim of scopes: words in a text, as RFC 9068 has it, or a list."""
    if isinstance(claim, str):
        return claim.split()
    return [word for word in claim if isinstance(word, str)] if isinstance(claim, list) else []


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **options: Any) -> None:
        """Follow no redirect: the settings name the issuer's own address."""


def _read_source(source: str) -> bytes:
    """Read a key set from an https address or a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than :data:`JWKS_MAX_BYTES`.
    """
    if "://" not in source:
        with Path(source).open("rb") as file:
            text = file.read(JWKS_MAX_BYTES + 1)
    else:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(source, timeout=JWKS_TIMEOUT_SECONDS) as answer:
            text = answer.read(JWKS_MAX_BYTES + 1)
    if len(text) > JWKS_MAX_BYTES:
        raise ValueError("the key set is too large")
    return bytes(text)
