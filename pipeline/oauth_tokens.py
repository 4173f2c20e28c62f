"""OAuth tokens for the brokers, by the client credentials grant (RFC 6749, section 4.4)."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
import urllib.error
import urllib.request
from urllib.parse import quote_plus, urlencode

import msgspec
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError

TIMEOUT_SECONDS = 10.0
"""Longest wait for the identity provider."""

ANSWER_MAX_BYTES = 1 << 16
"""Longest answer of the identity provider."""

RENEW_AT = 0.8
"""Share of a token's life after which a connection gets a new one."""

NO_LIFE_SECONDS = 60.0
"""Life of a token whose answer names none."""


class TokenRefusedError(AuthenticationFailedError):  # type: ignore[misc]
    """The identity provider refuses the client's login."""


class TokenUnavailableError(KafkaConnectionError):  # type: ignore[misc]
    """The identity provider does not answer, or with something else than a token."""


class _Answer(msgspec.Struct, frozen=True):
    access_token: str
    expires_in: float = NO_LIFE_SECONDS


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could send the secret elsewhere."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


class OAuthTokens(AbstractTokenProvider):  # type: ignore[misc]
    """Tokens of one client; each is used for new connections until it is near its end.

    Args:
        url: token endpoint of the identity provider.
        client_id, client_secret: the client's login there.
        scope: the scope to ask for; None to leave it out.
        context: TLS context for the identity provider; None for the system's authorities.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        client_secret: str,
        scope: str | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        login = f"{quote_plus(client_id)}:{quote_plus(client_secret)}".encode()
        form = {"grant_type": "client_credentials"} | ({"scope": scope} if scope else {})
        self._request = urllib.request.Request(
            url,
            data=urlencode(form).encode(),
            headers={
                "Authorization": f"Basic {base64.b64encode(login).decode()}",
                "Content-Type": "application/x-www-form-urlencoded",
                "Accept": "application/json",
            },
        )
        handlers = [urllib.request.HTTPSHandler(context=context)] if context else []
        self._opener = urllib.request.build_opener(_NoRedirect, *handlers)
        self._token = ""
        self._renew_at = 0.0

    async def token(self) -> str:
        """Return a token that is valid now.

        Raises:
            TokenRefusedError: the identity provider refuses the login.
            TokenUnavailableError: it does not answer, or with something else than a token.
        """
        if time.monotonic() >= self._renew_at:
            asked_at = time.monotonic()
            answer = await asyncio.to_thread(self._ask)
            self._token = answer.access_token
            self._renew_at = asked_at + RENEW_AT * max(answer.expires_in, 0.0)
        return self._token

    def _ask(self) -> _Answer:
        try:
            with self._opener.open(self._request, timeout=TIMEOUT_SECONDS) as answer:
                return msgspec.json.decode(answer.read(ANSWER_MAX_BYTES), type=_Answer)
        except urllib.error.HTTPError as error:
            with error:
                said = f"the token endpoint answers {error.code}"
            if error.code in (400, 401, 403):
                raise TokenRefusedError(said) from None
            raise TokenUnavailableError(said) from None
        except msgspec.DecodeError:
            raise TokenUnavailableError("the token endpoint's answer is not a token") from None
        except OSError as error:
            raise TokenUnavailableError(f"the token endpoint does not answer: {error}") from error
