"""Signatures of Standard Webhooks 1.0.0: v1 (HMAC-SHA256) and v1a (Ed25519).

A signature covers the id, the time and the body: ``id.timestamp.body``. The header holds one
signature for each secret, separated by spaces, so that a receiver can change its secret at leisure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SECRET_PREFIX = "whsec_"
PRIVATE_PREFIX = "whsk_"
PUBLIC_PREFIX = "whpk_"

SECRET_MIN_BYTES, SECRET_MAX_BYTES = 24, 64
"""Permitted length of a symmetric secret, bytes."""

NEW_SECRET_BYTES = 32
"""Length of a secret that :func:`new_secret` makes, bytes."""

SEED_BYTES = 32
"""Length of an Ed25519 secret key. Some tools append the public key to it."""


class Signer(Protocol):
    """A secret that signs."""

    def sign(self, content: bytes) -> str:
        """Sign the content; return ``version,base64``."""


class HmacSigner:
    """A symmetric secret, ``whsec_...``: signatures ``v1``."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, content: bytes) -> str:
        """See :class:`Signer`."""
        digest = hmac.new(self._secret, content, hashlib.sha256).digest()
        return f"v1,{base64.b64encode(digest).decode()}"


class Ed25519Signer:
    """A private key, ``whsk_...``: signatures ``v1a``."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @property
    def public_bytes(self) -> bytes:
        """Public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    @property
    def public_key(self) -> str:
        """Public key for the receiver, ``whpk_...``."""
        return PUBLIC_PREFIX + base64.b64encode(self.public_bytes).decode()

    def sign(self, content: bytes) -> str:
        """See :class:`Signer`."""
        return f"v1a,{base64.b64encode(self._key.sign(content)).decode()}"


def signer_of(secret: str) -> Signer:
    """Read a secret in its serialized form.

    Raises:
        ValueError: it is no secret. The message says what is wrong and does not quote it.
    """
    text = secret.strip()
    if text.startswith(PUBLIC_PREFIX):
        raise ValueError("is a public key (whpk_): give the private one (whsk_)")
    if text.startswith(PRIVATE_PREFIX):
        key = _decoded(text.removeprefix(PRIVATE_PREFIX))
        seed, public = key[:SEED_BYTES], key[SEED_BYTES:]
        if len(seed) != SEED_BYTES or (public and len(public) != SEED_BYTES):
            raise ValueError("is no Ed25519 key: whsk_ and the base64 of 32 or 64 bytes")
        signer = Ed25519Signer(seed)
        if public and public != signer.public_bytes:
            raise ValueError("holds a private and a public key that do not belong together")
        return signer
    if not text.startswith(SECRET_PREFIX):
        raise ValueError("must begin with whsec_ (HMAC) or whsk_ (Ed25519)")
    key = _decoded(text.removeprefix(SECRET_PREFIX))
    if not SECRET_MIN_BYTES <= len(key) <= SECRET_MAX_BYTES:
        raise ValueError(
            f"has {len(key)} bytes: a whsec_ secret has {SECRET_MIN_BYTES} to {SECRET_MAX_BYTES}"
        )
    return HmacSigner(key)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64 after its prefix") from None


def signed_headers(
    message_id: str, timestamp: int, body: bytes, signers: Sequence[Signer]
) -> dict[str, str]:
    """Make the three headers of a webhook.

    Args:
        message_id: the id, without full stops.
        timestamp: time of the attempt, epoch seconds.
        body: the request's body, byte for byte.
        signers: one or more secrets.
    """
    content = f"{message_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signer.sign(content) for signer in signers),
    }


def new_secret() -> str:
    """Make a symmetric secret, ``whsec_...``."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(NEW_SECRET_BYTES)).decode()


def new_key_pair() -> tuple[str, str]:
    """Make a private key ``whsk_...`` and its public key ``whpk_...``."""
    seed = secrets.token_bytes(SEED_BYTES)
    private = PRIVATE_PREFIX + base64.b64encode(seed).decode()
    return private, Ed25519Signer(seed).public_key
