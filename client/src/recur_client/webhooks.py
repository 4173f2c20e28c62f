"""Signatures of webhooks, as Standard Webhooks 1.0.0 has them: v1 and v1a."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence

TOLERANCE_SECONDS = 300
SIGNATURES_MAX = 32
"""Most signatures of one message that are looked at."""


class WebhookError(Exception):
    """A message is not signed by a known secret, or is too old or too new."""


class WebhookVerifier:
    """Verifier of webhook messages.

    Args:
        secrets: ``whsec_...`` for v1, public keys ``whpk_...`` for v1a; several while they rotate.
        tolerance_seconds: largest difference of the message's time and the clock.

    Raises:
        ValueError: there is no secret, or one is malformed.
        ImportError: a public key needs the extra ``webhooks``.
    """

    def __init__(
        self, secrets: Sequence[str], *, tolerance_seconds: float = TOLERANCE_SECONDS
    ) -> None:
        if not secrets:
            raise ValueError("a verifier needs a secret")
        self._tolerance_seconds = tolerance_seconds
        self._shared = [_decoded(s, "whsec_") for s in secrets if not s.startswith("whpk_")]
        public = [_decoded(s, "whpk_") for s in secrets if s.startswith("whpk_")]
        self._public = []
        if public:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

            self._public = [Ed25519PublicKey.from_public_bytes(key) for key in public]

    def verify(
        self, body: bytes, headers: Mapping[str, str], *, now_seconds: float | None = None
    ) -> str:
        """Check a message, and return its id.

        Args:
            body: the bytes as they came.
            headers: the request's headers; their names have any case.
            now_seconds: the time since 1970; by default the clock's.

        Raises:
            WebhookError: it must not be trusted.
        """
        named = {name.lower(): value for name, value in headers.items()}
        try:
            name, sent = named["webhook-id"], named["webhook-timestamp"]
            signatures = named["webhook-signature"].split()[:SIGNATURES_MAX]
        except KeyError as error:
            raise WebhookError(f"the header {error} is missing") from None
        if not (sent.isascii() and sent.isdigit() and len(sent) <= 12):
            raise WebhookError("webhook-timestamp is no time")
        now = time.time() if now_seconds is None else now_seconds
        if abs(now - int(sent)) > self._tolerance_seconds:
            raise WebhookError("the message is too old or too new")
        message = f"{name}.{sent}.".encode() + body
        if not any([self._is_valid(message, one) for one in signatures]):
            raise WebhookError("no signature is of a known secret")
        return name

    def _is_valid(self, message: bytes, signature: str) -> bool:
        version, _, text = signature.partition(",")
        try:
            given = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return False
        if version == "v1":
            # All secrets are tried, so that the time tells nothing about which one fits.
            return any(
                [
                    hmac.compare_digest(hmac.digest(key, message, hashlib.sha256), given)
                    for key in self._shared
                ]
            )
        return version == "v1a" and self._is_signed(message, given)

    def _is_signed(self, message: bytes, given: bytes) -> bool:
        if not self._public:
            return False
        from cryptography.exceptions import InvalidSignature

        for key in self._public:
            try:
                key.verify(given, message)
            except InvalidSignature:
                continue
            return True
        return False


def _decoded(secret: str, prefix: str) -> bytes:
    try:
        found = base64.b64decode(secret.removeprefix(prefix), validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found:
        raise ValueError(f"a secret is {prefix} and Base64")
    return found
